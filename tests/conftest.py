"""What every test runs under: eight CPU devices, strict promotion, few but varied examples."""

import contextlib
import functools
import gc
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
import optax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]

gc.disable()  # until all is imported: each collection would visit millions of objects, and free none

# Compiling is most of the tests' time; `make test-all` compiles as users do. A flag that jaxlib does not know ends the
# process.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

# Where libtpu is installed, the processes that a test starts would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The shapes in these modules' annotations are checked when they are called, in the tests alone.
CHECKED = ["data.batches", "data.encoded", "generation", "models", "training.loss", "training.step"]
install_import_hook([f"lora_jax.{name}" for name in CHECKED], "beartype.beartype")

# Before the first use of a device: the sharding tests need eight.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def _cache_folder() -> Path:
    """Compiled programs of these versions and flags for CPUs like this one; what nobody read for 14 days is deleted."""
    cpu = platform.machine() + platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu += next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    key = hashlib.sha256(f"{os.environ['XLA_FLAGS']} {cpu}".encode()).hexdigest()[:8]
    folder = ROOT / ".jax_cache" / f"{jax.__version__}-{jaxlib.__version__}-{key}"
    for file in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            if time.time() - file.stat().st_atime > 14 * 24 * 3600:
                file.unlink()
    return folder


# The tests' processes, and those that they start, share what they compile with each other and with the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_configure(config: pytest.Config) -> None:
    # An entry that another process has not yet written to its end, or was killed over: the program is compiled.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache entry")


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays
    gc.set_threshold(100_000)  # jaxprs are many small objects, of which few are in cycles
    gc.enable()


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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the module's own with a base of one layer and data, `base` and `data`."""
    from tests.helpers.cli import make_inputs

    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, layers=1)
    return folder


@pytest.fixture
def logits_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model's loss has its logits in pieces of so small batches too."""
    from lora_jax.training import objectives

    monkeypatch.setattr(objectives, "LEAST", 8)


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    from tests.helpers.public import registries_restored

    with registries_restored():
        yield


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR, whose tables take ten seconds to read, and the PTB tokenizer are left out of the scores."""
    from lora_jax.metrics import java

    def absent(*_: Any) -> str:
        raise ImportError("no Java in this test")

    monkeypatch.setattr(java, "jar", absent)
