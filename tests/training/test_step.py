"""One step: micro-batches are one big batch, the delta stays float32, nothing else moves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import lora_jax as lj
from lora_jax import training
from lora_jax.methods.bank import take
from lora_jax.training import METRICS, State
from lora_jax.training.step import make_validation
from tests.helpers.runs import QV, VOCAB, equal_bits, model_and_params, run_config, schedule

pytestmark = pytest.mark.usefixtures("logits_in_pieces")


def make(method: lj.ParamTransform, model: Any, params: Any, **changes: Any) -> tuple[Any, State]:
    config = run_config(**{"optimizer.warmup_steps": 0} | changes)
    rate = training.schedule(config.optimizer, 10)
    tx = training.optimizer(config.optimizer, rate, spec=method.spec)
    objective = training.language_model(model, config.label_smoothing)
    step = jax.jit(training.make_step(objective, method, tx, rate))
    fresh = jax.jit(lambda params: training.new_state(method, tx, params, jax.random.key(0)))
    return step, fresh(params)


def stacked(batch: dict, parts: int) -> dict:
    return {n: jnp.array(x.reshape(parts, -1, *x.shape[1:])) for n, x in batch.items()}


def test_micro_batches_are_one_big_batch() -> None:
    """Also where their labels are unequal: one has 1, one has none."""
    model, params = model_and_params()
    method = lj.from_spec({"method": "lora", **QV, "dropout": 0.0})
    step, state = make(method, model, params)
    batch = schedule(8, batch_size=8, buckets=1)(0)[0]
    batch["weights"][:4] = 0
    batch["weights"][3, 0] = 1
    one, four = (step(state, params, stacked(batch, parts)) for parts in (1, 4))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-7)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), state.delta, one.delta)
    assert max(jax.tree.leaves(moved)) > 1e-3
    metrics = dict(zip(METRICS, np.asarray(four.metrics), strict=True))
    assert metrics["labels"] == batch["weights"].sum()
    assert metrics["real_tokens"] == batch["mask"].sum()
    assert metrics["tokens"] == batch["mask"].size


def test_dropout_draws_anew_each_step_and_each_micro_batch() -> None:
    model, params = model_and_params()
    step, state = make(lj.from_spec({"method": "lora", **QV, "dropout": 0.5}), model, params)
    state = state._replace(delta=jax.tree.map(lambda x: x + 0.3, state.delta))
    batch = {n: np.repeat(x[:1], 4, 0) for n, x in schedule(4, buckets=1)(0)[0].items()}
    half = {n: x[:2] for n, x in batch.items()}

    def loss(state: State, batch: dict, parts: int = 1) -> float:
        return float(step(state, params, stacked(batch, parts)).metrics[0])

    assert loss(state, half) == loss(state, half)
    later = state._replace(step=state.step + 1)
    assert loss(state, half) != loss(later, half)
    other = state._replace(key=jax.random.key_data(jax.random.key(9)))
    assert loss(state, half) != loss(other, half)
    # all four rows are equal: equal draws in both halves would give twice the loss
    assert loss(state, batch, 2) != 2 * loss(state, half)


@pytest.mark.parametrize("spec", [{"method": "lora", **QV}, {"method": "tune", "select": ["**"]}], ids=["lora", "tune"])
def test_bfloat16_computes_and_float32_trains(spec: dict) -> None:
    model, params = model_and_params(dtype="bfloat16")
    step, state = make(lj.from_spec(spec), model, params)
    with jax.numpy_dtype_promotion("standard"):  # jax lowers products of mixed types so
        new = step(state, params, stacked(schedule(4, buckets=1)(0)[0], 2))
    loss, labels = np.asarray(new.metrics)[:2]
    np.testing.assert_allclose(loss / labels, np.log(VOCAB), rtol=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(new.delta)} == {jnp.dtype("float32")}
    assert {x.dtype.name for x in jax.tree.leaves(new.optimizer)} == {"float32", "int32"}
    forward = training.language_model(model).forward
    batch = {n: jnp.array(x) for n, x in schedule(4, buckets=1)(0)[0].items()}
    assert "bf16[" in str(jax.make_jaxpr(forward)(params, batch))


def test_fixed_factors_stay_and_the_first_bad_step_is_kept() -> None:
    model, params = model_and_params()
    inner = lj.from_spec({"method": "lora", **QV})

    def init(key: Any, params: Any) -> lj.Delta:
        delta = inner.init(key, params)
        return lj.Delta({path: {**f, "fixed_c": jnp.ones(2)} for path, f in delta.items()})

    def apply(params: Any, delta: lj.Delta, **options: Any) -> Any:
        plain = {path: {n: f[n] for n in ("a", "b")} for path, f in delta.items()}
        return inner.apply(params, lj.Delta(plain), **options)

    step, state = make(lj.ParamTransform(init, apply, {}), model, params)
    batch = stacked(schedule(4, buckets=1)(0)[0], 1)
    good = step(state, params, batch)
    assert good.metrics[METRICS.index("bad_step")] == 0
    for path, factors in good.delta.items():
        assert equal_bits(factors["fixed_c"], jnp.ones(2))
        assert not equal_bits(factors["b"], state.delta[path]["b"])
    broken = dict(batch, weights=batch["weights"] * jnp.nan)
    bad = step(step(good, params, broken), params, batch)
    assert bad.metrics[METRICS.index("bad_step")] == 2


def test_what_is_logged_of_each_step() -> None:
    """Sums over two micro-batches, the norm of the gradient and the rate that the step used, of a loss by hand."""

    def loss(params: Any, batch: dict, key: Any = None) -> Any:
        return jnp.sum(batch["x"] @ params["w"]), jnp.sum(batch["weights"])

    rate = optax.linear_schedule(0.5, 0.0, 5)
    method = lj.tune(lj.select("w"))
    objective = training.Objective(loss, lambda params, *rest: loss(lj.merge(params), *rest), loss)
    step = jax.jit(training.make_step(objective, method, optax.sgd(rate), rate))
    params = {"w": jnp.array([1.0, 2.0])}
    state = training.new_state(method, optax.sgd(rate), params, jax.random.key(0))
    random, w, total = np.random.default_rng(0), np.array([1.0, 2.0]), np.zeros(4)
    for done in range(3):
        mask = random.random((2, 3, 4)) < 0.7
        x, weights = random.normal(size=(2, 3, 2)).astype(np.float32), np.array([[1, 0, 1], [1, 1, 1]], np.float32)
        gradient = x.sum((0, 1)) / 5
        state = step(state, params, {"tokens": mask.astype(np.int32), "mask": mask, "x": x, "weights": weights})
        total += [5 * float(w @ gradient), 5, mask.size, mask.sum()]
        w = w - (0.5 - 0.1 * done) * gradient
        expected = [*total, np.linalg.norm(gradient), 0.5 - 0.1 * done, 0]
        np.testing.assert_allclose(state.metrics, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.delta["w"]["value"], w, rtol=1e-5)


@pytest.mark.parametrize(("scale", "bad"), [(None, 1), (1024.0, 0), (0.5, 1)])
def test_a_gradient_that_is_not_finite_is_a_bad_step_though_the_loss_is(scale: float | None, bad: int) -> None:
    """In float16 only where the loss is not scaled up any more: else the step is left out, and the scale halved."""

    def loss(params: Any, batch: dict, key: Any = None) -> Any:
        return jnp.sum(jnp.sqrt(lj.merge(params)["w"])), jnp.ones(())

    method, rate = lj.tune(lj.select("w")), optax.constant_schedule(0.1)
    step = jax.jit(training.make_step(training.Objective(loss, loss, loss), method, optax.sgd(rate), rate))
    state = training.new_state(method, optax.sgd(rate), params := {"w": jnp.zeros(2)}, jax.random.key(0))
    if scale is not None:
        state = state._replace(scaler=DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(scale)))
    new = step(state, params, {"tokens": jnp.zeros((1, 1)), "mask": jnp.ones((1, 1), bool)})
    assert new.metrics[METRICS.index("loss")] == 0 and new.metrics[METRICS.index("bad_step")] == bad
    if new.scaler is not None:
        assert new.scaler.scale == scale / 2 and equal_bits(new.delta, state.delta)


def test_validation_draws_no_dropout_and_smooths_nothing() -> None:
    model, params = model_and_params()
    batch = {name: jnp.asarray(x) for name, x in schedule(4, buckets=1)(0)[0].items()}
    totals = []
    for dropout, smoothing in ((0.0, 0.0), (0.5, 0.2)):
        method = lj.from_spec({"method": "lora", **QV, "dropout": dropout})
        delta = jax.jit(method.init)(jax.random.key(0), params)
        delta = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.3), delta)
        validate = jax.jit(make_validation(training.language_model(model, smoothing), method))
        totals.append(np.asarray(validate(jnp.ones(2), delta, params, batch)[0]))
    np.testing.assert_allclose(totals[1], totals[0], rtol=1e-6)
    assert totals[0][1] == 1 + batch["weights"].sum()


def test_a_mixed_batch_trains_each_row_with_its_own_adapter() -> None:
    """A step of a bank is the steps of its adapters on their own rows, where the labels of each count the same."""
    model, params = model_and_params()
    lora = lj.from_spec({"method": "lora", **QV, "dropout": 0.0})
    bank = lj.bank([lora, lora])
    config = run_config()
    rate = training.schedule(config.optimizer, 10)
    tx = optax.scale(-1.0)  # a plain sum of gradients, so that what a row's labels are divided by can be undone
    objective = training.language_model(model)
    batch = schedule(4, batch_size=4, buckets=1)(0)[0]
    ids = np.array([1, 0, -1, 1], np.int32)
    start = training.new_state(bank, tx, params, jax.random.key(0))
    start = start._replace(delta=jax.tree.map(lambda x: x + 0.1, start.delta))

    def step(method: Any, delta: Any, batch: dict) -> Any:
        state = start._replace(delta=delta, optimizer=tx.init(delta))
        micro = {name: jnp.asarray(x)[None] for name, x in batch.items()}
        return jax.jit(training.make_step(objective, method, tx, rate))(state, params, micro)

    mixed = step(bank, start.delta, batch | {"strength": ids})
    labels = float(batch["weights"].sum())
    for k in (0, 1):
        adapter_batch = batch | {"weights": batch["weights"] * np.float32(ids == k)[:, None]}
        alone = step(lora, take(start.delta, k), adapter_batch)
        share = float(adapter_batch["weights"].sum()) / labels
        got, before, want = (take(mixed.delta, k), take(start.delta, k), alone.delta)
        for a, b, c in zip(*map(jax.tree.leaves, (got, before, want)), strict=True):
            np.testing.assert_allclose(a - b, (c - b) * share, rtol=0, atol=1e-6)
    assert float(mixed.metrics[1]) == labels
