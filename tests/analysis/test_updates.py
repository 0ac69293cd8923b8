"""`updates`: the factors of every method's change, against merged - base in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import analysis
from tests.helpers.adapters import AXES, given_delta, low_rank, weights_and_ranks
from tests.helpers.dense import as_matrices, dense_changes, near, product
from tests.helpers.reference import normal, random_delta, same

KEY = jax.random.key(0)
FACTORIES = {
    "rslora": lambda w: lj.lora(w, rank=2, alpha=3, scale_rule="alpha/sqrt(r)", strict=False),
    "pissa": lambda w: lj.pissa(w, rank=1, alpha=3),
    "vera": lambda w: lj.vera(w, rank=3),
    "dora": lambda w: lj.dora(w, rank=2, strict=False),
    "lokr": lambda w: lj.lokr(w, rank=2, alpha=3),
    "ia3": lj.ia3,
    "tune": lj.tune,
}
LOW_RANK = {"rslora": 2, "pissa": 2, "vera": 3}  # the widths of their factors


@given(weights_and_ranks(), st.sampled_from(sorted(FACTORIES)))
def test_the_product_of_the_factors_is_what_merging_changes(case, name):
    """Within some roundings of the base, from which the dense reference is a difference."""
    axes, params, *_ = case
    method = FACTORIES[name](lj.select("w", axes=axes))
    delta = random_delta(method, params)
    update = jax.jit(lambda params, delta: analysis.updates(method, delta, params))(params, delta)["w"]
    want = dense_changes(method, params, delta, {"w": axes})["w"]
    size = max(np.abs(want).max(), float(jnp.abs(params["w"]).max()))
    np.testing.assert_allclose(product(update), want, rtol=0, atol=3e-6 * size)
    assert update.a.shape[:2] == want.shape[:2] and update.a.dtype == update.b.dtype == jnp.float32
    rank = LOW_RANK.get(name, min(want.shape[1:]))
    assert update.a.shape[2] == update.b.shape[1] == rank
    if name not in LOW_RANK:  # U sqrt(S) and sqrt(S) V^T
        wide = [np.asarray(x, np.float64) for x in (update.a, update.b.swapaxes(1, 2))]
        grams = [np.einsum("smr,smq->srq", x, x) for x in wide]
        np.testing.assert_allclose(grams[0], grams[1], rtol=0, atol=2e-5 * max(grams[0].max(), 1e-6))
        values = np.linalg.svd(want, compute_uv=False)
        np.testing.assert_allclose(np.einsum("srr->sr", grams[0]), values, rtol=0, atol=2e-5 * max(values.max(), size))


@pytest.mark.parametrize("axes", AXES)
def test_the_factors_of_a_lora_are_its_own_in_every_layout(axes):
    params = {"w": normal(*(3, 2, 4, 5)[: len(axes)])}
    method, delta = given_delta(low_rank(axes, 2, alpha=3), 1, params)
    update = analysis.updates(method, delta)["w"]
    stack = as_matrices(params["w"], axes).shape[0]
    a, b = delta["w"]["a"], delta["w"]["b"]
    same(update.a, a.reshape(stack, -1, 2))
    near(update.b, 1.5 * np.asarray(b).reshape(stack, 2, -1), 1e-7)
    same(analysis.updates(method, delta, params), {"w": update})
    same(analysis.updates(method, delta, jax.eval_shape(lambda: params)), {"w": update})
    weight = analysis.weights(method, delta, params)["w"]
    near(weight, as_matrices(params["w"], axes), 0)
    assert weight.shape == (*update.a.shape[:2], update.b.shape[2])


def test_some_layers_of_a_stack_leave_the_others_zero():
    params = {"w": normal(3, 4, 5)}
    method, delta = given_delta(lj.lora(lj.select("w", axes="sio", layers=[1]), rank=2), 1, params)
    update = analysis.updates(method, delta, params)["w"]
    near(product(update), dense_changes(method, params, delta, {"w": "sio"})["w"], 1e-5)
    assert not np.any(product(update)[[0, 2]])


def test_rows_of_an_embedding_are_a_product_of_low_rank():
    params = {"embedding": normal(9, 4)}
    method, delta = given_delta(lj.token_rows(lj.select("embedding"), indices=[7, 2]), 1, params)
    update = analysis.updates(method, delta, params)["embedding"]
    assert update.a.shape == (1, 9, 2)
    near(product(update), dense_changes(method, params, delta, {"embedding": "vo"})["embedding"], 1e-6)


@pytest.mark.parametrize("name", ["rslora", "dora", "lokr", "ia3"])
def test_of_a_base_in_16_bits_the_change_is_not_rounded(name):
    method, base = FACTORIES[name](lj.select("w")), normal(6, 5).astype(jnp.bfloat16)
    delta = random_delta(method, {"w": base}, size=0.01)
    update, exact = (analysis.updates(method, delta, {"w": w})["w"] for w in (base, base.astype(jnp.float32)))
    near(product(update), product(exact), 1e-5)
    assert update.a.dtype == jnp.float32


@pytest.mark.parametrize("name", ["rslora", "dora", "lokr", "ia3"])
def test_of_a_quantized_base_the_change_is_that_of_its_values(name):
    select = lj.select("w", axes="io")
    quantized = lj.quantize({"w": normal(64, 5)}, select, bits=8)
    dense = {"w": quantized["w"].materialize()}
    method = FACTORIES[name](select)
    delta = random_delta(method, dense)
    got, want = (analysis.updates(method, delta, params)["w"] for params in (quantized, dense))
    near(product(got), product(want), 1e-5)
    same(analysis.weights(method, delta, quantized)["w"], dense["w"][None])


def test_bf16_factors_are_multiplied_in_float32():
    method = lj.lora(lj.select("w"), rank=2, alpha=1, dtype=jnp.bfloat16)
    delta = random_delta(method, {"w": normal(6, 5)})
    a, b = (np.asarray(delta["w"][name], np.float64) for name in "ab")
    near(product(analysis.updates(method, delta)["w"])[0], 0.5 * a @ b, 1e-7)


PARAMS = {"up": {"kernel": normal(4, 5), "bias": normal(5)}, "down": {"kernel": normal(5, 4)}, "wte": normal(7, 4)}
LORA = lj.lora(lj.select("up/kernel"), rank=2)
NO_MATRICES = {
    "shift": lj.bias_delta(lj.select("up/bias")),
    "tune": lj.tune(lj.select("up/bias")),
    "adapter": lj.adapter({"mlp_out": (2, 4)}, rank=2),
    "compacter": lj.compacter({"mlp_out": (2, 4)}, rank=2, n=2),
    "prefix_embedding": lj.prefix_embedding(lj.select("wte", axes="vo"), prefix=2),
    "prefix_layer": lj.prefix_layer({"block_out": (2, 4)}, vocabulary=9, prefix=1),
}


@pytest.mark.parametrize("name", NO_MATRICES)
def test_what_is_no_matrix_of_the_base_is_left_out(name):
    method = lj.chain(LORA, NO_MATRICES[name])
    delta = random_delta(method, PARAMS)
    want = analysis.updates(LORA, lj.Delta({"up/kernel": delta["up/kernel"]}))
    same(analysis.updates(method, delta, PARAMS), want)
    if name != "tune":  # whose values are none of a change without a base
        same(analysis.updates(method, delta), want)
    with pytest.raises(ValueError, match=f"nothing that this '{NO_MATRICES[name].spec['method']}' changes is a matrix"):
        analysis.updates(NO_MATRICES[name], random_delta(NO_MATRICES[name], PARAMS), PARAMS)


def test_a_missing_base_is_named():
    for method in (lj.dora(lj.select("up/kernel"), rank=2), lj.tune(lj.select("**/kernel"))):
        delta = random_delta(method, PARAMS)
        for params in (None, jax.eval_shape(lambda: PARAMS)):
            with pytest.raises(ValueError, match=r"kernel: what (Dora|Tuned) changes .*pass params="):
                analysis.updates(method, delta, params)
    ia3, lokr = lj.ia3(lj.select("down/kernel")), lj.lokr(lj.select("up/kernel"), rank=2)
    with pytest.raises(ValueError, match=r"down/kernel: the factors .* do not tell .*pass params="):
        analysis.updates(ia3, random_delta(ia3, PARAMS))
    delta = random_delta(lokr, PARAMS)
    shapes = analysis.updates(lokr, delta, jax.eval_shape(lambda: PARAMS))
    same(shapes, analysis.updates(lokr, delta, PARAMS))


def test_tuned_leaves_need_named_axes_beyond_two():
    params = {"w": normal(2, 3, 4)}
    method = lj.tune(lj.select("w"))
    with pytest.raises(ValueError, match=r"w has shape .* name its 3 axes"):
        analysis.updates(method, random_delta(method, params), params)
    named = lj.chain(LORA, lj.tune(lj.select("w", axes="sio")))
    params |= PARAMS
    update = analysis.updates(named, random_delta(named, params), params)["w"]
    assert update.a.shape == (2, 3, 3) and update.b.shape == (2, 3, 4)
