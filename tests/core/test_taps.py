"""Taps at named activations, against the same model written by hand with the change in its place."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name as named

import lora_jax as lj
from lora_jax.core.lifting.taps import Tap
from lora_jax.core.transforms import per_site
from lora_jax.planning.flops import equations
from tests.helpers.reference import close, merged_params, normal, random_delta, same, weighted
from tests.helpers.sites import (
    KEY,
    LAYERS,
    PARAMS,
    SAVED,
    TOKENS,
    TOWERS,
    WIDTH,
    Mix,
    Shift,
    layer,
    looped,
    mix,
    shift,
    tower,
)


def by_hand(p, tokens, delta, layers=None, strength=None):
    """The model without names, changed where `delta` says, one layer after the other."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    token_values = (tokens % 2 + positions)[..., None].astype(jnp.float32)
    layers = range(LAYERS) if layers is None else layers

    def change(site, n, x):
        if n not in layers or f"@{site}/mix" not in delta:
            return x
        f = jax.tree.map(lambda leaf: leaf[list(layers).index(n)], delta[f"@{site}/mix"])
        y = x * f["scale"][None, None] + jnp.tanh(x @ f["w"]) * token_values
        return y if strength is None else x + strength * (y - x)

    x = p["wte"][tokens] + jnp.sin(positions.astype(jnp.float32))[..., None]
    for n in range(LAYERS):
        x = x + jnp.tanh(change("mlp_out", n, x @ p["w"][n]))
        x = change("block_out", n, x)
    return x


SUBSETS = {"all": None, "some": (3, 0)}  # factors are in the order of the layers that are said
SLOW = ("scan", "remat", "remat of all", "jit of scan", "unrolled scan", "remat of scan", "remat with a policy")


@functools.cache
def wanted():
    """For every subset: a delta, and output and gradients (of delta and base) by hand."""
    by_subset = {}
    for subset, layers in SUBSETS.items():
        delta = random_delta(mix(layers=layers), PARAMS, size=0.5)

        def loss(delta, p, layers=layers):
            out = by_hand(p, TOKENS, delta, layers)
            return weighted(out), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(delta, PARAMS)
        by_subset[subset] = delta, out, grads
    return by_subset


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TOWERS]
)
def test_taps_are_where_the_names_are(name):
    """1e-5 of the largest entry: the same sums in another order."""

    def run(delta, p, layers):
        out = lj.lift(tower(name))(mix(layers=layers).apply(p, delta), TOKENS)
        return weighted(out), out

    @jax.jit
    def all_of_them(deltas):
        return [
            jax.value_and_grad(functools.partial(run, layers=SUBSETS[subset]), (0, 1), has_aux=True)(delta, PARAMS)
            for subset, delta in deltas.items()
        ]

    got = all_of_them({subset: delta for subset, (delta, *_) in wanted().items()})
    for ((_, out), grads), subset in zip(got, sorted(SUBSETS), strict=True):
        _, want, want_grads = wanted()[subset]
        close(out, want)
        close(grads, want_grads, 2e-5)
        assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))


def test_out_of_jit_too():
    delta, want, _ = wanted()["some"]
    for name in ("loop", "scan in scan"):
        close(lj.lift(tower(name))(mix(layers=(3, 0)).apply(PARAMS, delta), TOKENS), want)


def test_occurrences_in_remat_are_counted():
    delta, want, _ = wanted()["some"]
    got = jax.jit(lambda d: lj.lift(tower("remat"))(mix(layers=(3, 0)).apply(PARAMS, d), TOKENS))(delta)
    close(got, want)


@functools.cache
def partly_by_hand():
    return jax.jit(lambda d: by_hand(PARAMS, TOKENS, d, strength=0.3))(wanted()["all"][0])


@pytest.mark.parametrize("name", ["loop", "scan", pytest.param("remat", marks=pytest.mark.slow)])
def test_strength(name):
    """0 is the base and 1 the tap, out of jit bit for bit; in between as by hand. Compiled, as a scan always is, the
    last bits are the compiler's, which joins other sums and products."""
    delta, want, _ = wanted()["all"]

    def partly(p, t, d, s):
        return lj.lift(tower(name))(mix().apply(p, d, strength=s), t)

    base = tower(name)(PARAMS, TOKENS)
    if name == "loop":  # out of jit
        same(partly(PARAMS, TOKENS, delta, 0.0), base)
        tapped = lj.lift(tower(name))(mix().apply(PARAMS, delta), TOKENS)
        same(partly(PARAMS, TOKENS, delta, jnp.float32(1)), tapped)
    jitted = jax.jit(partly)
    for strength, expected in ((0.0, base), (1.0, want), (0.3, partly_by_hand())):
        close(jitted(PARAMS, TOKENS, delta, strength), expected)
    assert jitted._cache_size() == 1


@pytest.mark.parametrize("name", [pytest.param("loop", marks=pytest.mark.slow), "scan of remat"])
def test_many_deltas_with_one_base(name):
    """vmap over deltas, also with an example of its own each, and one strength each."""
    each = [random_delta(mix(), PARAMS, seed=n, size=0.5) for n in range(2)]
    together = jax.tree.map(lambda *leaf: np.stack(leaf), *each)

    def run(delta, tokens, strength):
        return lj.lift(tower(name))(mix().apply(PARAMS, delta, strength=strength), tokens)

    def plain(delta, tokens, strength):
        return by_hand(PARAMS, tokens, delta, strength=strength)

    def measured(run):
        def loss(d, t, s):
            out = run(d, t[None], s)
            return weighted(out), out[0]

        return jax.grad(loss, has_aux=True)

    @jax.jit
    def many(deltas, tokens, s):
        return jax.vmap(run, (0, None, 0))(deltas, tokens, s), jax.vmap(measured(run))(deltas, tokens, s)

    @jax.jit
    def one(delta, tokens, n, s):
        return plain(delta, tokens, s), measured(plain)(delta, tokens[n], s)

    s = np.float32([0.5, 1.0])
    got, own_results = many(together, TOKENS, s)
    want, want_own = jax.tree.map(lambda *leaf: np.stack(leaf), *(one(d, TOKENS, n, s[n]) for n, d in enumerate(each)))
    close(got, want)
    close(own_results[1], want_own[1])
    close(own_results[0], want_own[0], 2e-5)


def test_several_examples_inside_the_model():
    """A model that maps over its examples names their activations once."""
    params, x, method = {"w": normal(WIDTH, WIDTH)}, normal(2, 5, WIDTH), shift()
    delta = random_delta(method, params)
    fn = lambda p, x: jax.vmap(lambda x: named(x @ p["w"], "mlp_out"))(x)  # noqa: E731
    want = np.asarray(x) @ np.asarray(params["w"]) + np.asarray(delta["@mlp_out/shift"]["by"])[None]
    close(jax.jit(lj.lift(fn))(method.apply(params, delta), x), want)


def test_taps_with_adapted_weights():
    low = lj.lora(lj.select("w", axes="sio"), rank=2)
    method = lj.chain(low, mix(), lj.tune(lj.select("wte")))
    delta = random_delta(method, PARAMS, size=0.5)
    deltas = {path: lj.Delta({path: delta[path]}) for path in ("w", "wte")}
    merged = merged_params(low, PARAMS, deltas["w"]) | {"wte": delta["wte"]["value"]}

    def run(delta, name):
        return lj.lift(tower(name), on_dense="error")(method.apply(PARAMS, delta), TOKENS)

    want = jax.jit(by_hand)(merged, TOKENS, delta)
    for name in ("loop", "scan of remat"):
        close(jax.jit(functools.partial(run, name=name))(delta), want, 2e-5)


def test_untapped_layers_of_a_scan_spoil_no_gradient():
    """They are computed too, with some factors that must be as good as the tapped ones': zeros have no direction."""

    def along(factors, x, seen):
        w = factors["w"] / jnp.linalg.norm(factors["w"])
        return x + jnp.broadcast_to(w, x.shape)

    def gradient(name):
        def loss(w):
            tap = Tap(factors={"w": w}, site="mlp_out", fn=along, count=LAYERS, layers=(1, 2))
            return weighted(lj.lift(tower(name))(lj.Tapped(PARAMS, (tap,)), TOKENS))

        return jax.grad(loss)

    close(*jax.jit(lambda w: [gradient(name)(w) for name in ("scan", "loop")])(normal(2, WIDTH)))


def test_what_is_seen():
    """Named values as the model had them, before a tap; none out of a body."""
    met = {}

    def look(factors, x, seen):
        met.update(seen)
        return x * 2

    def fn(p, x):
        x = named(x, "a") + 1
        x = jax.checkpoint(lambda x: named(x * 3, "hidden"))(x)
        return named(jax.jit(lambda x: named(x + 1, "b"))(x), "c")

    taps = [Tap(factors=(), site=site, fn=look, count=1) for site in "abc"]
    out = lj.lift(fn)(lj.Tapped({}, tuple(taps)), jnp.ones(2))
    close(out, jnp.full(2, 40.0))
    assert set(met) == {"a", "b", "c"}
    close([met[name] for name in "abc"], [jnp.full(2, n) for n in (1.0, 10.0, 20.0)])


def test_equal_methods_compile_once():
    run = jax.jit(lj.lift(tower("scan")))
    for n in range(3):
        method = mix(layers=[0, 3])
        run(method.apply(PARAMS, random_delta(method, PARAMS, seed=n)), TOKENS)
    assert run._cache_size() == 1
    other = mix(layers=[0, 3], gain=2.0)
    run(other.apply(PARAMS, random_delta(other, PARAMS)), TOKENS)
    assert run._cache_size() == 2


def program(fn, *args):
    """The compiled program without the places in the source."""
    return re.sub(r"loc\(.*|metadata=\{.*?\}", "", jax.jit(fn).lower(*args).as_text())


def test_nothing_is_added_where_there_is_no_tap():
    fn = tower("loop")
    plain = program(fn, PARAMS, TOKENS)
    assert program(lj.lift(fn), lj.Tapped(PARAMS, ()), TOKENS) == plain
    one = mix({"mlp_out": LAYERS}, layers=[2])
    tapped = program(lj.lift(fn), one.apply(PARAMS, random_delta(one, PARAMS)), TOKENS)
    for what, more in (("dot_general", 1), ("tanh", 1), ("select .*tensor<2x5x4xf32>", 0)):
        count = [len(re.findall(rf"stablehlo\.{what}", text)) for text in (plain, tapped)]
        assert count[1] == count[0] + more, what

    # a scan chooses between tapped and untapped layers only where there are both
    for layers, more in ((None, 0), ((0, 3), 1)):
        method = mix({"mlp_out": LAYERS}, layers=layers)
        tapped = program(lj.lift(tower("scan")), method.apply(PARAMS, random_delta(method, PARAMS)), TOKENS)
        count = [len(re.findall("stablehlo.select .*tensor<2x5x4xf32>", text)) for text in (plain, tapped)]
        assert count[1] == count[0] + more

    # names alone add nothing to adapted weights
    method = lj.lora(lj.select("w", axes="sio"), rank=2)
    adapted = method.apply(PARAMS, random_delta(method, PARAMS))
    nameless = lambda p, tokens: functools.reduce(lambda x, w: x + jnp.tanh(x @ w), p["w"], p["wte"][tokens])  # noqa: E731
    has_names = lambda p, tokens: looped(layer)(p, p["wte"][named(tokens, "tokens")])  # noqa: E731
    assert program(lj.lift(has_names), adapted, TOKENS) == program(lj.lift(nameless), adapted, TOKENS)


def test_a_policy_by_names_saves_what_the_model_names():
    """The backward pass of a layer has its product again, unless the product's result is saved by its name: as in a
    model with the tap in its code."""
    delta = random_delta(mix({"mlp_out": LAYERS}), PARAMS)
    seen = {"tokens": TOKENS, "positions": jnp.zeros_like(TOKENS)}

    def changed(w, x, f):
        return x + jnp.tanh(Mix()(f, named(x @ w, "mlp_out"), seen))

    def count(run):
        eqns = equations(jax.make_jaxpr(jax.grad(lambda d: jnp.sum(run(d))))(delta).jaxpr)
        return sum(eqn.primitive.name == "dot_general" for eqn in eqns)

    def lifted(name):
        return count(lambda d: lj.lift(tower(name))(mix({"mlp_out": LAYERS}).apply(PARAMS, d), TOKENS))

    def in_code(**options):
        one = jax.checkpoint(changed, **options)
        layer = lambda d, n: jax.tree.map(lambda leaf: leaf[n], d["@mlp_out/mix"])  # noqa: E731
        x = PARAMS["wte"][TOKENS]
        return count(lambda d: functools.reduce(lambda x, n: one(PARAMS["w"][n], x, layer(d, n)), range(LAYERS), x))

    assert lifted("remat") == in_code() == lifted("remat with a policy") + LAYERS
    assert lifted("remat with a policy") == in_code(policy=SAVED)


def test_a_tapped_tree_is_labelled_split_and_trained():
    method = lj.chain(mix(layers=(0, 3)), lj.lora(lj.select("w", axes="sio"), rank=2))
    delta = random_delta(method, PARAMS, size=0.5)
    tree = method.apply(PARAMS, delta, strength=0.5)
    labels = lj.labels(tree)
    assert jax.tree.structure(labels) == jax.tree.structure(tree)
    assert set(jax.tree.leaves([tap.factors for tap in labels.taps])) == {"trainable"}
    assert [tap.strength for tap in labels.taps] == ["frozen"] * 2
    assert (labels.params["wte"], labels.params["w"].base, labels.params["w"].a) == ("frozen", "frozen", "trainable")
    trained, frozen = lj.partition(tree)
    assert sum(x.size for x in jax.tree.leaves(trained)) == sum(x.size for x in jax.tree.leaves(delta))
    same(lj.rejoin(trained, frozen), tree)

    run = lj.lift(tower("scan"))
    by_tree = jax.grad(lambda t: weighted(run(lj.rejoin(t, frozen), TOKENS)))
    by_delta = jax.grad(lambda d: weighted(run(method.apply(PARAMS, d, strength=0.5), TOKENS)))
    of_tree, of_delta = jax.jit(lambda t, d: (by_tree(t), by_delta(d)))(trained, delta)
    close({f"@{tap.site}/mix": tap.factors for tap in of_tree.taps}, {k: of_delta[k] for k in delta if "@" in k})
    close(of_tree.params["w"].a, of_delta["w"]["a"])

    tx = lj.freeze_base(optax.sgd(0.1))

    @jax.jit
    def step(tree):
        return optax.apply_updates(tree, tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)[0])

    moved = step(tree)
    same(moved.params["wte"], PARAMS["wte"])
    same(moved.taps[0].strength, tree.taps[0].strength)
    close(moved.taps[0].factors["w"], np.asarray(tree.taps[0].factors["w"]) - np.float32(0.1))


def test_fixed_factors_of_a_tap_do_not_train():
    start = lambda key, site, n: {"by": jnp.ones((n, WIDTH)), "fixed_size": jnp.ones(n)}  # noqa: E731
    method = per_site({"method": "shift"}, {"mlp_out": 1}, start, Shift())
    delta = method.init(KEY, {})
    labels = lj.labels(method.apply({}, delta)).taps[0].factors
    assert labels == lj.labels(delta)["@mlp_out/shift"] == {"by": "trainable", "fixed_size": "frozen"}
    assert lj.check(method, {}).trained == WIDTH


def test_init_draws_by_site():
    """A site's factors are the same whatever other sites there are, and differ between sites and layers."""

    @jax.jit
    def run(key, old):
        alone, both = mix({"mlp_out": 2}), mix({"block_out": 2, "mlp_out": 2})
        return alone.init(key, PARAMS), both.init(key, PARAMS), alone.init(old, PARAMS)

    one, two, of_old_key = run(KEY, jax.random.PRNGKey(0))
    same(one["@mlp_out/mix"], two["@mlp_out/mix"])
    first, second = np.asarray(one["@mlp_out/mix"]["w"]), np.asarray(two["@block_out/mix"]["w"])
    assert not np.any(first == second) and not np.any(first[0] == first[1])
    same(of_old_key, one)


def shape_of(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def test_counted_without_arrays():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    report = lj.check(mix(layers=(1, 2)), shapes)
    assert report.trained == 2 * 2 * (WIDTH * WIDTH + WIDTH)
    assert [row.path for row in report.rows] == ["@block_out/mix", "@mlp_out/mix"]
    assert shape_of(jax.eval_shape(mix().init, KEY, shapes)) == shape_of(jax.jit(mix().init)(KEY, PARAMS))


def test_factors_of_some_layers_are_in_the_order_of_the_layers():
    delta = lj.Delta({"@mlp_out/shift": {"by": np.float32([[3.0] * 4, [0.5] * 4])}})
    tap = shift(4, layers=(3, 0)).apply(PARAMS, delta)
    factors, tapped = tap.taps[0].per_occurrence()
    assert tapped == [True, False, False, True]
    assert (factors["by"][0, 0], factors["by"][3, 0]) == (0.5, 3.0)
