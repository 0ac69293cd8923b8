"""What every test runs under: eight CPU devices, strict promotion, few but varied examples."""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Compiling is most of the tests' time; `make test-all` compiles as users do.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Where libtpu is installed, the processes that a test starts would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Before the first use of a device: the sharding tests need eight.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same small programs: each process keeps them, for as long as it lives.
_CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name  # of the processes that a test starts
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _freely(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


def _free_updates(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        tx = factory(*args, **kwargs)
        return tx._replace(update=_freely(tx.update))

    return make


# optax 0.2.8 mixes its int32 counters with floats (seen 2026-11-25). Whatever is in `freeze_base`
# goes through `optax.partition`; the bias correction stands in a bare Adam too.
optax.partition = _free_updates(optax.partition)
optax.tree.bias_correction = _freely(optax.tree.bias_correction)

# Each example may compile, so there is no deadline; CI draws the same ones every time.
settings.register_profile("local", deadline=None, max_examples=10)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data that is not in the repository; tests that need it skip without it."""
    folder = Path(os.environ.get("LORA_JAX_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder


@pytest.fixture
def logits_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model's loss has its logits in pieces of so small batches too."""
    from lora_jax.training import objectives

    monkeypatch.setattr(objectives, "LEAST", 8)
