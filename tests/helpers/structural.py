"""Uses of a weight through slices, reshapes, look-ups and einsums: {name: (function, params, axes)}."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.helpers.reference import normal

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
    "a stack of one by reshape": (
        lambda p, x: jnp.einsum("sbi,sio->sbo", x[None], p["w"].reshape(1, 8, 12)),
        W,
        "io",
    ),
    "a stack the other way": (lambda p, x: jnp.einsum("sbo,sio->sbi", normal(3, 2, 12), p["w"]), STACK, "svo"),
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

# One of each kind of operation. The axes are followed once for all methods, which is shown over all cases with LoRA.
KINDS = (
    *("transpose", "reshape of heads to outputs", "reshape of inputs apart", "slice of both, transposed"),
    *("split in three", "dynamic slice of inputs", "w[i] traced", "moved stack", "expand and squeeze"),
    *("broadcast to a stack", "rows by vmap", "swapped heads", "einsum from heads, other order"),
    *("einsum of experts", "einsum summing experts", "batch axis from vmap"),
)


def slow_beyond_kinds(names: Iterable[str]) -> list[Any]:
    """The names as parameters; those that repeat a kind of operation are slow."""
    return [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in names]
