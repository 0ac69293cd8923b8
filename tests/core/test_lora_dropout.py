"""Dropout on LoRA's input: who draws, how often, and with what statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.dropout import drop
from tests.helpers.reference import close, filled, normal, same

N, RATE = 8, 0.25
KEY = jax.random.key(3)
METHOD = lj.lora(lj.select("**", axes={"stack": "sio"}), rank=N, dropout=RATE)


def seen(names=("w",)):
    """A base of zeros and A = B = 1, the identity matrix: the output is the dropped input itself."""
    params = {name: jnp.zeros((N, N)) for name in names}
    delta = METHOD.init(jax.random.key(0), params)
    return params, jax.tree.map(lambda _: jnp.eye(N), delta)


@functools.cache
def drawn(rows: int, seed: int = 3) -> np.ndarray:
    params, delta = seen()
    adapted = METHOD.apply(params, delta, key=jax.random.key(seed))
    return np.asarray(jax.jit(lj.lift(lambda p, x: x @ p["w"]))(adapted, jnp.ones((rows, N))))


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


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.1, 0.5, 0.9999999])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_rate_keeps_the_mean(rate, dtype):
    x = jax.jit(drop, static_argnums=2)(KEY, jnp.ones((301, 999), dtype), rate)
    kept = np.asarray(x, np.float32)
    assert x.dtype == dtype and np.isfinite(kept).all()
    if rate < 0.9:
        assert abs(np.mean(kept == 0) - rate) < 5 * np.sqrt(rate / kept.size) + 2**-16
        assert kept.mean() == pytest.approx(1.0, abs=0.01)


def test_another_key_draws_otherwise_and_the_same_key_the_same():
    assert not np.array_equal(drawn(50), drawn(50, seed=4))
    same(jnp.asarray(drawn(50)), jnp.asarray(drawn.__wrapped__(50)))


def test_padding_and_the_rows_behind_leave_a_text_its_draws():
    x = jnp.ones((3, 5, 7))
    drawn = drop(jax.random.key(0), x, 0.5)
    same(drop(jax.random.key(0), jnp.ones((4, 9, 7)), 0.5)[:3, :5], drawn)
    assert not (drawn[0] == drawn[1]).all() and not (drawn[0, 0] == drawn[0, 1]).all()


def test_without_a_key_or_without_a_rate_nothing_is_dropped():
    params, delta = seen()
    x = normal(5, N)
    product = lj.lift(lambda p, x: x @ p["w"])
    close(product(METHOD.apply(params, delta), x), x)
    never = lj.lora(lj.select("**"), rank=N)
    close(product(never.apply(params, delta, key=KEY), x), x)
    text = str(jax.make_jaxpr(product)(METHOD.apply(params, delta), x))
    assert "random" not in text and "threefry" not in text
    text = str(jax.make_jaxpr(product)(METHOD.apply(params, delta, key=KEY), x))
    assert "random" in text or "threefry" in text


def test_the_base_product_sees_the_whole_input():
    params = {"w": normal(N, N)}
    delta = METHOD.init(jax.random.key(0), params)  # B is zero: no change whatever is dropped
    x = normal(5, N)
    close(lj.lift(lambda p, x: x @ p["w"])(METHOD.apply(params, delta, key=KEY), x), x @ params["w"], 1e-6)


def test_two_weights_draw_apart():
    params, delta = seen(("q", "v"))
    adapted = METHOD.apply(params, delta, key=KEY)
    q, v = lj.lift(lambda p, x: (x @ p["q"], x @ p["v"]))(adapted, jnp.ones((50, N)))
    agreeing = np.mean(np.asarray(q == v))
    assert agreeing == pytest.approx(RATE**2 + (1 - RATE) ** 2, abs=0.12)


def test_a_weight_used_twice_draws_once():
    params, delta = seen()
    adapted = METHOD.apply(params, delta, key=KEY)
    x = jnp.ones((20, N))
    once, again = lj.lift(lambda p, x: (x @ p["w"], (x * 1.0) @ p["w"]))(adapted, x)
    same(once, again)
    assert np.any(np.asarray(once) == 0)


def test_the_draw_does_not_depend_on_the_other_weights():
    params, delta = seen(("w", "other"))
    adapted = METHOD.apply(params, delta, key=KEY)
    both = lj.lift(lambda p, x: (x @ p["other"], x @ p["w"]))(adapted, jnp.ones((50, N)))[1]
    close(both, jnp.asarray(drawn(50)))


def test_stacked_layers_draw_apart():
    params = {"stack": jnp.zeros((3, N, N))}
    delta = jax.tree.map(lambda leaf: jnp.stack([jnp.eye(N)] * 3), METHOD.init(KEY, params))
    adapted = METHOD.apply(params, delta, key=KEY)
    x = jnp.ones((50, N))

    def scanned(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["stack"])[1]

    layers = lj.lift(scanned)(adapted, x)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert 0.4 < np.mean(np.asarray(layers[i] == layers[j])) < 0.85
    looped = lj.lift(lambda p, x: jnp.stack([x @ p["stack"][n] for n in range(3)]))(adapted, x)
    close(looped, layers)  # however the layers are reached


def test_remat_repeats_the_draw():
    params = {"w": normal(N, N), "v": normal(N, N)}
    delta = filled(METHOD.init(jax.random.key(0), params))
    x = normal(5, N)

    def layer(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])

    def grads(fn):
        return jax.grad(lambda d: jnp.sum(fn(METHOD.apply(params, d, key=KEY), x)))(delta)

    plain = grads(lj.lift(layer))
    close(grads(lj.lift(jax.checkpoint(layer))), plain)
    close(grads(jax.checkpoint(lj.lift(layer))), plain)
    undropped = jax.grad(lambda d: jnp.sum(lj.lift(layer)(METHOD.apply(params, d), x)))(delta)
    assert not np.allclose(undropped["w"]["a"], plain["w"]["a"], rtol=0.01)


@pytest.mark.parametrize("shape", [(5, N), (2, 5, N), (N,)])
def test_the_gradient_is_that_of_the_function_with_the_drawn_mask(shape):
    """mask from an identity adapter, then a dense product by hand."""
    params, eye = seen()
    x = normal(*shape)
    delta = filled(METHOD.init(jax.random.key(0), params))
    product = lj.lift(lambda p, x: x @ p["w"])
    mask = product(METHOD.apply(params, eye, key=KEY), jnp.ones(shape))

    def mine(d, x):
        return jnp.sum(jnp.sin(product(METHOD.apply(params, d, key=KEY), x)))

    def by_hand(d, x):
        return jnp.sum(jnp.sin((x * mask) @ d["w"]["a"] @ d["w"]["b"]))

    close(jax.grad(mine, (0, 1))(delta, x), jax.grad(by_hand, (0, 1))(delta, x))


def test_look_ups_draw_none():
    params = {"wte": {"embedding": normal(9, N)}}
    delta = filled(METHOD.init(KEY, params))
    ids = jnp.array([[0, 3], [8, 3]])
    look_up = lj.lift(lambda p, ids: p["wte"]["embedding"][ids])
    same(look_up(METHOD.apply(params, delta, key=KEY), ids), look_up(METHOD.apply(params, delta), ids))


def test_a_vmapped_loss_over_keys_draws_for_each():
    params, delta = seen()
    run = jax.vmap(lambda k: lj.lift(lambda p, x: x @ p["w"])(METHOD.apply(params, delta, key=k), jnp.ones((20, N))))
    outs = run(jax.random.split(KEY, 3))
    assert not np.array_equal(outs[0], outs[1])


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_rate_outside_zero_to_one_is_an_error(rate):
    with pytest.raises(ValueError, match="dropout"):
        lj.lora(lj.select("**"), rank=1, dropout=rate)
