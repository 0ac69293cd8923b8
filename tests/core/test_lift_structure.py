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

X = normal(3, 8, seed=5)
W = {"w": normal(8, 12, seed=1)}
FUSED = {"w": normal(8, 24, seed=1)}
STACK = {"w": normal(3, 8, 12, seed=3)}
HEADS = {"w": normal(8, 3, 4, seed=4)}
JOIN = {"w": normal(3, 4, 8, seed=4)}

CASES = {
    # name: (function, params, axes)
    "transpose": (lambda p, x: p["w"].T @ x.T, W, "io"),
    "transpose twice": (lambda p, x: x @ p["w"].T.T, W, "io"),
    "oi by hand": (lambda p, x: x @ p["w"].T, {"w": normal(12, 8)}, "oi"),
    "reshape of outputs to heads": (lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(8, 3, 4)), W, "io"),
    "reshape of heads to outputs": (lambda p, x: x @ p["w"].reshape(8, 12), HEADS, "ioo"),
    "reshape of joined inputs": (lambda p, x: x.repeat(2, 1)[:, :12] @ p["w"].reshape(12, 8), JOIN, "iio"),
    "reshape of inputs apart": (
        lambda p, x: jnp.einsum("bcd,cdo->bo", x.reshape(3, 2, 4), p["w"].reshape(2, 4, 12)),
        W,
        "io",
    ),
    "slice of outputs": (lambda p, x: x @ p["w"][:, 2:7], W, "io"),
    "slice of inputs": (lambda p, x: x[:, :5] @ p["w"][3:], W, "io"),
    "slice with a step": (lambda p, x: x[:, ::2] @ p["w"][::2, 1::3], W, "io"),
    "slice of both, transposed": (lambda p, x: x[:, :5] @ p["w"].T[2:7, :5].T, W, "io"),
    "split in three": (
        lambda p, x: [x @ part * (n + 1) for n, part in enumerate(jnp.split(p["w"], 3, axis=1))],
        FUSED,
        "io",
    ),
    "split at places": (lambda p, x: [x @ part for part in jnp.split(p["w"], [4, 9], axis=1)], FUSED, "io"),
    "split of inputs": (
        lambda p, x: [x[:, :4] @ part for part in jnp.split(p["w"], 2, axis=0)],
        W,
        "io",
    ),
    "dynamic slice": (
        lambda p, x: x @ lax.dynamic_slice(p["w"], (jnp.int32(0), jnp.int32(5)), (8, 4)),
        W,
        "io",
    ),
    "dynamic slice past the end": (
        lambda p, x: x @ lax.dynamic_slice(p["w"], (0, jnp.int32(10)), (8, 4)),  # clamps
        W,
        "io",
    ),
    "dynamic slice of inputs": (
        lambda p, x: x[:, :4] @ lax.dynamic_slice_in_dim(p["w"], jnp.int32(2), 4, axis=0),
        W,
        "io",
    ),
    "w[0]": (lambda p, x: x @ p["w"][0], STACK, "sio"),
    "w[-1]": (lambda p, x: x @ p["w"][-1], STACK, "sio"),
    "w[i] traced": (lambda p, x: x @ p["w"][jnp.argmax(x[0]) % 3], STACK, "sio"),
    "for w in stack": (lambda p, x: sum((n + 1) * x @ w for n, w in enumerate(p["w"])), STACK, "sio"),
    "slice of the stack": (lambda p, x: jnp.einsum("bi,sio->sbo", x, p["w"][1:]), STACK, "sio"),
    "moved stack": (lambda p, x: x @ jnp.moveaxis(p["w"], 0, -1)[..., 1], STACK, "sio"),
    "expand and squeeze": (lambda p, x: x @ jnp.squeeze(p["w"][None, :, None, :], (0, 2)), W, "io"),
    "broadcast to a stack": (
        lambda p, x: jnp.einsum("sbi,sio->sbo", jnp.stack([x, 2 * x]), jnp.broadcast_to(p["w"], (2, 8, 12))),
        W,
        "io",
    ),
    "flattened stack of one": (lambda p, x: x @ p["w"].reshape(8, 12), {"w": normal(1, 8, 12)}, "sio"),
    "head of a head": (lambda p, x: x @ p["w"][:, 1], HEADS, "ioo"),
    "part of each head": (lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"][:, :, 1:3]), HEADS, "ioo"),
    "swapped heads": (lambda p, x: jnp.einsum("bi,idh->bdh", x, p["w"].swapaxes(1, 2)), HEADS, "ioo"),
    "rows": (lambda p, x: p["w"][jnp.array([[3, 0], [7, 7]])], W, "vo"),
    "one row": (lambda p, x: p["w"][5], W, "vo"),
    "a traced row": (lambda p, x: p["w"][jnp.argmax(x[0])], W, "vo"),
    "rows by vmap": (lambda p, x: jax.vmap(lambda i: p["w"][i])(jnp.array([1, 1, 6])), W, "vo"),
    "the first rows (positions)": (lambda p, x: p["w"][:5][jnp.arange(4)], W, "vo"),
    "row slice as positions": (lambda p, x: x[:, :1] + jnp.sum(p["w"][jnp.arange(3)], 1)[:, None], W, "vo"),
    "head of the first rows": (lambda p, x: normal(2, 12) @ p["w"][:6].T, W, "vo"),
    "einsum weight first": (lambda p, x: jnp.einsum("io,bi->bo", p["w"], x), W, "io"),
    "einsum weight second": (lambda p, x: jnp.einsum("bi,io->bo", x, p["w"]), W, "io"),
    "einsum output first": (lambda p, x: jnp.einsum("bi,io->ob", x, p["w"]), W, "io"),
    "einsum with several free axes": (
        lambda p, x: jnp.einsum("abi,io->oab", x.reshape(3, 2, 4), p["w"][:4]),
        W,
        "io",
    ),
    "einsum to heads": (lambda p, x: jnp.einsum("ihd,bi->hbd", p["w"], x), HEADS, "ioo"),
    "einsum from heads": (lambda p, x: jnp.einsum("bhd,hdo->bo", normal(2, 3, 4), p["w"]), JOIN, "iio"),
    "einsum from heads, other order": (
        lambda p, x: jnp.einsum("hdo,bdh->ob", p["w"], normal(2, 4, 3)),
        JOIN,
        "iio",
    ),
    "einsum of experts": (lambda p, x: jnp.einsum("sio,bsi->bso", p["w"], normal(2, 3, 8)), STACK, "sio"),
    "einsum summing experts": (lambda p, x: jnp.einsum("sio,bsi->bo", p["w"], normal(2, 3, 8)), STACK, "sio"),
    "einsum of one axis": (lambda p, x: jnp.einsum("i,io->o", x[0], p["w"]), W, "io"),
    "tensordot": (lambda p, x: jnp.tensordot(p["w"], x, ((0,), (1,))), W, "io"),
    "vdot of a column": (lambda p, x: x @ p["w"][:, 3:4], W, "io"),
    "batch axis from vmap": (lambda p, x: jax.vmap(lambda x: p["w"].T @ x)(x), W, "io"),
}


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

    agree(fn, w, x, axes={"w": "".join(w_order)}, jit=False)
