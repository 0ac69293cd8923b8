"""What taps cannot do, said by name."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name as named
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.core.lifting.taps import Tap
from lora_jax.core.transforms import per_site
from lora_jax.distributed import sharding
from tests.helpers.reference import close, normal, random_delta
from tests.helpers.sites import (
    KEY,
    PARAMS,
    TOKENS,
    WIDTH,
    mix,
    shift,
    tower,
)


@pytest.mark.parametrize("name", ["loop", "scan", "remat", "scan in scan", "jit"])
def test_another_number_of_occurrences_is_said(name):
    for count, had in (
        (3, "more than 3 activations are named 'mlp_out'"),
        (5, "has 4 activations named 'mlp_out', not 5"),
    ):
        method = mix({"mlp_out": count})
        with pytest.raises(ValueError, match=had):
            jax.eval_shape(lj.lift(tower(name)), method.apply(PARAMS, random_delta(method, PARAMS)), TOKENS)


def test_a_site_that_does_not_occur_is_said():
    method = mix({"elsewhere": 2})
    with pytest.raises(ValueError, match="the function has 0 activations named 'elsewhere', not 2"):
        jax.eval_shape(lj.lift(tower("loop")), method.apply(PARAMS, random_delta(method, PARAMS)), TOKENS)


@jax.custom_vjp
def custom(w, x):
    return named(x @ w, "mlp_out")


custom.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))

HIDDEN = {
    "while": lambda p, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, named(c[1] @ p["w"], "mlp_out")), (0, x)
    )[1],
    "cond": lambda p, x: lax.cond(x[0, 0] > 0, lambda x: named(x @ p["w"], "mlp_out"), lambda x: x, x),
    "custom_vjp_call": lambda p, x: custom(p["w"], x),
    "shard_map": lambda p, x: jax.shard_map(
        lambda w, x: named(x @ w, "mlp_out"),
        mesh=sharding.make_mesh({"data": 2}),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )(p["w"], x),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_site_where_no_tap_can_be_is_said(name, adapted):
    params, x = {"w": normal(WIDTH, WIDTH)}, normal(2, WIDTH)
    method = lj.chain(shift(), lj.lora(lj.select("w"), rank=1)) if adapted else shift()
    tree = method.apply(params, random_delta(method, params))
    with pytest.raises(ValueError, match=f"the site 'mlp_out' is inside a '{name}', where no tap can be"):
        jax.eval_shape(lj.lift(HIDDEN[name], on_dense="allow"), tree, x)
    twice = lj.chain(shift(2), lj.lora(lj.select("w"), rank=1)) if adapted else shift(2)
    tree = twice.apply(params, random_delta(twice, params))
    inner = lambda p, x: lax.scan(lambda x, _: (HIDDEN[name](p, x), None), x, None, length=2)[0]  # noqa: E731
    with pytest.raises(ValueError, match=f"inside a '{name}'"):
        jax.eval_shape(lj.lift(jax.jit(inner), on_dense="allow"), tree, x)


@pytest.mark.parametrize("name", HIDDEN)
def test_names_beside_the_taps_may_be_anywhere(name):
    """A name inside a branch is not seen after it, whether adapted weights are met there or not."""

    def fn(p, x):
        x = HIDDEN[name](p, x)
        return named(x, "block_out")

    params, x = {"w": normal(WIDTH, WIDTH)}, normal(2, WIDTH)
    method = lj.chain(shift(site="block_out"), lj.lora(lj.select("w"), rank=1))
    delta = random_delta(method, params)
    low = lj.Delta({"w": delta["w"]})

    @jax.jit
    def lifted_and_dense(delta, low):
        merged = lj.merge(lj.lora(lj.select("w"), rank=1).apply(params, low))
        want = HIDDEN[name](merged, x) + delta["@block_out/shift"]["by"]
        return lj.lift(fn, on_dense="allow")(method.apply(params, delta), x), want

    close(*lifted_and_dense(delta, low))

    asks = Tap(factors=(), site="block_out", fn=lambda factors, x, seen: x + seen["mlp_out"], count=1)
    with pytest.raises(ValueError, match="the tap at 'block_out' needs the activation 'mlp_out', which is not named"):
        lj.lift(fn, on_dense="allow")(lj.Tapped(method.apply(params, delta).params, (asks,)), x)


def test_wrong_taps_are_said():
    x = normal(2, WIDTH)
    fn = lambda p, x: named(x, "mlp_out")  # noqa: E731
    run = lambda tap: lj.lift(fn)(lj.Tapped({}, (Tap(factors={}, site="mlp_out", count=1, fn=tap),)), x)  # noqa: E731
    with pytest.raises(ValueError, match=r"the tap at 'mlp_out' made float32\(2, 2\) of float32\(2, 4\)"):
        run(lambda factors, x, seen: x[:, :2])
    with pytest.raises(ValueError, match=r"the tap at 'mlp_out' made bfloat16\(2, 4\) of float32\(2, 4\)"):
        run(lambda factors, x, seen: x.astype(jnp.bfloat16))
    with pytest.raises(
        ValueError, match="the tap at 'mlp_out' needs the activation 'tokens', which is not named before"
    ):
        run(lambda factors, x, seen: x + seen["tokens"])
    with pytest.raises(KeyError, match="typo"):  # the tap's own
        run(lambda factors, x, seen: x + factors["typo"])


def test_tapped_params_go_through_lift():
    params, x = {"w": normal(WIDTH, WIDTH)}, normal(2, WIDTH)
    tree = shift().apply(params, random_delta(shift(), params))
    uses = [lambda: tree["w"], lambda: tree(x), lambda: list(tree), lambda: tree.items(), lambda: "w" in tree]
    for use in uses:
        with pytest.raises(TypeError, match=r"these params are tapped: wrap the function with lora_jax\.lift"):
            use()
    with pytest.raises(AttributeError, match=r"tapped params have no weight: wrap the function with lora_jax\.lift"):
        _ = tree.weight
    with pytest.raises(TypeError, match="apply takes params here, got tapped ones: put transforms together with chain"):
        shift().apply(tree, shift().init(KEY, params))
    with pytest.raises(TypeError, match="got tapped ones"):
        lj.lora(lj.select("w"), rank=1).init(KEY, tree)


def test_what_changes_activations_cannot_be_merged():
    params = {"w": normal(WIDTH, WIDTH)}
    for method in (shift(), lj.chain(lj.lora(lj.select("w"), rank=1), shift())):
        delta = random_delta(method, params)
        why = r"what changes activations \(mlp_out\) has no weight to go into: keep it beside the base, and lift"
        with pytest.raises(ValueError, match=why):
            lj.merge(method.apply(params, delta))
        with pytest.raises(ValueError, match=why):
            lj.unmerge(params, method, delta)


def test_one_kind_at_one_site_once():
    params = {"w": normal(WIDTH, WIDTH)}
    twice = lj.chain(shift(), shift())
    with pytest.raises(ValueError, match="@mlp_out/shift is the target of two transforms of the chain"):
        twice.init(KEY, params)
    with pytest.raises(ValueError, match="it lacks"):
        twice.apply(params, shift().init(KEY, params))
    # two kinds act one after the other, in the chain's order
    double = per_site({"method": "double"}, {"mlp_out": 1}, lambda *_: {}, lambda factors, x, seen: 2 * x)
    x, by = normal(2, WIDTH), shift().init(KEY, params)["@mlp_out/shift"]["by"]
    for method, want in (
        ((shift(), double), 2 * (x @ params["w"] + by)),
        ((double, shift()), 2 * (x @ params["w"]) + by),
    ):
        both = lj.chain(*method)
        got = lj.lift(lambda p, x: named(x @ p["w"], "mlp_out"))(both.apply(params, both.init(KEY, params)), x)
        close(got, want)


def test_another_methods_delta_is_said():
    params = {"w": normal(WIDTH, WIDTH)}
    delta = random_delta(shift(), params)
    with pytest.raises(ValueError, match=r"the delta is not this method's: it lacks \['@mlp_out/other'\] and has"):
        shift(method="other").apply(params, delta)
    with pytest.raises(ValueError, match=r"@mlp_out/shift: the delta's factors are {'by': \(1, 4\)}, but .*\(2, 4\)"):
        shift(2).apply(params, delta)
    with pytest.raises(TypeError, match="apply takes a Delta"):
        shift().apply(params, dict(delta))
    with pytest.raises(TypeError, match="got a Delta"):
        shift().init(KEY, delta)
    for layers in ([], [2], [-1], [0, 0]):
        with pytest.raises(ValueError, match=r"name some of the 2 of the site 'mlp_out', each once"):
            shift(2, layers=layers)
