"""float16: the loss is scaled, and a step that overflows is left out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.training import METRICS
from tests.helpers.runs import QV, model_and_params, run_config, schedule


def make(dtype: str) -> tuple[Any, Any, training.State, dict]:
    model, params = model_and_params(dtype=dtype)
    method = lj.from_spec({"method": "lora", **QV, "dropout": 0.0})
    config = run_config(**{"optimizer.warmup_steps": 0})
    rate = training.schedule(config.optimizer, 10)
    tx = training.optimizer(config.optimizer, rate, spec=method.spec)
    objective = training.language_model(model, config.label_smoothing)
    step = jax.jit(training.make_step(objective, method, tx, rate))
    state = jax.jit(lambda params: training.new_state(method, tx, params, jax.random.key(0), dtype=dtype))(params)
    batch = {n: jnp.array(x.reshape(2, -1, *x.shape[1:])) for n, x in schedule(4, buckets=1)(0)[0].items()}
    return step, params, state, batch


@pytest.fixture(autouse=True)
def free_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"):  # jax lowers products of mixed types so
        yield


def test_steps_are_those_of_float32() -> None:
    losses = {}
    for dtype in ("float32", "float16"):
        step, params, state, batch = make(dtype)
        assert (state.scaler is None) == (dtype == "float32")
        start = state.delta
        for _ in range(5):
            state = step(state, params, batch)
        losses[dtype] = dict(zip(METRICS, state.metrics, strict=True))["loss"]
        moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), start, state.delta)
        assert max(jax.tree.leaves(moved)) > 1e-3
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=1e-3)  # 11 bits a number


def test_an_overflow_halves_the_scale_and_changes_nothing_else() -> None:
    step, params, state, batch = make("float16")
    state = step(state, params, batch)
    huge = state._replace(scaler=state.scaler.replace(scale=jnp.float32(2.0**120)))
    after = step(huge, params, batch)
    assert after.scaler.scale == 2.0**118  # two micro-batches
    before = state.delta, state.optimizer
    jax.tree.map(np.testing.assert_array_equal, before, (after.delta, after.optimizer))
    metrics = dict(zip(METRICS, np.asarray(after.metrics), strict=True))
    assert metrics["bad_step"] == 0 and np.isfinite(metrics["gradient_norm"]) and after.step == 2


def test_what_no_scale_mends_is_a_bad_step() -> None:
    step, params, state, batch = make("float16")
    small = state._replace(scaler=state.scaler.replace(scale=jnp.float32(2.0**-3)))
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), small.delta)
    metrics = dict(zip(METRICS, np.asarray(step(small._replace(delta=broken), params, batch).metrics), strict=True))
    assert metrics["bad_step"] == 1
