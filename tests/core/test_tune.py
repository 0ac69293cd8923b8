"""tune: the selected leaves themselves train; one copy of them in memory."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from tests.helpers.networks import Stack, started
from tests.helpers.reference import close, filled, normal, random_delta, same

KEY = jax.random.key(0)
X = normal(4, 8, seed=5)
PARAMS = {"w": normal(8, 6, seed=1), "b": normal(6, seed=2), "v": normal(6, 3, seed=3), "n": jnp.int32(7)}
TUNE = lj.tune(lj.select("{w,b}"))
BOTH = lj.chain(lj.lora(lj.select("v"), rank=2), TUNE)


def net(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]


@pytest.mark.parametrize("method", [TUNE, BOTH], ids=["tune", "chain"])
def test_init_then_apply_is_the_base_function_bit_for_bit(method):
    adapted = method.apply(PARAMS, method.init(KEY, PARAMS))
    assert isinstance(adapted["w"], lj.Tuned) and isinstance(adapted["b"], lj.Tuned)
    lifted = lj.lift(net, on_dense="error")
    same(*jax.jit(lambda adapted, params: (lifted(adapted, X), net(params, X)))(adapted, PARAMS))
    same(lj.merge(adapted), PARAMS)


def test_the_delta_holds_copies():
    delta = TUNE.init(KEY, PARAMS)
    assert set(delta) == {"w", "b"} and set(delta["w"]) == {"value"}
    same(delta["w"]["value"], PARAMS["w"])
    assert delta["w"]["value"].unsafe_buffer_pointer() != PARAMS["w"].unsafe_buffer_pointer()
    step = jax.jit(lambda d: jax.tree.map(lambda leaf: leaf + 1, d), donate_argnums=0)
    step(delta)
    assert np.isfinite(np.asarray(PARAMS["w"])).all()  # donating the delta leaves the base


@pytest.mark.parametrize("method", [TUNE, BOTH], ids=["tune", "chain"])
def test_values_and_gradients(method):
    delta = random_delta(method, PARAMS)

    def loss(d):
        return jnp.sum(lj.lift(net, on_dense="error")(method.apply(PARAMS, d), X) ** 2)

    def by_hand(d):
        v = PARAMS["v"] + d["v"]["a"] @ d["v"]["b"] if "v" in d else PARAMS["v"]
        return jnp.sum(net({"w": d["w"]["value"], "b": d["b"]["value"], "v": v}, X) ** 2)

    @jax.jit
    def run(delta):
        adapted = method.apply(PARAMS, delta)
        outputs = net(lj.merge(adapted), X), lj.lift(net)(adapted, X)
        return outputs, [jax.value_and_grad(fn)(delta) for fn in (loss, by_hand)]

    outputs, measured = run(delta)
    close(*outputs)
    close(*measured, 1e-5)
    same(lj.merge(method.apply(PARAMS, delta))["w"], delta["w"]["value"])


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("method", [TUNE, BOTH], ids=["tune", "chain"])
def test_strength(strength, method):
    delta = random_delta(method, PARAMS)
    merged = lj.merge(method.apply(PARAMS, delta, strength=strength))
    traced = jax.jit(lambda s: lj.merge(method.apply(PARAMS, delta, strength=s)))(strength)
    for name in ("w", "b"):
        base = np.asarray(PARAMS[name])
        want = base + np.float32(strength) * (np.asarray(delta[name]["value"]) - base)
        close(merged[name], want, 1e-6)
        close(traced[name], want, 1e-6)
    if strength == 0.0:
        same(merged, PARAMS)
    if strength == 1.0:
        same({n: merged[n] for n in "wb"}, {n: delta[n]["value"] for n in "wb"})


@pytest.mark.parametrize("method", [TUNE, BOTH], ids=["tune", "chain"])
def test_without_tuned_keeps_one_copy(method):
    delta = random_delta(method, PARAMS)
    rest = lj.without_tuned(PARAMS, delta)
    assert isinstance(rest["w"], lj.Absent)
    assert (tuple(rest["w"].shape), rest["w"].dtype) == ((8, 6), jnp.float32)
    assert rest["v"] is PARAMS["v"]
    assert len(jax.tree.leaves(rest)) == 2  # v and n: Absent has no buffer
    want = method.apply(PARAMS, delta)
    same(method.apply(rest, delta), want)
    key = jax.random.key(1)
    run = jax.jit(lambda rest, d, x: (lj.lift(net)(method.apply(rest, d, key=key), x), net(lj.merge(want), x)))
    close(*run(rest, delta, X))
    assert lj.without_tuned(rest, delta) == rest or jax.tree.structure(
        lj.without_tuned(rest, delta)
    ) == jax.tree.structure(rest)


def test_absent_is_static():
    delta = TUNE.init(KEY, PARAMS)
    rest = lj.without_tuned(PARAMS, delta)
    traces = []

    @jax.jit
    def run(rest, d):
        traces.append(1)
        return lj.lift(net)(TUNE.apply(rest, d), X)

    run(rest, delta)
    run(lj.without_tuned(PARAMS, delta), filled(delta))
    assert len(traces) == 1
    hash(rest["w"])
    assert jax.tree.structure(rest) == jax.tree.structure(lj.without_tuned(PARAMS, delta))


def test_selection_and_check_understand_absent():
    delta = BOTH.init(KEY, PARAMS)
    rest = lj.without_tuned(PARAMS, delta)
    assert set(lj.select("{w,b}")(rest)) == {"w", "b"}
    report = lj.check(TUNE, PARAMS)
    assert report.trained == 48 + 6 and report.total == 48 + 6 + 18 + 1


def test_a_strength_that_needs_the_base_raises_without_it():
    delta = TUNE.init(KEY, PARAMS)
    rest = lj.without_tuned(PARAMS, delta)
    with pytest.raises(ValueError, match=r"w|b"):
        TUNE.apply(rest, delta, strength=0.5)
    with pytest.raises(ValueError, match=r"w|b"):
        TUNE.init(KEY, rest)


def test_layers_of_a_stack():
    """The chosen layers train and no other, or it is an error that says so."""
    params = {"h": {"w": normal(3, 4, 5)}}
    method = lj.tune(lj.select("h/w", axes="sio", layers=[1]))
    try:
        delta = method.init(KEY, params)
    except ValueError as error:
        assert "h/w" in str(error) and "layers" in str(error)
        return
    assert delta["h/w"]["value"].shape == (1, 4, 5)
    merged = lj.merge(method.apply(params, filled(delta)))["h"]["w"]
    same(merged[::2], params["h"]["w"][::2])
    assert not np.allclose(merged[1], params["h"]["w"][1])


def test_absent_where_a_weight_was_needed_says_so():
    delta = TUNE.init(KEY, PARAMS)
    rest = lj.without_tuned(PARAMS, delta)
    with pytest.raises((TypeError, ValueError)):
        lj.lift(net)(rest, X)


def test_dtypes_and_integers_stay():
    params = {"half": np.asarray(normal(4)).astype(jnp.bfloat16), "ids": np.arange(3)}
    method = lj.tune(lj.select("**"))
    delta = method.init(KEY, params)
    assert set(delta) == {"half"} and delta["half"]["value"].dtype == jnp.float32  # small updates are kept
    same(lj.merge(method.apply(params, delta)), params)
    moved = jax.tree.map(lambda x: x + 2.0**-12, delta)
    assert jnp.all(moved["half"]["value"] != delta["half"]["value"])
    assert lj.merge(method.apply(params, moved))["half"].dtype == jnp.bfloat16


@pytest.mark.parametrize("scan", [False, True])
def test_full_fine_tuning_of_flax_models(scan):
    model = Stack(scan=scan, remat=True)
    params = started(model, X)
    method = lj.tune(lj.select("**"))
    delta = random_delta(method, params)
    assert sum(leaf.size for leaf in jax.tree.leaves(delta)) == sum(p.size for p in jax.tree.leaves(params))
    merged = lj.merge(method.apply(params, delta))
    rest = lj.without_tuned(params, delta)
    assert not jax.tree.leaves(rest)

    def loss(apply, put):
        return lambda d: jnp.sum(apply({"params": put(d)}, X) ** 2)

    lifted = loss(lj.lift(model.apply, on_dense="error"), lambda d: method.apply(rest, d))
    plain = loss(model.apply, lambda p: p)
    got, want = jax.jit(lambda d, p: (jax.value_and_grad(lifted)(d), jax.value_and_grad(plain)(p)))(delta, merged)
    close(got[0], want[0])
    grads = lj.merge(method.apply(params, got[1]))  # back in the tree's form
    close(grads, want[1], 2e-5)


def test_nnx_and_equinox():
    state = nnx.split(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))[1]
    method = lj.tune(lj.select("bias"))
    same(lj.merge(method.apply(state, method.init(KEY, state))), state)
    linear = eqx.nn.Linear(8, 6, key=KEY)
    delta = random_delta(method, linear)
    out = lj.lift(lambda m, x: m(x))(method.apply(linear, delta), X[0])
    close(out, np.asarray(linear.weight) @ np.asarray(X)[0] + np.asarray(delta["bias"]["value"]))


def test_an_unlifted_function_says_so():
    adapted = TUNE.apply(PARAMS, TUNE.init(KEY, PARAMS))
    with pytest.raises(TypeError, match=r"w.*lora_jax\.lift"):
        net(adapted, X)
    dense = nn.Dense(6)
    params = started(dense, X)
    method = lj.tune(lj.select("**"))
    with pytest.raises(TypeError, match=r"lora_jax\.lift"):
        dense.apply({"params": method.apply(params, method.init(KEY, params))}, X)
