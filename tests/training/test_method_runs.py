"""Every method of the configs from launch to text: trained, stopped and gone on with, reloaded, asked for texts."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import lora_jax as lj
from configs import e2e, glue
from configs.methods import METHODS
from lora_jax import checkpoints, runs, training
from lora_jax.data.pairs import prompts
from lora_jax.generation import generate
from lora_jax.runs import bases, methods
from tests.helpers import glue_inputs
from tests.helpers.cli import make_inputs

SMALL: dict[str, Any] = {
    "lora.rank": 2,
    "dora.rank": 2,
    "pissa.rank": 2,
    "lokr.rank": 2,
    "vera.rank": 8,
    "adapter.rank": 3,
    "compacter.rank": 8,
    "prefix_embedding.prefix": 3,
    "prefix_layer.prefix": 3,
    "steps": 4,
    "save_every": 2,
    "log_every": 2,
    "data.buckets": 1,
}
KINDS = (
    "adapter_l",
    "compacter",
    "lora_pe",
    "lora_pl",
    "lora_bitfit",
    "lora_plus",
    "dora",
    "pissa",
    "vera",
    "ia3",
    "lokr",
)
SLOWER = ("adapter_p", "prefix_embedding", "compacter", "lora_pl", "dora", "lora_bitfit")
FIRST = ("lora_pl",)  # the others in `make test-all`
ALL = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in METHODS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("methods")
    make_inputs(made)
    glue_inputs.make_inputs(made / "glue")
    return made


def config_of(folder: Path, name: str) -> ConfigDict:
    config = e2e.get_config(f"small,{name}")
    config.base, config.data.path = str(folder / "base"), str(folder / "data")
    config.update_from_flattened_dict(SMALL | {"data.batch_size": 4, "optimizer.warmup_steps": 1})
    config.optimizer.learning_rate = 0.01
    return config


@pytest.mark.parametrize("name", ALL)
def test_a_run_of_each_method(name: str, folder: Path, tmp_path: Path) -> None:
    config, workdir = config_of(folder, name), tmp_path / "run"
    assert runs.train(config, workdir).finished
    straight = checkpoints.load(workdir)
    losses = [e["loss"] for e in training.read_metrics(workdir) if "loss" in e]
    assert straight.step == 4 and losses[1] < losses[0]
    # stopped after step 2 and gone on with: the same bits
    shutil.rmtree(workdir / "checkpoints" / "4")
    assert runs.train(config, workdir).finished
    again = checkpoints.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, again.delta, straight.delta)

    base = bases.load(config)
    method, delta, info = checkpoints.load_adapter(workdir / "adapter")
    assert info["base"] == base.identity
    start = jax.jit(method.init)(jax.random.split(jax.random.key(config.seed))[0], base.params)
    for path, factors in start.items():
        for factor in factors:
            if factor.startswith("fixed_"):
                np.testing.assert_array_equal(delta[path][factor], factors[factor])
    check_texts(base, method, delta)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_same_on_eight_devices(name: str, folder: Path, tmp_path: Path) -> None:
    """1e-4 of the largest entry after four steps of Adam at a rate of 0.01: sums in another order."""
    deltas = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        config = config_of(folder, name)
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
        config.lora.dropout = config.dora.dropout = 0.0
        assert runs.train(config, tmp_path / str(sizes[0])).finished
        deltas.append(checkpoints.load(tmp_path / str(sizes[0])).delta)
    for one, other in zip(*map(jax.tree.leaves, deltas), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * max(np.abs(other).max(), 1e-2))


def check_texts(base: bases.Base, method: lj.ParamTransform, delta: lj.Delta) -> None:
    """Greedy texts with a cache, of prompts of unequal length, are what a whole forward without it says."""
    inserted = methods.placeholders(method.spec, base.model)
    prompt_ids = prompts(["name : Alba", "name : Blue Spice | area : riverside"], base.tokenizer, eos=0, **inserted)
    longest = max(map(len, prompt_ids))
    tokens = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompt_ids], np.int32)
    mask = np.array([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompt_ids])
    adapted = method.apply(lj.without_tuned(base.params, delta), delta)
    new = np.asarray(generate(base.model, adapted, tokens, mask, max_new_tokens=4, eos=271))
    sequences, real = np.concatenate([tokens, new], 1), np.concatenate([mask, np.ones((2, 4), bool)], 1)
    logits = jax.jit(lj.lift(base.model.apply))({"params": adapted}, sequences, real)
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[:, longest - 1 : -1], new)


@pytest.mark.parametrize("name", ["ia3", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOWER)])
def test_a_classifier_of_each_kind(name: str, folder: Path, tmp_path: Path) -> None:
    config = glue.get_config(f"base,cola,{name}")
    config.base, config.data.path = str(folder / "glue" / "base"), str(folder / "glue" / "glue")
    config.update_from_flattened_dict(SMALL | {"seeds": (), "steps": 6, "data.batch_size": 8})
    config.optimizer.learning_rate = 0.02
    assert runs.train(config, tmp_path).finished
    method, delta, _ = checkpoints.load_adapter(tmp_path / "adapter")
    base = bases.load(config)
    tokens = jnp.array([[2, 5, 6, 7, 3], [2, 9, 10, 11, 3]], jnp.int32)
    plain = jax.jit(base.model.apply)({"params": base.params}, tokens)
    start = jax.jit(method.init)(jax.random.key(0), base.params)
    apply = jax.jit(lj.lift(base.model.apply))
    if "prefix" not in method.spec["method"]:
        np.testing.assert_array_equal(apply({"params": method.apply(base.params, start)}, tokens), plain)
    assert np.abs(apply({"params": method.apply(base.params, delta)}, tokens) - plain).max() > 1e-3
