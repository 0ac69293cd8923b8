"""Products of two factors: their singular values, the nearest one of a lower rank, and the adapter made of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.selection import look_up, select
from lora_jax.core.transforms import Delta, Factors, ParamTransform, chain
from lora_jax.methods.bias_delta import bias_delta
from lora_jax.methods.lora import lora
from lora_jax.methods.ranges import COUNT
from lora_jax.methods.tune import tune

Pair = tuple[ParamTransform, Delta]


class Residual(NamedTuple):
    """What a truncation left out: its Frobenius norm over the whole's, for each path (a stack is one) and all.

    An example is in `truncate`.
    """

    paths: dict[str, Array]
    total: Array


@jax.default_matmul_precision("highest")
def svd(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """The singular value decomposition of a b, for a (..., m, r) and b (..., r, n): left vectors (..., m, k), values
    (..., k) and right vectors (..., k, n), with k = min(m, r, n). Of the core of QR decompositions: a b is not formed.

    >>> left, values, right = svd(jnp.array([[3.0], [4.0]]), jnp.array([[2.0, 0.0, 0.0]]))
    >>> float(values[0].round(4)), right.shape
    (10.0, (1, 3))
    """
    q, left = jnp.linalg.qr(a)
    p, right = jnp.linalg.qr(b.swapaxes(-1, -2))
    u, values, v = jnp.linalg.svd(left @ right.swapaxes(-1, -2), full_matrices=False)
    return q @ u, values, v @ p.swapaxes(-1, -2)


def truncated(a: Array, b: Array, stacked: int, rank: int) -> tuple[dict[str, Array], Array]:
    """The factors A `(s.., i.., r)` and B `(s.., r, o..)` at this rank, and the squared norms of what is left out and
    of all."""
    lead, r = a.shape[:stacked], a.shape[-1]
    u, values, v = svd(a.reshape(*lead, -1, r), b.reshape(*lead, r, -1))
    root = jnp.sqrt(values[..., None, :rank])
    factors = with_axes_of(a, b, stacked, u[..., :rank] * root, root.swapaxes(-1, -2) * v[..., :rank, :])
    return factors, jnp.stack([jnp.sum(values[..., first:] ** 2) for first in (rank, 0)])


def with_axes_of(a: Array, b: Array, stacked: int, new_a: Array, new_b: Array) -> dict[str, Array]:
    """New factors (.., inputs, r) and (.., r, outputs), of any r, with the axes of A `(s.., i.., r)` and B
    `(s.., r, o..)`."""
    outer = b.shape[stacked + 1 :]
    return {"a": new_a.reshape(*a.shape[:-1], -1), "b": new_b.reshape(*b.shape[:stacked], -1, *outer)}


def checked_pairs(pairs: Sequence[Pair], weights: Sequence[Any]) -> tuple[list[Pair], list[Any]]:
    """Both as lists; a ValueError unless there is a pair, and a weight for each."""
    pairs, weights = list(pairs), list(weights)
    if not pairs or len(pairs) != len(weights):
        raise ValueError(f"{len(pairs)} pairs and {len(weights)} weights: give one pair or more, a weight for each")
    return pairs, weights


def cut(
    changes: Iterable[tuple[str, str, Factors]], rank: int | Mapping[str, int], nothing: str
) -> tuple[ParamTransform, Delta, Residual]:
    """The adapter of changes `(path, axes, factors)`, with products of two factors truncated to this rank (or to those
    of a mapping glob -> rank), and what that left out. Other factors, whose axes are "", stay. Without any product, a
    ValueError of this text. The changes are asked for one after the other."""
    factors, axes, squares = {}, {}, {}
    for path, named, of_path in changes:
        factors[path] = of_path
        if named:
            r = COUNT(f"{path}: rank", look_up(rank, path, "rank"))
            factors[path], squares[path] = truncated(**of_path, stacked=named.count("s"), rank=r)
            axes[path] = named
    if not axes:
        raise ValueError(nothing)
    shares = {path: _share(pair) for path, pair in squares.items()}
    return *adapter_of(factors, axes), Residual(shares, _share(sum(squares.values())))


def _share(squares: Any) -> Array:
    return jnp.sqrt(squares[0] / jnp.maximum(squares[1], jnp.finfo(squares.dtype).tiny))


def adapter_of(factors: dict[str, Any], axes: Mapping[str, str]) -> Pair:
    """The method that has these factors, each path by name; a chain where there are several kinds."""
    ranks = {path: factors[path]["a"].shape[-1] for path in axes}
    methods = [lora(select(*axes, axes=axes), rank=ranks, strict=False)] if axes else []
    for name, method in (("shift", bias_delta), ("value", tune)):
        if paths := [path for path in factors if name in factors[path]]:
            methods.append(method(select(*paths)))
    return methods[0] if len(methods) == 1 else chain(*methods), Delta(factors)
