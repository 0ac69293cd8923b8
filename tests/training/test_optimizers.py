"""The paper's optimizer against torch's, its schedule, and what it keeps state for."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax.training import optimizer, schedule
from tests.helpers.runs import model_and_params, run_config


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        yield


def options(**changes):
    config = run_config().optimizer
    config.learning_rate, config.warmup_steps = 2e-4, 500
    config.update(changes)
    return config


def rates(rate: Callable, *steps: int) -> np.ndarray:
    """Of these steps, as a training step asks for them: traced."""
    return np.asarray(jax.jit(jax.vmap(rate))(np.array(steps, np.int32)))


def test_linear_schedule() -> None:
    rate = schedule(options(), 26290)
    expected = 2e-4 * np.array([0, 1 / 500, 0.5, 1, 0.5, 0])
    np.testing.assert_allclose(rates(rate, 0, 1, 250, 500, 13395, 26290), expected, rtol=1e-5, atol=1e-10)


def test_other_schedules() -> None:
    cosine = schedule(options(schedule="cosine", final_share=0.02, warmup_steps=100), 1100)
    np.testing.assert_allclose(rates(cosine, 600, 1100), 2e-4 * np.array([0.02 + 0.98 / 2, 0.02]), rtol=1e-5)
    constant = schedule(options(schedule="constant", warmup_steps=0), 10)
    assert constant(0) == constant(9) == 2e-4
    with pytest.raises(ValueError, match="'linaer', not one of"):
        schedule(options(schedule="linaer"), 1000)


def test_a_run_shorter_than_its_warmup_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rate = schedule(options(), 100)
    assert "the peak rate is never reached" in caplog.text
    np.testing.assert_allclose(rates(rate, 100), 2e-4 / 5, rtol=1e-5)


def test_the_same_steps_as_torch() -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    start = random.normal(0, 1, (5, 3)).astype(np.float32)
    gradients = random.normal(0, 1, (12, 5, 3)).astype(np.float32)
    config = options(learning_rate=0.05, warmup_steps=4, weight_decay=0.1)
    rate = schedule(config, 12)
    of_steps = rates(rate, *range(12))

    theirs = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
    tx, ours = optimizer(config, rate), lj.Delta({"w": {"a": jnp.array(start)}})

    @jax.jit
    def update(gradient: jax.Array, state: Any, ours: lj.Delta) -> tuple[lj.Delta, Any]:
        updates, state = tx.update(lj.Delta({"w": {"a": gradient}}), state, ours)
        return optax.apply_updates(ours, updates), state

    state = jax.jit(tx.init)(ours)
    for lr, gradient in zip(of_steps, gradients, strict=True):
        adamw.param_groups[0]["lr"] = float(lr)
        theirs.grad = torch.tensor(gradient)
        adamw.step()
        ours, state = update(gradient, state, ours)
    assert np.abs(theirs.detach().numpy() - start).max() > 0.1
    np.testing.assert_allclose(ours["w"]["a"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_every_schedule_at_its_corners(name: str) -> None:
    """With a fraction of a warm-up step (25 * 0.1 = 2.5, rounded up), and an end that is not zero."""
    changes = {"schedule": name, "final_share": 0.3, "warmup_steps": None, "warmup_share": 0.1}
    rate = schedule(ConfigDict({**options().to_dict(), **changes}), 25)
    end = 1.0 if name == "constant" else 0.3
    expected = 2e-4 * np.array([0, 1 / 3, 2 / 3, 1, (1 + end) / 2, end, end])
    # step 14 is half-way between warm-up and end
    np.testing.assert_allclose(rates(rate, 0, 1, 2, 3, 14, 25, 40), expected, rtol=1e-5, atol=1e-12)
    given = schedule(options(schedule=name, warmup_steps=0, final_share=0.3), 10, peak=jnp.float32(1.0))
    np.testing.assert_allclose(rates(given, 0, 10), [1, end], rtol=1e-5)


def first_update(tx: Any, grads: lj.Delta, delta: lj.Delta) -> tuple[lj.Delta, Any]:
    """The first update and the state after it, in one program."""
    return jax.jit(lambda grads, delta: tx.update(grads, tx.init(delta), delta))(grads, delta)


def zeros(delta: lj.Delta) -> lj.Delta:
    return jax.tree.map(np.zeros_like, delta)


def one_update(delta: lj.Delta, grads: lj.Delta, spec: dict | None = None, **changes) -> lj.Delta:
    """The first update, whose size follows that of the gradient: Adam's eps is large."""
    config = options(warmup_steps=0, eps=1.0, **changes)
    tx = optimizer(config, schedule(config, 10), spec=spec)
    return first_update(tx, grads, delta)[0]


def test_a_long_gradient_is_scaled_to_the_bound() -> None:
    delta = lj.Delta({"v": {"a": np.ones(1, np.float32)}, "w": {"a": np.ones(1, np.float32)}})
    grads = lj.Delta({"v": {"a": np.array([6.0], np.float32)}, "w": {"a": np.array([-8.0], np.float32)}})  # norm 10
    clipped = one_update(delta, grads, clip_norm=1.0)
    expected = one_update(delta, jax.tree.map(lambda g: g / 10, grads))
    for ours, wanted, long in zip(*map(jax.tree.leaves, (clipped, expected, one_update(delta, grads))), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6)
        assert abs(long) > 1.5 * abs(wanted)


def test_the_ratio_of_lora_plus_is_that_of_loras_b_alone() -> None:
    lora, vera = (
        {"a": np.ones((3, 2), np.float32), "b": np.ones((2, 3), np.float32)},
        {"b": np.ones(3, np.float32), "d": np.ones(2, np.float32)},
    )
    delta = lj.Delta({"w": lora, "v": vera})
    grads = jax.tree.map(lambda x: np.float32(0.3) * x, delta)
    of = [{"method": "lora", "select": ["w"], "rank": 2}, {"method": "vera", "select": ["v"], "rank": 2}]
    spec = {"method": "chain", "of": of}
    plain, plus = (one_update(delta, grads, spec, b_ratio=ratio) for ratio in (1.0, 4.0))
    np.testing.assert_allclose(plus["w"]["b"], 4 * plain["w"]["b"], rtol=1e-6)
    for path, name in (("w", "a"), ("v", "b"), ("v", "d")):
        np.testing.assert_array_equal(plus[path][name], plain[path][name])
    assert all(leaf.all() for leaf in jax.tree.leaves(plain))


def test_a_decay_that_is_given_replaces_the_config_s() -> None:
    config = options(warmup_steps=0)
    delta = lj.Delta({"w": {"a": np.ones(3, np.float32)}})
    tx = optimizer(config, schedule(config, 10), weight_decay=jnp.float32(0.5))
    updates, _ = first_update(tx, zeros(delta), delta)
    np.testing.assert_allclose(updates["w"]["a"], -2e-4 * 0.5, rtol=1e-5)


def test_clipping_sees_what_trains_alone() -> None:
    config = options(warmup_steps=0, clip_norm=1.0)
    tx = optimizer(config, schedule(config, 10))
    ones = lj.Delta({"w": {"a": np.ones(3, np.float32), "fixed_b": np.ones(3, np.float32)}})
    grads = lj.Delta({"w": {"a": np.full(3, 0.1, np.float32), "fixed_b": np.full(3, 1e6, np.float32)}})
    updates, state = first_update(tx, grads, ones)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3,)]
    np.testing.assert_allclose(moments[0], 0.01, rtol=1e-4)  # 0.1 * 0.1: not clipped
    assert len(moments) == 2 and not updates["w"]["fixed_b"].any()


def test_decay_by_path() -> None:
    config = options(warmup_steps=0, decay=("**/{kernel,embedding}",))
    tx = optimizer(config, schedule(config, 10))
    delta = lj.Delta({p: {"value": np.ones((2, 2), np.float32)} for p in ("h/kernel", "h/bias")})
    updates, _ = first_update(tx, zeros(delta), delta)
    np.testing.assert_allclose(updates["h/kernel"]["value"], -2e-4 * 0.01, rtol=1e-5)
    assert not updates["h/bias"]["value"].any()


def test_no_state_for_the_base() -> None:
    _, params = model_and_params()
    method = lj.lora(lj.select("**/attn/{query,value}/kernel"), rank=2)
    delta = jax.eval_shape(method.init, jax.random.key(0), params)
    config = options(clip_norm=1.0)
    tx = optimizer(config, schedule(config, 1000))
    trained = sum(leaf.size for leaf in jax.tree.leaves(delta))
    for tree in (delta, {"base": params, "delta": delta}, jax.eval_shape(method.apply, params, delta)):
        sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tx.init, tree)) if leaf.ndim]
        assert sum(sizes) == 2 * trained
