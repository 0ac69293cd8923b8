"""Structural operations on adapted weights, and einsum on either side, with nothing dense formed."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import lora_jax as lj
from lora_jax.planning.flops import equations
from tests.helpers.reference import agree, normal
from tests.helpers.structural import CASES, W, X


@pytest.mark.parametrize("name", CASES)
def test_structure(name):
    fn, params, axes = CASES[name]
    allowed = "allow" if name == "einsum summing experts" else "error"
    agree(fn, params, X, axes={"w": axes}, on_dense=allowed)


def adapted_of(params, axes, rank=2):
    method = lj.lora(lj.select("w", axes=axes), rank=rank)
    return method, method.init(jax.random.key(0), params)


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("einsum summing experts", "vdot of a column", "one row")]
)
def test_nothing_dense_is_formed(name):
    """No product or sum in forward or backward pass has the shape of the weight, in any order of its axes."""
    fn, params, axes = CASES[name]
    method, delta = adapted_of(params, axes)

    def loss(delta, params, x):
        out = lj.lift(fn)(method.apply(params, delta), x)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))

    weight = sorted(n for n in params["w"].shape if n > 1)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(delta, params, X)
    made = [
        eqn.primitive.name
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name in ("dot_general", "add", "add_any", "mul", "sub")
        and sorted(n for n in eqn.outvars[0].aval.shape if n > 1) == weight
    ]
    assert not made


def test_the_check_above_sees_a_dense_weight():
    def loss(delta):
        return jnp.sum(X @ (W["w"] + delta["w"]["a"] @ delta["w"]["b"]))

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(adapted_of(W, "io")[1])
    made = [e.primitive.name for e in equations(jaxpr.jaxpr) if e.outvars[0].aval.shape == (8, 12)]
    assert "dot_general" in made and "add" in made


@given(st.permutations("abi"), st.permutations("io"), st.permutations("abo"), st.booleans())
def test_einsum_in_any_order_on_either_side(x_order, w_order, out_order, weight_first):
    sizes = {"a": 2, "b": 3, "i": 8, "o": 5}
    x = normal(*(sizes[n] for n in x_order))
    w = {"w": normal(*(sizes[n] for n in w_order))}
    terms, out = ["".join(x_order), "".join(w_order)], "".join(out_order)
    equation = f"{','.join(terms[::-1] if weight_first else terms)}->{out}"

    def fn(p, x):
        return jnp.einsum(equation, *((p["w"], x) if weight_first else (x, p["w"])))

    agree(fn, w, x, axes={"w": "".join(w_order)})


def products_of(fn, params, axes):
    """The equations of the products that a lifted function makes, of the base and of the factors."""
    method, delta = adapted_of(params, axes)
    jaxpr = jax.make_jaxpr(lambda d, x: lj.lift(fn)(method.apply(params, d), x))(delta, X).jaxpr
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]


def test_products_of_factors_have_the_precision_and_the_sums_of_the_weights():
    def fn(p, x):
        return lax.dot(x, p["w"], precision="highest", preferred_element_type=jnp.float32)

    made = products_of(fn, W, "io")
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert [eqn.params["precision"] for eqn in made] == [highest] * 3
    assert [eqn.params["preferred_element_type"] for eqn in made] == [jnp.float32] * 3
