"""Sums, differences and truncations of adapters, against dense NumPy in float64."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.checkpoints import load_adapter, save_adapter
from lora_jax.methods.arithmetic import add, difference, truncate
from tests.helpers.networks import Stack, Tied, stacked, started
from tests.helpers.reference import close, digest, filled, in_one_program, leaves, normal, same

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
    return method, filled(jax.eval_shape(method.init, KEY, params), seed=seed)


def merged(pair, params=PARAMS):
    return leaves(jax.jit(lambda params, delta: lj.merge(pair[0].apply(params, delta)))(params, pair[1]))


def dense_sum(pairs, weights, params=PARAMS):
    """base + the sum of weight times (merged - base), in float64."""
    base = {path: np.asarray(leaf, np.float64) for path, leaf in leaves(params).items()}
    total = dict(base)
    for pair, weight in zip(pairs, weights, strict=True):
        for path, leaf in merged(pair, params).items():
            total[path] = total[path] + weight * (np.asarray(leaf, np.float64) - base[path])
    return total


def is_sum(pair, pairs, weights, params=PARAMS):
    """Within a few roundings in float32 of the terms, whose sum may be smaller than they are."""
    want = dense_sum(pairs, weights, params)
    got = merged(pair, params)
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
    same(jax.jit(lifted)(again.apply(PARAMS, kept), X), jax.jit(lifted)(method.apply(PARAMS, delta), X))
    assert again.spec == method.spec


@pytest.mark.parametrize("name", ALL)
def test_a_sum_changes_the_weights_by_the_sum_of_the_changes(name):
    """Of an adapter of each method and a LoRA, minus another adapter of the method; the base is not touched."""
    one, two = given_delta(ALL[name], 1), given_delta(ALL[name], 2)
    other = given_delta(METHODS["lora"] if "tune" not in name else ALL[name], 3)
    pairs, weights = [one, other, two], [0.7, 2, -1.5]
    params = {**dict.fromkeys(METHODS), "vera": SHAPES}.get(name, PARAMS)
    before = digest(PARAMS)
    method, delta = add(pairs, weights, params=params)
    is_sum((method, delta), pairs, weights)
    adapted = method.apply(PARAMS, delta)
    close(jax.jit(lifted)(adapted, X), MODEL.apply({"params": lj.merge(adapted)}, X))
    again = lj.from_spec(json.loads(json.dumps(method.spec)))
    same(again.apply(PARAMS, delta), adapted)
    assert jax.tree.map(jnp.shape, again.init(KEY, PARAMS)) == jax.tree.map(jnp.shape, delta)
    assert digest(PARAMS) == before
    if params is None:
        same(add(pairs, weights, params=PARAMS)[1], delta)
        same(add(pairs, weights, params=SHAPES)[1], delta)


AXES = ["io", "oi", "vo", "sio", "soi", "iso", "ioo", "iio", "sioo", "kkio", "ssio"]


def low_rank(axes, rank, alpha=None):
    return lj.lora(lj.select("w", axes=axes), rank=rank, alpha=alpha, strict=False)


@pytest.mark.parametrize("axes", AXES)
def test_sums_in_every_layout(axes):
    params = {"w": normal(*(3, 2, 4, 5)[: len(axes)])}
    pairs = [given_delta(low_rank(axes, rank, alpha=3), rank, params) for rank in (2, 3)]
    method, delta = add(pairs, [-0.7, 2])
    is_sum((method, delta), pairs, [-0.7, 2], params)
    same(add(pairs, [-0.7, 2], params=params)[1], delta)


@st.composite
def weights_and_ranks(draw):
    axes = draw(st.sampled_from(AXES))
    params = {"w": normal(*draw(st.tuples(*[st.integers(1, 5)] * len(axes))), seed=draw(st.integers(0, 99)))}
    return axes, params, draw(st.integers(1, 6)), draw(st.integers(1, 6))


def dense(delta, stacked):
    """A B of the leaf as matrices `(stack, in, out)`, float64."""
    a, b = (np.asarray(delta["w"][name], np.float64) for name in "ab")
    count, rank = math.prod(a.shape[:stacked]), a.shape[-1]
    return a.reshape(count, -1, rank) @ b.reshape(count, rank, -1)


@given(weights_and_ranks(), st.floats(-2, 2), st.floats(-2, 2))
def test_ranks_add(case, first, second):
    axes, params, *ranks = case
    pairs = [given_delta(low_rank(axes, rank, alpha=3), n, params) for n, rank in enumerate(ranks)]
    methods, deltas = zip(*pairs, strict=True)
    method, delta = in_one_program(lambda *ds: add([*zip(methods, ds, strict=True)], [first, second]), *deltas)
    assert method.spec["rank"] == {"w": sum(ranks)} and delta["w"]["a"].shape[-1] == sum(ranks)
    scales = [first * 3 / ranks[0], second * 3 / ranks[1]]
    terms = [scale * dense(pair[1], axes.count("s")) for scale, pair in zip(scales, pairs, strict=True)]
    most = max(np.abs(term).max() for term in terms)
    np.testing.assert_allclose(dense(delta, axes.count("s")), sum(terms), rtol=0, atol=1e-6 * most + 1e-30)


def test_the_average_of_the_factors_is_not_the_average():
    one, two = given_delta(METHODS["lora"], 1), given_delta(METHODS["lora"], 2)
    naive = jax.tree.map(lambda a, b: (a + b) / 2, one[1], two[1])
    want = dense_sum([one, two], [0.5, 0.5])
    off = {path: np.abs(leaf - want[path]).max() for path, leaf in merged((one[0], naive)).items()}
    assert max(off.values()) > 0.05
    is_sum(add([one, two], [0.5, 0.5]), [one, two], [0.5, 0.5])


def test_the_factors_stand_side_by_side_and_weight_and_scale_are_in_b():
    one, two = given_delta(METHODS["lora"], 1), given_delta(lj.lora(KERNELS, rank=4, alpha=8), 2)
    method, delta = add([one, two], [2, -0.5])  # powers of two: exact
    path = "h_0/up/kernel"
    same(delta[path]["a"], jnp.concatenate([one[1][path]["a"], two[1][path]["a"]], -1))
    same(delta[path]["b"], jnp.concatenate([2 * 1.5 * one[1][path]["b"], -0.5 * 2 * two[1][path]["b"]], 0))
    assert method.spec["alpha"] is None and method.spec["rank"][path] == 6


def test_targets_are_united():
    up = given_delta(lj.lora(lj.select("**/up/kernel"), rank=2), 1)
    rest = given_delta(lj.chain(lj.lora(lj.select("h_0/{up,down}/kernel"), rank=1), lj.shift(lj.select("**/bias"))), 2)
    method, delta = add([up, rest], [1, -2])
    assert set(delta) == set(up[1]) | set(rest[1])
    assert [spec["method"] for spec in method.spec["of"]] == ["lora", "bias_delta"]
    assert method.spec["of"][0]["rank"] == {"h_0/up/kernel": 3, "h_1/up/kernel": 2, "h_0/down/kernel": 1}
    is_sum((method, delta), [up, rest], [1, -2])


def test_the_difference_of_an_adapter_and_itself_is_nothing():
    one, two = given_delta(METHODS["options"], 1), given_delta(METHODS["shared"], 2)
    is_sum(difference(one, two), [one, two], [1, -1])
    close(merged(difference(one, one)), leaves(PARAMS), 1e-6)


def test_layers_of_a_stack_need_the_shapes_of_the_base():
    params = stacked(PARAMS, 2)
    axes = {"h/*/kernel": "sio"}
    some = given_delta(lj.lora(lj.select("**/kernel", axes=axes, layers=[1]), rank=2), 1, params)
    whole = given_delta(lj.lora(lj.select("**/kernel", axes=axes), rank=1), 2, params)
    with pytest.raises(ValueError, match=r"h/down/kernel: the factors \['a', 'b'\] do not tell .*pass params="):
        add([whole, some], [1, 1])
    pair = add([some, whole], [0.5, 2], params=jax.eval_shape(lambda: params))
    is_sum(pair, [some, whole], [0.5, 2], params)
    scanned = Stack(layers=2, scan=True)
    run = lj.lift(lambda params: scanned.apply({"params": params}, X), on_dense="error")
    adapted = pair[0].apply(params, pair[1])
    close(jax.jit(run)(adapted), scanned.apply({"params": lj.merge(adapted)}, X))


def test_tuned_leaves_need_the_base_unless_they_are_averaged():
    one, two, three = (given_delta(NEED_VALUES["chain"], n) for n in (1, 2, 3))
    third = [1 / 3] * 3
    is_sum(average := add([one, two, three], third), [one, two, three], third)
    assert [spec["method"] for spec in average[0].spec["of"]] == ["lora", "tune"]
    same(add([one, two, three], third, params=SHAPES)[1], average[1])
    for wrong in ({}, {"params": SHAPES}, {"params": lj.without_tuned(PARAMS, one[1])}):
        with pytest.raises(ValueError, match=r"h_0/down/bias is tuned.*pass params="):
            difference(one, two, **wrong)
    bitfit = given_delta(lj.tune(lj.select("**/bias")), 4)
    with pytest.raises(ValueError, match="is tuned"):  # the other has no such leaves: the base does not cancel
        add([bitfit, given_delta(METHODS["lora"], 5)], [0.5, 0.5])
    is_sum(add([bitfit, one], [0.5, 0.5], params=PARAMS), [bitfit, one], [0.5, 0.5])


def test_rows_are_added_as_the_product_of_low_rank_that_they_are():
    ids = jnp.asarray([[1, 4, 10], [4, 4, 0]])
    model = Tied()
    params = started(model, ids)
    one = given_delta(lj.rows(lj.select("wte/*"), indices=[4, 10]), 1, params)
    two = given_delta(lj.rows(lj.select("wte/*"), indices=[4, 0]), 2, params)
    same(add([one], [1])[1], one[1])
    with pytest.raises(ValueError, match=r"wte/embedding: .*pass params="):
        add([one, two], [1, 0.5])
    method, delta = add([one, two], [1, 0.5], params=params)
    is_sum((method, delta), [one, two], [1, 0.5], params)
    run = lj.lift(lambda params: model.apply({"params": params}, ids), on_dense="error")
    adapted = method.apply(params, delta)
    close(run(adapted), model.apply({"params": lj.merge(adapted)}, ids))


def test_bf16_factors_are_added_in_float32():
    params = {"w": normal(8, 6)}
    method = lj.lora(lj.select("w"), rank=2, alpha=3, dtype=jnp.bfloat16)
    pairs = [given_delta(method, n, params) for n in (1, 2)]
    delta = add(pairs, [1 / 3, 1 / 7])[1]["w"]
    exact = [{name: np.asarray(x, np.float64) for name, x in delta["w"].items()} for _, delta in pairs]
    want = sum(w * 1.5 * f["a"] @ f["b"] for w, f in zip([1 / 3, 1 / 7], exact, strict=True))
    got = np.asarray(delta["a"], np.float64) @ np.asarray(delta["b"], np.float64)
    assert delta["a"].dtype == delta["b"].dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())  # a rounding or two of float32


def test_a_sum_survives_an_adapter_file(tmp_path):
    pair = add([given_delta(METHODS["options"], 1), given_delta(METHODS["shift"], 2)], [1, 2])
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

    close(jax.jit(summed)(deltas, jnp.asarray(weights)), summed(deltas, weights))
    slope = jax.grad(
        lambda w: jnp.sum(add(list(zip(methods[:1], deltas[:1], strict=True)), [w])[1]["h_0/up/kernel"]["b"])
    )
    assert float(slope(0.5)) != 0


@given(weights_and_ranks(), st.integers(1, 7))
def test_a_truncation_is_as_near_as_any_matrix_of_its_rank(case, rank):
    """Each layer's singular values, by NumPy from the dense change: their tail is the error."""
    axes, params, have, _ = case
    low, before = given_delta(low_rank(axes, have), 1, params)
    method, delta, residual = in_one_program(lambda delta: truncate(low, delta, rank), before)
    whole, got = (dense(each, axes.count("s")) for each in (before, delta))
    values = np.linalg.svd(whole, compute_uv=False)
    norm = np.sqrt(np.sum(values**2))
    best = np.sqrt(np.sum(values[:, rank:] ** 2)) / norm
    kept = min(rank, have, *whole.shape[1:])
    assert method.spec["rank"] == {"w": kept}
    assert jax.tree.map(jnp.shape, delta) == jax.tree.map(jnp.shape, jax.eval_shape(method.init, KEY, params))
    # within roundings of float32, of the whole
    assert abs(float(residual.paths["w"]) - best) < 2e-6 and float(residual.total) == float(residual.paths["w"])
    assert abs(np.linalg.norm(got - whole) / norm - best) < 2e-6


def test_truncation_forms_no_array_as_large_as_the_weight():
    params = {"one": normal(64, 96), "stack": normal(3, 64, 96)}
    selection = lj.select("*", axes={"one": "io", "stack": "sio"})
    method, delta = given_delta(lj.lora(selection, rank=4), 1, params)

    def both(delta):
        return truncate(*add([(method, delta), (method, delta)], [1, 2]), 3)[1:]

    def outputs(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in eqn.outvars)
            for inner in (x for x in eqn.params.values() if hasattr(x, "eqns")):
                yield from outputs(getattr(inner, "jaxpr", inner))

    sizes = list(outputs(jax.make_jaxpr(both)(delta)))
    assert len(sizes) > 50 and max(sizes) == 3 * 96 * 8  # B of rank 8 of the stack; less than one 64 x 96


def test_a_truncation_keeps_the_rest_and_takes_a_rank_for_each_path():
    method = lj.chain(lj.lora(KERNELS, rank=4), lj.tune(lj.select("h_0/*/bias")), lj.shift(lj.select("h_1/*/bias")))
    delta = given_delta(method, 1)[1]
    small, cut, residual = truncate(method, delta, {"**/up/*": 1, "**": 4})
    for path in delta:
        if "bias" in path:
            same(cut[path], delta[path])
        else:
            assert cut[path]["a"].shape[-1] == (1 if "up" in path else 4)
    assert set(residual.paths) == {path for path in delta if "kernel" in path}
    assert all(float(share) == 0 for path, share in residual.paths.items() if "up" not in path)
    norms = {path: np.linalg.norm(delta[path]["a"] @ delta[path]["b"]) for path in residual.paths}
    lost = [norm * float(residual.paths[path]) for path, norm in norms.items()]
    assert abs(float(residual.total) - np.linalg.norm(lost) / np.linalg.norm([*norms.values()])) < 1e-5
    close(merged((small, cut))["h_0/down/kernel"], merged((method, delta))["h_0/down/kernel"], 1e-6)


def test_a_change_of_zero_is_truncated_without_nan():
    _, delta, residual = truncate(METHODS["lora"], METHODS["lora"].init(KEY, PARAMS), 1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(residual))
    same(merged((lj.lora(KERNELS, rank=1), delta)), leaves(PARAMS))


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
    for pair in ((method, method.init(KEY, PARAMS)), (chained, method.init(KEY, PARAMS))):
        with pytest.raises(ValueError, match=named):
            add([pair], [1])
        with pytest.raises(ValueError, match=named):
            add([given_delta(METHODS["lora"], 1), pair], [1, 1], params=PARAMS)
        with pytest.raises(ValueError, match=named):
            truncate(*pair, 1)


def test_a_method_of_ones_own_adds_if_lift_meets_it_as_a_product_of_low_rank(monkeypatch):
    """What its class says, where its name says nothing."""
    dora = lj.dora(KERNELS, rank=2)
    delta = dora.init(KEY, PARAMS)
    mine = dora._replace(spec={"method": "mine"})
    with pytest.raises(ValueError, match="h_0/down/kernel: changes of Scaled do not add"):
        add([(mine, delta)], [2], params=PARAMS)
    lora = METHODS["lora"]._replace(spec={"method": "mine"})
    pair = given_delta(METHODS["lora"], 1)
    is_sum(add([(lora, pair[1])], [2], params=PARAMS), [pair], [2])


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
    other = given_delta(METHODS["lora"], 1, wider)
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
        add([given_delta(low_rank(axes, 1), 1, square) for axes in ("io", "oi")], [1, 1])
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
