"""What is always true, over every method: section 6 of the design, items 1 to 5 and 10 (counts: test_check)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.core import transforms
from lora_jax.methods.bias_delta import bias_delta
from tests.helpers.marks import slow_but
from tests.helpers.networks import Stack, stacked, started
from tests.helpers.reference import close, digest, leaves, normal, random_delta, same

KEY = jax.random.key(0)
X = normal(4, 8, seed=5)
MODEL = Stack(layers=2)
PARAMS = started(MODEL, X)
KERNELS = lj.select("**/kernel")
METHODS = {
    "lora": lj.lora(KERNELS, rank=2, alpha=3),
    "lora, options": lj.lora(
        lj.select("**/kernel", exclude="h_0/down/*"),
        rank={"**/up/*": 3, "**": 1},
        alpha=4,
        a_init="gaussian",
        scale_rule="alpha/sqrt(r)",
        dropout=0.1,
    ),
    "lora, one layer": lj.lora(lj.select("**/kernel", layers=[1]), rank=2),
    "tune": lj.tune(lj.select("**")),
    "bitfit": lj.tune(lj.select("**/bias")),
    "chain": lj.chain(lj.lora(lj.select("**/up/kernel"), rank=2), lj.tune(lj.select("**/bias"))),
    "lora, shared": lj.lora(KERNELS, rank=2, dropout=0.1, shared="**/up/kernel"),
    "dora": lj.dora(KERNELS, rank=2, alpha=3, dropout=0.1),
    "pissa": lj.pissa(KERNELS, rank=2, alpha=3),
    "shift": bias_delta(lj.select("**/bias"), scale={"**/up/*": 2.0, "**": -0.5}),
    "ia3": lj.ia3(KERNELS, feedforward="**/down/*"),
    "vera": lj.vera(KERNELS, rank=5),
    "lokr": lj.lokr(KERNELS, rank=1, alpha=3, decompose_both=True),
}
over_methods = pytest.mark.parametrize("name", METHODS)
# The two that are another choice of leaves of a method above are slow.
over_kinds = pytest.mark.parametrize("name", slow_but(METHODS, *(METHODS.keys() - {"lora, one layer", "bitfit"})))
lifted = lj.lift(lambda params, x: MODEL.apply({"params": params}, x), on_dense="error")


@jax.jit
def base(params, x):
    return MODEL.apply({"params": params}, x)


@functools.cache
def initial(name):
    """The first delta of a method, made in one program."""
    return jax.jit(lambda key, params: METHODS[name].init(key, params))(KEY, PARAMS)


@functools.cache
def program(name):
    """A delta of a method -> (the lifted function's output, merged params), compiled once."""

    def run(params, delta, x):
        adapted = METHODS[name].apply(params, delta)
        return lifted(adapted, x), lj.merge(adapted)

    return jax.jit(run)


@functools.cache
def gradient(name):
    """A delta of a method -> (gradients of the sum of squares, output), compiled once."""

    def loss(delta):
        out = lifted(METHODS[name].apply(PARAMS, delta), X)
        return jnp.sum(out**2), out

    return jax.jit(jax.grad(loss, has_aux=True))


def stacked_leaves(*trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def many(name, count):
    """Different deltas, stacked."""
    deltas = [random_delta(METHODS[name], PARAMS, seed) for seed in range(count)]
    return deltas, stacked_leaves(*deltas)


@over_kinds
def test_1_the_base_is_unchanged_by_training_merging_and_switching(name):
    method, before = METHODS[name], digest(PARAMS)
    first = delta = initial(name)
    tx = lj.freeze_base(optax.adam(0.1))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(tx.init, delta))

    @jax.jit
    def step(delta, state, n):
        key = jax.random.fold_in(KEY, n)
        loss, grads = jax.value_and_grad(lambda d: jnp.mean((lifted(method.apply(PARAMS, d, key=key), X) - 1.0) ** 2))(
            delta
        )
        updates, state = tx.update(grads, state, delta)
        return optax.apply_updates(delta, updates), state, loss

    losses = []
    for n in range(8):
        delta, state, loss = step(delta, state, n)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for other in (delta, first, delta):
        program(name)(PARAMS, other, X)
    assert digest(PARAMS) == before


@pytest.mark.parametrize("name", ["chain", "dora", "lora, shared"])
def test_1_the_base_is_unchanged_by_merging_out_of_jit(name):
    before = digest(PARAMS)
    lj.merge(METHODS[name].apply(PARAMS, random_delta(METHODS[name], PARAMS)))
    assert digest(PARAMS) == before


@over_methods
def test_2_init_then_apply_is_the_base_function(name):
    out, weights = program(name)(PARAMS, initial(name), X)
    same(out, base(PARAMS, X))
    same(weights, PARAMS)


@over_methods
def test_3_lifted_equals_merged(name):
    out, weights = program(name)(PARAMS, random_delta(METHODS[name], PARAMS), X)
    avals = [jax.tree.map(jax.typeof, params) for params in (weights, PARAMS)]
    assert avals[0] == avals[1]  # the base's program, at its speed
    close(out, base(weights, X))
    assert np.max(np.abs(out - base(PARAMS, X))) > 0.01


@over_kinds
def test_4_vmap_over_deltas_equals_a_loop(name):
    """With one batch for all, and with an example of its own for every delta."""
    deltas, together = many(name, 4)

    @jax.jit
    def run(deltas):
        own_outputs = jax.vmap(lambda d, x: lifted(METHODS[name].apply(PARAMS, d), x[None])[0])(deltas, X)
        return jax.vmap(gradient(name).__wrapped__)(deltas), own_outputs

    (grads, out), own_outputs = run(together)
    want_grads, want = stacked_leaves(*map(gradient(name), deltas))
    close(out, want)
    close(grads, want_grads, 2e-5)
    close(own_outputs, np.stack([want[n, n] for n in range(4)]))


def test_4_stacked_deltas_share_one_base():
    """The base is not repeated for every delta."""
    method = METHODS["lora"]
    _, together = many("lora", 3)
    compiled = jax.jit(jax.vmap(lambda d: lifted(method.apply(PARAMS, d), X))).lower(together).as_text()
    assert "tensor<3x8x16xf32>" not in compiled  # 3 copies of an up kernel


@over_methods
def test_5_a_spec_gives_the_same_arrays(name):
    """And so does the method, traced a second time: keys of dropout too."""
    method = METHODS[name]
    again = lj.from_spec(json.loads(json.dumps(method.spec)))

    @jax.jit
    def run(key, params, delta):
        return [(m.init(key, params), m.apply(params, delta, key=key)) for m in (method, again)]

    here, there = run(KEY, PARAMS, random_delta(method, PARAMS))
    same(here[0], initial(name))
    same(there, here)


def in_scanned_layout(delta):
    """A loop's delta in the scanned layout."""
    scanned = {}
    for name in {path.split("/", 1)[1] for path in delta}:
        blocks = [delta[f"h_{n}/{name}"] for n in range(2)]
        scanned[f"h/{name}"] = stacked_leaves(*blocks)
    return lj.Delta(scanned)


def lora_of(axes):
    return lj.lora(lj.select("**/kernel", axes=axes), rank=2, alpha=3)


def tune_of(axes):
    return lj.tune(lj.select("**"))


def chain_of(axes):
    return lj.chain(lj.lora(lj.select("**/up/kernel", axes=axes), rank=2), lj.tune(lj.select("**/bias")))


@pytest.mark.parametrize(
    ("make", "remat"),
    [
        (lora_of, True),
        (tune_of, True),
        (chain_of, False),
        pytest.param(lora_of, False, marks=pytest.mark.slow),
        pytest.param(tune_of, False, marks=pytest.mark.slow),
        pytest.param(chain_of, True, marks=pytest.mark.slow),
    ],
)
def test_10_loop_and_scanned_layouts_give_the_same_function(make, remat):
    loop, scanned = make(None), make({path: "sio" for path in leaves(stacked(PARAMS, 2)) if "kernel" in path})
    delta = random_delta(loop, PARAMS)
    other = in_scanned_layout(delta)
    model = Stack(layers=2, scan=True, remat=remat)
    params = stacked(PARAMS, 2)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, jax.eval_shape(scanned.init, KEY, params))

    def run(delta):
        adapted = scanned.apply(params, delta)
        out = lj.lift(model.apply, on_dense="error")({"params": adapted}, X)
        return jnp.sum(out**2), (out, lj.merge(adapted))

    def looped(delta):
        adapted = loop.apply(PARAMS, delta)
        out = lifted(adapted, X)
        return jnp.sum(out**2), (out, lj.merge(adapted))

    grads, (out, weights) = jax.jit(jax.grad(run, has_aux=True))(other)
    want_grads, (want, want_weights) = jax.jit(jax.grad(looped, has_aux=True))(delta)
    close(out, want)
    close(grads, in_scanned_layout(want_grads), 2e-5)
    close(weights, stacked(want_weights, 2), 1e-6)


def test_equal_layers_and_equal_calls_compile_once():
    """An adapted tree is an argument of jit like any other: new numbers compile nothing."""
    method = METHODS["lora"]
    traces = []

    @jax.jit
    def run(adapted, x):
        traces.append(1)
        return lifted(adapted, x)

    for n in range(3):
        run(method.apply(PARAMS, random_delta(method, PARAMS, seed=n), strength=0.1 * n), X)
    fresh = lj.lora(lj.select("**/kernel"), rank=2, alpha=99)
    run(fresh.apply(PARAMS, fresh.init(KEY, PARAMS)), X)
    assert len(traces) == 1


def test_the_base_product_keeps_its_bits_whatever_the_delta():
    """Adapted minus base is the low-rank part alone: W is never rounded with it."""
    params = {"w": normal(8, 6) * 1e3}
    method = lj.lora(lj.select("w"), rank=2)
    delta = random_delta(method, params, size=1e-4)
    run = lj.lift(lambda p, x: x @ p["w"])
    y = np.asarray(run(method.apply(params, delta), X), np.float64)
    low = np.asarray(X, np.float64) @ np.asarray(delta["w"]["a"], np.float64) @ np.asarray(delta["w"]["b"], np.float64)
    plain = np.asarray(X @ params["w"], np.float64)
    assert np.all(np.abs(y - (plain + low)) <= np.spacing(np.abs(y).astype(np.float32)))


@over_methods
def test_the_keys_of_a_delta_are_known_without_it(name):
    """Also by a transform that does not tell them, whose init is traced instead."""
    method = METHODS[name]
    keys = set(jax.eval_shape(method.init, KEY, PARAMS))
    shapes = jax.eval_shape(lambda: PARAMS)
    assert set(method.keys(shapes)) == keys
    assert transforms.keys_of(method._replace(keys=None), PARAMS) == keys


def test_a_chain_applies_without_tracing_its_members_init():
    def init(key, params):
        raise AssertionError("traced")

    members = [METHODS["vera"]._replace(init=init), METHODS["shift"]._replace(init=init)]
    delta = lj.Delta(random_delta(METHODS["vera"], PARAMS) | random_delta(METHODS["shift"], PARAMS))
    untraced, reference = lj.chain(*members), lj.chain(METHODS["vera"], METHODS["shift"])
    got, want = jax.jit(lambda p, d: [lj.merge(chain.apply(p, d)) for chain in (untraced, reference)])(PARAMS, delta)
    same(got, want)
