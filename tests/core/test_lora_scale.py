"""Rank, alpha, scale, strength and dtype of LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.core.lifting.axis_ops import cast
from tests.helpers.reference import close, densely, merged_params, normal, random_delta, same

KEY = jax.random.key(0)
PARAMS = {"q": {"kernel": normal(6, 5, seed=1)}, "v": {"kernel": normal(6, 7, seed=2)}}
ALL = lj.select("**")
X = normal(3, 6, seed=3)


def products(params, x):
    return x @ params["q"]["kernel"], x @ params["v"]["kernel"]


def merged(method, delta, **kwargs):
    return merged_params(method, PARAMS, delta, **kwargs)


def outputs(params):
    """The products with dense params, by numpy."""
    return products(jax.tree.map(np.asarray, params), np.asarray(X))


@pytest.mark.parametrize(
    "options, scale",
    [
        ({}, 1.0),  # alpha defaults to the rank
        ({"alpha": 32}, 8.0),
        ({"alpha": 0.5}, 0.125),
        ({"alpha": 32, "scale_rule": "alpha/sqrt(r)"}, 16.0),
        ({"scale_rule": "alpha/sqrt(r)"}, 2.0),
    ],
)
def test_scale_rules(options, scale):
    method = lj.lora(ALL, rank=4, **options)
    delta = random_delta(method, PARAMS)
    close(merged(method, delta), densely(PARAMS, delta, scale=scale), 1e-6)
    adapted = method.apply(PARAMS, delta)
    close(jax.jit(lj.lift(products))(adapted, X), outputs(densely(PARAMS, delta, scale=scale)))


def test_rank_and_alpha_as_mappings_whose_first_match_wins():
    method = lj.lora(ALL, rank={"q/*": 2, "**": 4}, alpha={"v/**": 8, "q/kernel": 6, "**": 99})
    delta = random_delta(method, PARAMS)
    assert delta["q/kernel"]["a"].shape == (6, 2) and delta["v/kernel"]["b"].shape == (4, 7)
    want = {
        "q": densely({"q": PARAMS["q"]}, {"q/kernel": delta["q/kernel"]}, scale=3.0)["q"],
        "v": densely({"v": PARAMS["v"]}, {"v/kernel": delta["v/kernel"]}, scale=2.0)["v"],
    }
    close(merged(method, delta), want, 1e-6)


@pytest.mark.parametrize("options", [{"rank": {"q/*": 2}}, {"rank": 2, "alpha": {"q/*": 2}}])
def test_a_mapping_without_a_match_is_an_error_that_names_the_path(options):
    with pytest.raises(ValueError, match="v/kernel"):
        method = lj.lora(ALL, **options)
        method.apply(PARAMS, random_delta(method, PARAMS))


@pytest.mark.parametrize("rank", [0, -1, 6, {"q/*": 5, "**": 7}])
def test_a_rank_below_one_or_above_the_smaller_side_is_an_error(rank):
    with pytest.raises(ValueError, match="rank"):
        lj.lora(ALL, rank=rank).init(KEY, PARAMS)
    with pytest.raises(ValueError, match="rank"):
        lj.check(lj.lora(ALL, rank=rank), PARAMS)


def test_the_sides_of_a_rank_are_products_of_axes():
    params = {"w": normal(2, 3, 6)}
    lj.lora(lj.select("w", axes="iio"), rank=6).init(KEY, params)  # min(2 * 3, 6)
    for axes, rank in {"iio": 7, "ioo": 3, "sio": 4}.items():
        with pytest.raises(ValueError, match="w"):
            lj.lora(lj.select("w", axes=axes), rank=rank).init(KEY, params)


def test_lora_on_a_vector_is_an_error():
    with pytest.raises(ValueError, match="bias"):
        lj.lora(ALL, rank=1).init(KEY, {"d": {"bias": normal(5)}})


def test_alpha_may_be_traced():
    method = lj.lora(ALL, rank=2, alpha=5.0)
    delta = random_delta(method, PARAMS)

    @jax.jit
    def run(alpha, delta):
        traced = lj.lora(ALL, rank=2, alpha=alpha)
        return lj.lift(products)(traced.apply(PARAMS, delta), X)

    close(run(5.0, delta), outputs(densely(PARAMS, delta, scale=2.5)))
    nine = outputs(densely(PARAMS, delta, scale=4.5))
    close(run(jnp.float32(9.0), delta), nine)
    many = jax.jit(jax.vmap(run, (0, None)))(np.float32([5.0, 9.0]), delta)
    close(jax.tree.map(lambda leaf: np.asarray(leaf)[1], many), nine)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, -1.0, 2.0])
def test_strength_scales_the_change(strength):
    method = lj.lora(ALL, rank=2, alpha=3)
    delta = random_delta(method, PARAMS)

    @jax.jit
    def run(s):
        adapted = method.apply(PARAMS, delta, strength=s)
        return lj.merge(adapted), lj.lift(products)(adapted, X)

    dense = densely(PARAMS, delta, scale=1.5 * strength)
    weights = merged(method, delta, strength=strength)
    close(weights, dense, 1e-6)
    traced, got = run(strength)
    close(traced, dense, 1e-6)
    close(got, outputs(dense))
    if strength == 0.0:
        same(weights, PARAMS)


def test_scale_is_a_factor_and_never_static():
    method = lj.lora(lj.select("w", axes="sio"), rank=2)
    params = {"w": normal(3, 4, 5)}
    delta = random_delta(method, params)
    one, two = (method.apply(params, delta, strength=s) for s in (1.0, 0.5))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert one["w"].scale.shape == (3,)  # layout "s"
    other = lj.lora(lj.select("w", axes="sio"), rank=2, alpha=7)
    assert jax.tree.structure(other.apply(params, delta)) == jax.tree.structure(one)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", jnp.float16])
def test_dtype_of_the_factors(dtype):
    method = lj.lora(ALL, rank=2, dtype=dtype)
    delta = random_delta(method, PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype(dtype)}
    out = jax.jit(lj.lift(products))(method.apply(PARAMS, delta), X)
    assert {leaf.dtype for leaf in out} == {jnp.dtype("float32")}
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), delta)
    close(out, outputs(densely(PARAMS, wide, scale=1.0)))  # half-precision factors, float32 arithmetic
    assert np.isfinite(np.asarray(out[0])).all()


def test_float32_factors_on_a_bfloat16_base():
    base = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), PARAMS)
    method = lj.lora(ALL, rank=2)
    delta = random_delta(method, base)
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype("float32")}
    out = jax.jit(lj.lift(products))(method.apply(base, delta), np.asarray(X).astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in out} == {jnp.dtype("bfloat16")}
    want = outputs(densely(PARAMS, delta, scale=1.0))
    close(jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), out), want, 2e-2)


def test_the_scale_gets_no_gradient():
    """Of alpha and of strength, traced or as leaves of adapted params; the factors have theirs."""
    delta = random_delta(lj.lora(ALL, rank=2), PARAMS)

    def loss(alpha, strength, delta):
        adapted = lj.lora(ALL, rank=2, alpha=alpha).apply(PARAMS, delta, strength=strength)
        return sum(jnp.sum(jnp.sin(y)) for y in lj.lift(products)(adapted, X))

    of_alpha, of_strength, of_delta = jax.jit(jax.grad(loss, (0, 1, 2)))(3.0, 1.0, delta)
    assert of_alpha == of_strength == 0.0
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(of_delta))


def test_the_scale_keeps_its_precision_where_a_weight_is_cast():
    """Weights in bfloat16, sums in float32: 1.25 / 3 is rounded once, and 1 / 3 before it not at all."""
    params = {"w": jnp.zeros((6, 5))}
    method = lj.lora(lj.select("w"), rank=3, alpha=1)
    adapted = method.apply(params, lj.Delta({"w": {"a": jnp.eye(6, 3), "b": jnp.ones((3, 5))}}))
    low = cast(adapted["w"], jnp.bfloat16)
    assert low.a.dtype == low.b.dtype == low.base.dtype == jnp.bfloat16 and low.scale.dtype == jnp.float32

    def product(p):
        x = 1.25 * jnp.eye(3, 6)
        return lax.dot(x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    got = lj.lift(product, on_dense="error")(adapted)
    same(got, jnp.full((3, 5), 1.25 / 3).astype(jnp.bfloat16).astype(jnp.float32))
