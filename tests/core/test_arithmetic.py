"""Sums, differences and truncations of adapters, against dense NumPy in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.checkpoints import load_adapter, save_adapter
from lora_jax.methods.arithmetic import add, difference, truncate
from tests.helpers import adapters
from tests.helpers.adapters import AXES, added, all_merged, dense, low_rank, weights_and_ranks
from tests.helpers.networks import Stack, Tied, stacked, started
from tests.helpers.reference import close, digest, in_one_program, ints, leaves, normal, random_delta, same

KEY = jax.random.key(0)
X = normal(4, 8, seed=5)
MODEL = Stack(layers=2)
PARAMS = started(MODEL, X)
SHAPES = jax.eval_shape(lambda: PARAMS)
KERNELS = lj.select("**/kernel")
METHODS = {
    "lora": lj.lora(KERNELS, rank=2, alpha=3),
    "options": lj.lora(
        lj.select("**/kernel", exclude="h_0/down/*"),
        **{"rank": {"**/up/*": 3, "**": 1}, "alpha": {"h_0/**": 4, "**": 1}, "scale_rule": "alpha/sqrt(r)"},
        dropout=0.1,
    ),
    "one layer": lj.lora(lj.select("**/kernel", layers=[1]), rank=2),
    "shared": lj.lora(KERNELS, rank=2, alpha=5, shared="**/up/kernel"),
    "shift": lj.shift(lj.select("**/bias"), scale={"**/up/*": 2.0, "**": -0.5}),
    "layers apart": lj.chain(
        lj.lora(lj.select("**/kernel", layers=[0]), rank=2, alpha=1),
        lj.lora(lj.select("**/kernel", layers=[1]), rank=1, alpha=7),
    ),
    "pissa": lj.pissa(KERNELS, rank=2, alpha=3),
}
NEED_SHAPES = {"vera": lj.vera(lj.select("**/up/kernel"), rank=3)}
NEED_VALUES = {
    "tune": lj.tune(lj.select("**")),
    "chain": lj.chain(lj.lora(lj.select("**/up/kernel"), rank=2), lj.tune(lj.select("**/bias"))),
}
LOKR = lj.lokr(KERNELS, rank=2)
ALL = METHODS | NEED_SHAPES | NEED_VALUES
lifted = lj.lift(lambda params, x: MODEL.apply({"params": params}, x), on_dense="error")


def given_delta(method, seed, params=PARAMS):
    return adapters.given_delta(method, seed, params)


def merged(pair, params=PARAMS):
    return all_merged([pair], params)[0]


def dense_sum(terms, weights, params=PARAMS):
    """base + the sum of weight times (merged - base), in float64, of the merged params of each term."""
    base = {path: np.asarray(leaf, np.float64) for path, leaf in leaves(params).items()}
    total = dict(base)
    for term, weight in zip(terms, weights, strict=True):
        for path, leaf in term.items():
            total[path] = total[path] + weight * (np.asarray(leaf, np.float64) - base[path])
    return total


def is_sum(pair, pairs, weights, params=PARAMS):
    """Within a few roundings in float32 of the terms, whose sum may be smaller than they are."""
    got, *terms = all_merged([pair, *pairs], params)
    want = dense_sum(terms, weights, params)
    assert set(got) == set(want)
    most = max(np.abs(leaf).max() for leaf in want.values())
    for path, leaf in want.items():
        np.testing.assert_allclose(np.asarray(got[path], np.float64), leaf, rtol=0, atol=1e-5 * most, err_msg=path)


@pytest.mark.parametrize("weight", [1, 1.0, np.float32(1)])
@pytest.mark.parametrize("name", [*ALL, "lokr"])
def test_one_pair_of_weight_one_is_itself(name, weight):
    method, delta = given_delta((ALL | {"lokr": LOKR})[name], 1)
    again, kept = add([(method, delta)], [weight])
    same(kept, delta)
    same(again.apply(PARAMS, kept), method.apply(PARAMS, delta))
    assert again.spec == method.spec


@pytest.mark.parametrize("name", ALL)
def test_a_sum_changes_the_weights_by_the_sum_of_the_changes(name):
    """Of an adapter of each method and a LoRA, minus another adapter of the method; the base is not touched."""
    one, two = given_delta(ALL[name], 1), given_delta(ALL[name], 2)
    other = given_delta(METHODS["lora"] if "tune" not in name else ALL[name], 3)
    pairs, weights = [one, other, two], [0.7, 2, -1.5]
    params = {**dict.fromkeys(METHODS), "vera": SHAPES}.get(name, PARAMS)
    before = digest(PARAMS)
    method, delta = added(pairs, weights, params=params)
    is_sum((method, delta), pairs, weights)

    @jax.jit
    def lifted_and_merged(delta):
        adapted = method.apply(PARAMS, delta)
        return lifted(adapted, X), MODEL.apply({"params": lj.merge(adapted)}, X)

    close(*lifted_and_merged(delta))
    again = lj.from_spec(json.loads(json.dumps(method.spec)))
    same(again.apply(PARAMS, delta), method.apply(PARAMS, delta))
    assert jax.tree.map(jnp.shape, jax.eval_shape(again.init, KEY, PARAMS)) == jax.tree.map(jnp.shape, delta)
    assert digest(PARAMS) == before
    if params is None:
        same(added(pairs, weights, params=PARAMS)[1], delta)
        same(added(pairs, weights, params=SHAPES)[1], delta)


@pytest.mark.parametrize("axes", AXES)
def test_sums_in_every_layout(axes):
    params = {"w": normal(*(3, 2, 4, 5)[: len(axes)])}
    pairs = [given_delta(low_rank(axes, rank, alpha=3), rank, params=params) for rank in (2, 3)]
    method, delta = added(pairs, [-0.7, 2])
    is_sum((method, delta), pairs, [-0.7, 2], params)
    same(added(pairs, [-0.7, 2], params=params)[1], delta)


@given(weights_and_ranks(), st.floats(-2, 2), st.floats(-2, 2))
def test_ranks_add(case, first, second):
    axes, params, *ranks = case
    pairs = [given_delta(low_rank(axes, rank, alpha=3), n, params=params) for n, rank in enumerate(ranks)]
    method, delta = added(pairs, [first, second])
    assert method.spec["rank"] == {"w": sum(ranks)} and delta["w"]["a"].shape[-1] == sum(ranks)
    scales = [first * 3 / ranks[0], second * 3 / ranks[1]]
    terms = [scale * dense(pair[1], axes.count("s")) for scale, pair in zip(scales, pairs, strict=True)]
    most = max(np.abs(term).max() for term in terms)
    np.testing.assert_allclose(dense(delta, axes.count("s")), sum(terms), rtol=0, atol=1e-6 * most + 1e-30)


def test_the_average_of_the_factors_is_not_the_average():
    one, two = given_delta(METHODS["lora"], 1), given_delta(METHODS["lora"], 2)
    naive = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, one[1], two[1])
    *terms, got = all_merged([one, two, (one[0], naive)], PARAMS)
    want = dense_sum(terms, [0.5, 0.5])
    assert max(np.abs(leaf - want[path]).max() for path, leaf in got.items()) > 0.05
    is_sum(added([one, two], [0.5, 0.5]), [one, two], [0.5, 0.5])


def test_the_factors_stand_side_by_side_and_weight_and_scale_are_in_b():
    one, two = given_delta(METHODS["lora"], 1), given_delta(lj.lora(KERNELS, rank=4, alpha=8), 2)
    method, delta = added([one, two], [2, -0.5])  # powers of two: exact
    path = "h_0/up/kernel"
    (a, b), (other_a, other_b) = ([np.asarray(pair[1][path][name]) for name in "ab"] for pair in (one, two))
    same(delta[path]["a"], np.concatenate([a, other_a], -1))
    same(delta[path]["b"], np.concatenate([2 * 1.5 * b, -0.5 * 2 * other_b], 0))
    assert method.spec["alpha"] is None and method.spec["rank"][path] == 6


def test_targets_are_united():
    up = given_delta(lj.lora(lj.select("**/up/kernel"), rank=2), 1)
    rest = given_delta(lj.chain(lj.lora(lj.select("h_0/{up,down}/kernel"), rank=1), lj.shift(lj.select("**/bias"))), 2)
    method, delta = added([up, rest], [1, -2])
    assert set(delta) == set(up[1]) | set(rest[1])
    assert [spec["method"] for spec in method.spec["of"]] == ["lora", "bias_delta"]
    assert method.spec["of"][0]["rank"] == {"h_0/up/kernel": 3, "h_1/up/kernel": 2, "h_0/down/kernel": 1}
    is_sum((method, delta), [up, rest], [1, -2])


def test_the_difference_of_an_adapter_and_itself_is_nothing():
    one, two = given_delta(METHODS["options"], 1), given_delta(METHODS["shared"], 2)
    apart = in_one_program(lambda d, e: difference((one[0], d), (two[0], e)), one[1], two[1])
    is_sum(apart, [one, two], [1, -1])
    nothing = in_one_program(lambda d: difference((one[0], d), (one[0], d)), one[1])
    close(merged(nothing), leaves(PARAMS), 1e-6)


def test_layers_of_a_stack_need_the_shapes_of_the_base():
    params = stacked(PARAMS, 2)
    axes = {"h/*/kernel": "sio"}
    some = given_delta(lj.lora(lj.select("**/kernel", axes=axes, layers=[1]), rank=2), 1, params)
    all_layers = given_delta(lj.lora(lj.select("**/kernel", axes=axes), rank=1), 2, params)
    with pytest.raises(ValueError, match=r"h/down/kernel: the factors \['a', 'b'\] do not tell .*pass params="):
        add([all_layers, some], [1, 1])
    pair = added([some, all_layers], [0.5, 2], params=jax.eval_shape(lambda: params))
    is_sum(pair, [some, all_layers], [0.5, 2], params)
    scanned = Stack(layers=2, scan=True)
    run = lj.lift(lambda params: scanned.apply({"params": params}, X), on_dense="error")

    @jax.jit
    def lifted_and_merged(delta):
        adapted = pair[0].apply(params, delta)
        return run(adapted), scanned.apply({"params": lj.merge(adapted)}, X)

    close(*lifted_and_merged(pair[1]))


def test_tuned_leaves_need_the_base_unless_they_are_averaged():
    one, two, three = (given_delta(NEED_VALUES["chain"], n) for n in (1, 2, 3))
    third = [1 / 3] * 3
    is_sum(average := added([one, two, three], third), [one, two, three], third)
    assert [spec["method"] for spec in average[0].spec["of"]] == ["lora", "tune"]
    same(added([one, two, three], third, params=SHAPES)[1], average[1])
    for wrong in ({}, {"params": SHAPES}, {"params": lj.without_tuned(PARAMS, one[1])}):
        with pytest.raises(ValueError, match=r"h_0/down/bias is tuned.*pass params="):
            difference(one, two, **wrong)
    bitfit = given_delta(lj.tune(lj.select("**/bias")), 4)
    with pytest.raises(ValueError, match="is tuned"):  # the other has no such leaves: the base does not cancel
        add([bitfit, given_delta(METHODS["lora"], 5)], [0.5, 0.5])
    is_sum(added([bitfit, one], [0.5, 0.5], params=PARAMS), [bitfit, one], [0.5, 0.5])


def test_rows_are_added_as_the_product_of_low_rank_that_they_are():
    ids = ints([[1, 4, 10], [4, 4, 0]])
    model = Tied()
    params = started(model, ids)
    one = given_delta(lj.rows(lj.select("wte/*"), indices=[4, 10]), 1, params)
    two = given_delta(lj.rows(lj.select("wte/*"), indices=[4, 0]), 2, params)
    same(add([one], [1])[1], one[1])
    with pytest.raises(ValueError, match=r"wte/embedding: .*pass params="):
        add([one, two], [1, 0.5])
    method, delta = added([one, two], [1, 0.5], params=params)
    is_sum((method, delta), [one, two], [1, 0.5], params)
    run = lj.lift(lambda params: model.apply({"params": params}, ids), on_dense="error")

    @jax.jit
    def lifted_and_merged(delta):
        adapted = method.apply(params, delta)
        return run(adapted), model.apply({"params": lj.merge(adapted)}, ids)

    close(*lifted_and_merged(delta))


def test_bf16_factors_are_added_in_float32():
    params = {"w": normal(8, 6)}
    method = lj.lora(lj.select("w"), rank=2, alpha=3, dtype=jnp.bfloat16)
    pairs = [given_delta(method, n, params=params) for n in (1, 2)]
    delta = add(pairs, [1 / 3, 1 / 7])[1]["w"]
    exact = [{name: np.asarray(x, np.float64) for name, x in delta["w"].items()} for _, delta in pairs]
    want = sum(w * 1.5 * f["a"] @ f["b"] for w, f in zip([1 / 3, 1 / 7], exact, strict=True))
    got = np.asarray(delta["a"], np.float64) @ np.asarray(delta["b"], np.float64)
    assert delta["a"].dtype == delta["b"].dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())  # a rounding or two of float32


def test_a_sum_survives_an_adapter_file(tmp_path):
    pair = added([given_delta(METHODS["options"], 1), given_delta(METHODS["shift"], 2)], [1, 2])
    save_adapter(tmp_path, *pair, {"source": "-", "shapes": "-", "content": "-"})
    method, delta, _ = load_adapter(tmp_path)
    same(delta, pair[1])
    same(method.apply(PARAMS, delta), pair[0].apply(PARAMS, pair[1]))


def test_sums_and_truncations_run_under_jit_with_traced_weights():
    methods = [METHODS["shared"], lj.lora(lj.select("h_1/up/kernel"), rank=2, alpha=3), METHODS["shift"]]
    deltas = [given_delta(method, n)[1] for n, method in enumerate(methods)]
    weights = [0.3, -1.0, 2.0]

    def summed(deltas, weights):
        pair = add(list(zip(methods, deltas, strict=True)), list(weights))
        return pair[1], truncate(*pair, 2)[1:]

    close(jax.jit(summed)(deltas, np.float32(weights)), jax.jit(lambda deltas: summed(deltas, weights))(deltas))
    slope = jax.grad(
        lambda w: jnp.sum(add(list(zip(methods[:1], deltas[:1], strict=True)), [w])[1]["h_0/up/kernel"]["b"])
    )
    assert float(slope(0.5)) != 0


@pytest.mark.parametrize(
    "method, named",
    [
        (lj.dora(KERNELS, rank=2), "'dora' does not add: a norm of base and change .*; merge it"),
        (lj.ia3(KERNELS), "'ia3' does not add: it multiplies the base; merge it"),
        (
            lj.prefix_embedding(lj.select("**/up/kernel", axes="vo"), prefix=2),
            "'prefix_embedding' does not add: its rows",
        ),
        (lj.prefix_layer({"out": (2, 8)}, vocabulary=9, prefix=1), "@out.* does not add: it changes activations"),
        (lj.adapter({"out": (2, 8)}, rank=2), "@out.* does not add: it changes activations, and no weight"),
    ],
    ids=lambda x: x.spec["method"] if isinstance(x, lj.ParamTransform) else "",
)
def test_what_does_not_add_is_named(method, named):
    chained = lj.chain(method, lj.tune(lj.select("h_0/up/bias")))
    delta = random_delta(method, PARAMS)
    for pair in ((method, delta), (chained, delta)):
        with pytest.raises(ValueError, match=named):
            add([pair], [1])
        with pytest.raises(ValueError, match=named):
            add([given_delta(METHODS["lora"], 1), pair], [1, 1], params=PARAMS)
        with pytest.raises(ValueError, match=named):
            truncate(*pair, 1)


def test_a_method_of_ones_own_adds_if_lift_meets_it_as_a_product_of_low_rank(monkeypatch):
    """What its class says, where its name says nothing."""
    dora = lj.dora(KERNELS, rank=2)
    delta = random_delta(dora, PARAMS)
    mine = dora._replace(spec={"method": "mine"})
    with pytest.raises(ValueError, match="h_0/down/kernel: changes of Scaled do not add"):
        add([(mine, delta)], [2], params=PARAMS)
    lora = METHODS["lora"]._replace(spec={"method": "mine"})
    pair = given_delta(METHODS["lora"], 1)
    is_sum(added([(lora, pair[1])], [2], params=PARAMS), [pair], [2])


def test_what_cannot_be_added_is_said():
    one = given_delta(METHODS["lora"], 1)
    with pytest.raises(ValueError, match="@mlp_out does not add"):
        add([one, (one[0], lj.Delta(one[1] | {"@mlp_out": {"down": jnp.ones((2, 3))}}))], [1, 1])
    for pairs, weights in (([], []), ([one], [1, 2]), ([one, one], [1])):
        with pytest.raises(ValueError, match=f"{len(pairs)} pairs and {len(weights)} weights"):
            add(pairs, weights)
    tuned, moved = given_delta(lj.tune(lj.select("**/bias")), 1), given_delta(METHODS["shift"], 2)
    with pytest.raises(ValueError, match="h_0/down/bias: changes of BiasDelta and Tuned do not add"):
        add([tuned, moved], [1, 1], params=PARAMS)
    with pytest.raises(ValueError, match="h_0/down/kernel: changes of LowRank and Tuned do not add"):
        add([one, given_delta(lj.tune(lj.select("**/kernel")), 1)], [1, 1], params=PARAMS)
    wider = started(Stack(layers=2, width=6), normal(4, 6))
    other = given_delta(METHODS["lora"], 1, params=wider)
    with pytest.raises(
        ValueError, match=r"h_0/down/kernel: the adapters are of different bases: .*\(16, 8\).*\(12, 6\)"
    ):
        add([one, other], [1, 1])
    kronecker = given_delta(LOKR, 1)
    with pytest.raises(ValueError, match=r"h_0/down/kernel: the factors \['w1', .* pass params="):
        difference(kronecker, kronecker)
    with pytest.raises(ValueError, match="h_0/down/kernel: changes of Kronecker and LowRank do not add"):
        add([kronecker, one], [1, 1], params=PARAMS)
    square = {"w": normal(3, 3)}
    with pytest.raises(ValueError, match=r"w: the adapters are of different bases: .*'io'.*'oi'"):
        add([given_delta(low_rank(axes, 1), 1, params=square) for axes in ("io", "oi")], [1, 1])
    for rank in (0, -1, 1.5, {"**/up/*": 0, "**": 1}):
        with pytest.raises(ValueError, match=r"kernel: rank=.* whole number from 1"):
            truncate(*one, rank)
    with pytest.raises(ValueError, match=r"no glob of .* matches 'h_0/down/kernel'"):
        truncate(*one, {"**/up/*": 1})
    with pytest.raises(ValueError, match="nothing in this delta of 'bias_delta' has low rank"):
        truncate(*moved, 1)
    lacking = lj.Delta({path: factors for path, factors in one[1].items() if "h_0" in path})
    with pytest.raises(ValueError, match="lacks"):
        add([one, (one[0], lacking)], [1, 1], params=PARAMS)
