"""Runs and sweeps under the optimizers made for LoRA: resumed, on meshes, and what a step of them computes."""

import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import checkpoints, runs, training
from lora_jax.distributed import sharding
from lora_jax.models import gpt2
from lora_jax.planning import asking
from lora_jax.planning.asking import Layout
from lora_jax.training import sweep
from tests.helpers.meshes import CONFIG, SCANNED, mesh_of
from tests.helpers.plan_config import tiny
from tests.helpers.runs import config_of
from tests.helpers.sweeps import LORA, alone, close, members, ready

NAMES = ("riemannian", "lora_rite", "lora_fa", "lora_muon")
# One of them in `make test`, all in `make test-all`.
WITH_ONE_QUICK = [pytest.param(name, marks=() if name == "lora_rite" else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", WITH_ONE_QUICK)
def test_a_run_learns_and_resumes_bit_for_bit(name: str, inputs: Path, tmp_path: Path) -> None:
    options = {"optimizer.name": name, "optimizer.clip_norm": 1.0, "accumulate": 2, "method": "lora+tune"}
    config = config_of(inputs, **options, **{"tune.select": ("**/bias",)})
    result = runs.train(config, tmp_path / "run")
    losses = [entry["loss"] for entry in training.read_metrics(tmp_path / "run") if "loss" in entry]
    assert result.finished and losses[-1] < losses[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")  # stopped after step 2, and resumed
    again = runs.train(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, again.delta, result.delta)
    start = checkpoints.load(tmp_path / "run", step=2).delta
    both = zip(jax.tree.leaves_with_path(result.delta), jax.tree.leaves(start), strict=True)
    moved = {keys[-1].key for (keys, leaf), old in both if (leaf != old).any()}
    assert moved == ({"b", "value"} if name == "lora_fa" else {"a", "b", "value"})
    config.optimizer.name = "adamw"
    with pytest.raises(ValueError, match=f"optimizer.name is '{name}' there and 'adamw' here"):
        runs.train(config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_of_rates_and_ranks_is_its_members_runs(name: str, tmp_path: Path) -> None:
    """What pads the smaller rank stays out of it."""
    values = [{"learning_rate": 1e-2, "rank": 1}, {"learning_rate": 3e-3, "rank": 3}]
    swept = members(values, LORA, buckets=1, **{"optimizer.name": name, "optimizer.clip_norm": 1.0}, steps=4)
    results = sweep.train(ready(tmp_path / "sweep", swept, validation=None, together=True))
    assert results is not None
    for member, result in zip(swept, results, strict=True):
        assert result is not None
        close(result.delta, alone(tmp_path / member.name, member, validation=None).delta)


@pytest.mark.parametrize("name", NAMES)
def test_where_states_lie(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Moments and bases as their factors, r x r on every device; nothing without a rule."""
    mesh = mesh_of(2, 2, 2)
    for config, layer in ((CONFIG, "h_0"), (SCANNED, "h")):
        model = gpt2.GPT2(config)
        params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
        method = lj.lora(
            lj.select("**/attn/*/kernel", axes=gpt2.AXES), rank=2, shared=("**/attn/{query,value}/kernel",)
        )
        tx = training.optimizer({"name": name}, lambda step: 0.1, spec=method.spec)
        state = jax.eval_shape(lambda params: training.new_state(method, tx, params, jax.random.key(0)), params)  # noqa: B023
        adapted = jax.eval_shape(method.apply, params, state.delta)
        with caplog.at_level(logging.WARNING):
            places = training.state_shardings(state, sharding.Placement.of(model, mesh), adapted)
        assert "stays whole" not in caplog.text
        factor = places.delta[f"{layer}/attn/out/kernel"]["a"].spec
        assert any(factor)
        leaves = jax.tree.leaves_with_path(state.optimizer)
        lying = {
            (leaf.shape, place.spec)
            for (keys, leaf), place in zip(leaves, jax.tree.leaves(places.optimizer), strict=True)
            if [getattr(key, "key", None) for key in keys[-2:]] == [f"{layer}/attn/out/kernel", "a"]
        }
        shape = state.delta[f"{layer}/attn/out/kernel"]["a"].shape
        assert {spec for of, spec in lying if of == shape} == (set() if name == "lora_fa" else {factor})
        assert all(not any(spec) for of, spec in lying if of != shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_same_on_eight_devices(name: str, inputs: Path, tmp_path: Path) -> None:
    """1e-4 of the largest entry after four steps: sums in another order."""
    deltas = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        config = config_of(inputs, **{"optimizer.name": name, "lora.dropout": 0.0})
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
        deltas.append(runs.train(config, tmp_path / str(sizes[0])).delta)
    for one, other in zip(*map(jax.tree.leaves, deltas), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * max(np.abs(other).max(), 1e-2))


def test_a_step_of_lora_fa_forms_no_gradient_of_a(tmp_path: Path) -> None:
    """2 tokens (in * rank) FLOPs less for each weight, in a step that logs the norm of all gradients; up to 6%, which
    the optimizer's own products have."""
    work = tiny(tmp_path)
    layout = Layout(1, 1, 1, False, 1)
    flops = []
    for name in ("adamw", "lora_fa"):
        options = training.OptimizerConfig(name=name)
        flops.append(asking.step_flops(work._replace(optimizer=options), layout))
    tokens, rank, width, weights = 8 * 32, 4, 64, 2 * 2
    assert flops[0] - flops[1] == pytest.approx(weights * 2 * tokens * width * rank, rel=0.06)
