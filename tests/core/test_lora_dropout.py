"""Dropout on LoRA's input: who draws, how often, and with what statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.dropout import drop
from tests.helpers.marks import diagonal
from tests.helpers.reference import close, ints, normal, random_delta, same

N, RATE = 8, 0.25
KEY = jax.random.key(3)
METHOD = lj.lora(lj.select("**", axes={"stack": "sio"}), rank=N, dropout=RATE)


def seen(names=("w",)):
    """A base of zeros and A = B = 1, the identity matrix: the output is the dropped input itself."""
    params = {name: np.zeros((N, N), np.float32) for name in names}
    return params, identities(params)


def identities(params):
    return jax.tree.map(lambda x: np.broadcast_to(np.eye(N, dtype=x.dtype), x.shape), random_delta(METHOD, params))


def product(p, x):
    return x @ p["w"]


@jax.jit
def dropped(params, delta, key, x):
    """The product of x with one adapted weight."""
    return lj.lift(product)(METHOD.apply(params, delta, key=key), x)


@functools.cache
def drawn(rows: int, seed: int = 3) -> np.ndarray:
    return np.asarray(dropped(*seen(), jax.random.key(seed), np.ones((rows, N), np.float32)))


def test_statistics():
    kept = drawn(4000)
    np.testing.assert_allclose(np.unique(kept), [0.0, 1 / (1 - RATE)], rtol=1e-6)
    error = 5 * np.sqrt(RATE * (1 - RATE) / kept.size)
    assert abs(np.mean(kept == 0) - RATE) < error
    assert abs(kept.mean() - 1.0) < error / (1 - RATE)
    dropped = kept == 0
    assert np.all(np.abs(dropped.mean(0) - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / 4000))  # every feature
    pairs = np.mean(dropped[:, 0] & dropped[:, 1])  # features of a row are independent
    assert abs(pairs - RATE**2) < 0.03


@pytest.mark.parametrize(("rate", "dtype"), diagonal([0.0, 1e-6, 0.1, 0.5, 0.9999999], [jnp.float32, jnp.bfloat16]))
def test_any_rate_keeps_the_mean(rate, dtype):
    x = jax.jit(drop, static_argnums=2)(KEY, jnp.ones((301, 999), dtype), rate)
    kept = np.asarray(x, np.float32)
    assert x.dtype == dtype and np.isfinite(kept).all()
    if rate < 0.9:
        assert abs(np.mean(kept == 0) - rate) < 5 * np.sqrt(rate / kept.size) + 2**-16
        assert kept.mean() == pytest.approx(1.0, abs=0.01)


def test_another_key_draws_otherwise_and_the_same_key_the_same():
    assert not np.array_equal(drawn(50), drawn(50, seed=4))
    same(drawn(50), drawn.__wrapped__(50))


def test_padding_and_the_rows_behind_leave_a_text_its_draws():
    draws = jax.jit(lambda: [drop(jax.random.key(0), jnp.ones(shape), 0.5) for shape in ((3, 5, 7), (4, 9, 7))])
    drawn, longer = map(np.asarray, draws())
    same(longer[:3, :5], drawn)
    assert not (drawn[0] == drawn[1]).all() and not (drawn[0, 0] == drawn[0, 1]).all()


def test_without_a_key_or_without_a_rate_nothing_is_dropped():
    params, delta = seen()
    x = normal(5, N)
    lifted = lj.lift(product)
    never = lj.lora(lj.select("**"), rank=N)
    without_key, without_rate = jax.jit(
        lambda x: [lifted(METHOD.apply(params, delta), x), lifted(never.apply(params, delta, key=KEY), x)]
    )(x)
    close(without_key, x)
    close(without_rate, x)
    text = str(jax.make_jaxpr(lifted)(METHOD.apply(params, delta), x))
    assert "random" not in text and "threefry" not in text
    text = str(jax.make_jaxpr(lifted)(METHOD.apply(params, delta, key=KEY), x))
    assert "random" in text or "threefry" in text


def test_the_base_product_sees_the_whole_input():
    params = {"w": normal(N, N)}
    delta = jax.jit(METHOD.init)(jax.random.key(0), params)  # B is zero: no change whatever is dropped
    x = normal(5, N)
    close(dropped(params, delta, KEY, x), np.asarray(x) @ np.asarray(params["w"]), 1e-6)


def test_two_weights_draw_apart():
    params, delta = seen(("q", "v"))
    adapted = METHOD.apply(params, delta, key=KEY)
    q, v = jax.jit(lj.lift(lambda p, x: (x @ p["q"], x @ p["v"])))(adapted, np.ones((50, N), np.float32))
    agreeing = np.mean(np.asarray(q) == np.asarray(v))
    assert agreeing == pytest.approx(RATE**2 + (1 - RATE) ** 2, abs=0.12)


def test_a_weight_used_twice_draws_once():
    params, delta = seen()
    adapted = METHOD.apply(params, delta, key=KEY)
    once, again = jax.jit(lj.lift(lambda p, x: (x @ p["w"], (x * 1.0) @ p["w"])))(adapted, np.ones((20, N), np.float32))
    same(once, again)
    assert np.any(np.asarray(once) == 0)


def test_the_draw_does_not_depend_on_the_other_weights():
    params, delta = seen(("w", "other"))
    adapted = METHOD.apply(params, delta, key=KEY)
    both = jax.jit(lj.lift(lambda p, x: (x @ p["other"], x @ p["w"])))(adapted, np.ones((50, N), np.float32))
    close(both[1], drawn(50))


def test_stacked_layers_draw_apart():
    params = {"stack": np.zeros((3, N, N), np.float32)}
    delta = identities(params)

    def scanned(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["stack"])[1]

    def looped(p, x):
        return jnp.stack([x @ p["stack"][n] for n in range(3)])

    @jax.jit
    def run(delta):
        adapted = METHOD.apply(params, delta, key=KEY)
        return [lj.lift(fn)(adapted, jnp.ones((50, N))) for fn in (scanned, looped)]

    layers, one_by_one = map(np.asarray, run(delta))
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert 0.4 < np.mean(layers[i] == layers[j]) < 0.85
    close(one_by_one, layers)  # however the layers are reached


def test_remat_repeats_the_draw():
    params = {"w": normal(N, N), "v": normal(N, N)}
    delta = random_delta(METHOD, params)
    x = normal(5, N)

    def layer(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])

    def grads(fn, key):
        return jax.grad(lambda d: jnp.sum(fn(METHOD.apply(params, d, key=key), x)))

    lifted, of_remat, remat = lj.lift(layer), lj.lift(jax.checkpoint(layer)), jax.checkpoint(lj.lift(layer))
    run = jax.jit(lambda d: [grads(fn, KEY)(d) for fn in (lifted, of_remat, remat)] + [grads(lifted, None)(d)])
    plain, inside, outside, undropped = run(delta)
    close(inside, plain)
    close(outside, plain)
    assert not np.allclose(undropped["w"]["a"], plain["w"]["a"], rtol=0.01)


@pytest.mark.parametrize("shape", [(5, N), (2, 5, N), (N,)])
def test_the_gradient_is_that_of_the_function_with_the_drawn_mask(shape):
    """mask from an identity adapter, then a dense product by hand."""
    params, eye = seen()
    x = normal(*shape)
    delta = random_delta(METHOD, params)
    mask = np.asarray(dropped(params, eye, KEY, np.ones(shape, np.float32)))

    def mine(d, x):
        return jnp.sum(jnp.sin(dropped(params, d, KEY, x)))

    def by_hand(d, x):
        return jnp.sum(jnp.sin((x * mask) @ d["w"]["a"] @ d["w"]["b"]))

    close(*jax.jit(lambda d, x: [jax.grad(fn, (0, 1))(d, x) for fn in (mine, by_hand)])(delta, x))


def test_look_ups_draw_none():
    params = {"wte": {"embedding": normal(9, N)}}
    delta = random_delta(METHOD, params)
    ids = ints([[0, 3], [8, 3]])
    look_up = lj.lift(lambda p: p["wte"]["embedding"][ids])
    same(*jax.jit(lambda d: [look_up(METHOD.apply(params, d, key=key)) for key in (KEY, None)])(delta))


def test_a_vmapped_loss_over_keys_draws_for_each():
    params, delta = seen()
    run = jax.vmap(lambda key: dropped(params, delta, key, jnp.ones((20, N))))
    outs = jax.jit(lambda key: run(jax.random.split(key, 3)))(KEY)
    assert not np.array_equal(outs[0], outs[1])


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_rate_outside_zero_to_one_is_an_error(rate):
    with pytest.raises(ValueError, match="dropout"):
        lj.lora(lj.select("**"), rank=1, dropout=rate)
