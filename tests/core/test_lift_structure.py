"""Structural operations on adapted weights, and einsum on either side, with nothing dense formed."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

import lora_jax as lj
from lora_jax.planning.flops import equations
from tests.helpers.marks import slow_but
from tests.helpers.reference import agree, normal, random_delta
from tests.helpers.structural import CASES, W, X

# What another case, or the einsums of `test_einsum_in_any_order_on_either_side`, show too.
REPEATED = (
    *("transpose twice", "slice of outputs", "slice of inputs", "split at places", "dynamic slice", "w[-1]"),
    *("a traced row", "the first rows (positions)", "vdot of a column", "einsum of one axis"),
    *("einsum weight first", "einsum weight second", "einsum output first", "einsum with several free axes"),
)


@pytest.mark.parametrize("name", slow_but(CASES, *(CASES.keys() - set(REPEATED))))
def test_structure(name):
    """And no product or sum in forward or backward pass has the shape of the weight, in any order of its axes."""
    fn, params, axes = CASES[name]
    allowed = "allow" if name == "einsum summing experts" else "error"
    _, jaxpr = agree(fn, params, X, axes={"w": axes}, on_dense=allowed)
    if name not in ("einsum summing experts", "vdot of a column", "one row"):
        assert not dense_ones(jaxpr, params["w"])


def dense_ones(jaxpr, w):
    """The products and sums in a jaxpr that have the shape of w."""
    weight = sorted(n for n in w.shape if n > 1)
    return [
        eqn.primitive.name
        for eqn in equations(jaxpr)
        if eqn.primitive.name in ("dot_general", "add", "add_any", "mul", "sub")
        and sorted(n for n in eqn.outvars[0].aval.shape if n > 1) == weight
    ]


def adapted_of(params, axes, rank=2):
    method = lj.lora(lj.select("w", axes=axes), rank=rank)
    return method, random_delta(method, params)


def test_the_check_above_sees_a_dense_weight():
    def loss(delta):
        return jnp.sum(X @ (W["w"] + delta["w"]["a"] @ delta["w"]["b"]))

    made = dense_ones(jax.make_jaxpr(jax.value_and_grad(loss))(adapted_of(W, "io")[1]).jaxpr, W["w"])
    assert "dot_general" in made and "add" in made


@settings(max_examples=4)
@example(x_order="abi", w_order="io", out_order="oab", weight_first=True)
@example(x_order="bia", w_order="oi", out_order="abo", weight_first=False)
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
