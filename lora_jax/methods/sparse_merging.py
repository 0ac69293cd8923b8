"""TIES and DARE: adapters merged entry by entry, after most entries of what each changes are left out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.selection import CLASS
from lora_jax.core.transforms import Delta, Factors, ParamTransform, stable_hash
from lora_jax.methods.changes import Change, changes, dense_of, need_weights, no_matrix, shape_of, with_identity
from lora_jax.methods.low_rank import Pair, Residual, checked_pairs, cut
from lora_jax.methods.ranges import Range

DENSITY = Range(above=0, most=1)
Prune = Callable[[Array, str, int], Array]  # (change (s, entries), path, number of the pair) -> the same with zeros


def ties(
    pairs: Sequence[Pair], weights: Sequence[Any], density: float, rank: int | Mapping[str, int], *, params: Any = None
) -> tuple[ParamTransform, Delta, Residual]:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): the largest entries of every change, merged where their signs agree.

    Of each weight, and each layer of a stack, the `density` part of a change's entries that is largest in size is kept.
    An entry's sign is that of their sum over the adapters, without weights. The weighted entries of that sign are added
    and divided by how many there are. What a product of low rank changes is formed dense, one weight at a time; the
    merged change is truncated to the rank. This is PEFT's `add_weighted_adapter(combination_type="ties_svd")`; equal
    entries at the threshold are all kept.

    Args:
      pairs: of one base, of any methods that merge. A weight that only some of them change is merged of these.
      weights: a number for each pair; may be traced. density: above 0, at most 1.
      rank: of the result, 1 or more, or a mapping glob -> rank.
      params: as `lora_jax.analysis.updates` takes them.

    Returns:
      `(method, delta, residual)`: a LoRA of scale 1; biases and other leaves that are no matrices as `bias_delta`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, method = {"kernel": jnp.ones((9, 7))}, lj.lora(lj.select("kernel"), rank=2)
    >>> deltas = [lj.Delta({"kernel": {"a": jnp.ones((9, 2)), "b": n * jnp.ones((2, 7))}}) for n in (1.0, 3.0)]
    >>> merged, delta, residual = lj.arithmetic.ties([(method, delta) for delta in deltas], [1, 1], 0.5, rank=1)
    >>> lj.merge(merged.apply(params, delta))["kernel"][0, 0].round(4)  # 1 + (2 + 6) / 2
    Array(5., dtype=float32)
    """
    density = DENSITY("density", density)
    return _merged(pairs, weights, rank, params, lambda change, *_: _largest(change, density), True)


def dare(
    pairs: Sequence[Pair],
    weights: Sequence[Any],
    density: float,
    rank: int | Mapping[str, int],
    key: Array,
    *,
    ties: bool = False,
    params: Any = None,
) -> tuple[ParamTransform, Delta, Residual]:
    """DARE (Yu et al. 2024, arXiv 2311.03099): entries dropped at random, the others divided by `density`, then added.

    Each entry of a change is kept with the probability `density`. The sum is weighted, or with `ties` by the elected
    signs of `ties`: PEFT's "dare_linear_svd" and "dare_ties_svd". The random numbers follow from the key, the path and
    the number of the pair. Arguments and results are those of `ties`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> method = lj.lora(lj.select("kernel"), rank=1)
    >>> delta = lj.Delta({"kernel": {"a": jnp.ones((9, 1)), "b": jnp.ones((1, 7))}})
    >>> merged, factors, residual = lj.arithmetic.dare([(method, delta)], [1], 0.5, 7, jax.random.key(0))
    >>> sorted({abs(float(x)) for x in (factors["kernel"]["a"] @ factors["kernel"]["b"]).round(4).ravel()})
    [0.0, 2.0]
    """
    density = DENSITY("density", density)

    def dropped(change: Array, path: str, n: int) -> Array:
        mine = jax.random.fold_in(jax.random.fold_in(key, stable_hash(path)), n)
        return jnp.where(jax.random.bernoulli(mine, density, change.shape), change / density, 0)

    return _merged(pairs, weights, rank, params, dropped, ties)


def _merged(
    pairs: Sequence[Pair], weights: Sequence[Any], rank: Any, params: Any, prune: Prune, elect: bool
) -> tuple[ParamTransform, Delta, Residual]:
    pairs, weights = checked_pairs(pairs, weights)
    by_path: dict[str, list[tuple[int, Change]]] = {}
    for n, (method, delta) in enumerate(pairs):
        need_weights(method, delta)
        for path, change in changes(method, delta, params):
            by_path.setdefault(path, []).append((n, change))

    def merged() -> Iterator[tuple[str, str, Factors]]:
        for path, terms in by_path.items():
            first, shape = _same_leaf(path, [change for _, change in terms])
            dense = [dense_of(change) for _, change in terms]
            pruned = jnp.stack([prune(w.reshape(len(w), -1), path, n) for (n, _), w in zip(terms, dense, strict=True)])
            of_terms = jnp.stack([jnp.asarray(weights[n], pruned.dtype) for n, _ in terms])
            change = _joined(pruned, of_terms[:, None, None], elect).reshape(dense[0].shape)
            factors = with_identity(change, first.axes, shape) if first.axes else {"shift": change.reshape(shape)}
            yield path, first.axes, factors

    return cut(merged(), rank, no_matrix(pairs[0][0]))


def _same_leaf(path: str, terms: list[Change]) -> tuple[Change, tuple[int, ...]]:
    """The first of the changes, and the leaf's shape; a ValueError unless all are of one leaf."""
    leaves = {(shape_of(change), "".join(CLASS[letter] for letter in change.axes)) for change in terms}
    if len(leaves) > 1:
        shown = " and ".join(f"{axes or 'no matrix'} {shape}" for shape, axes in sorted(leaves))
        raise ValueError(f"{path}: the adapters are of different bases: {shown}")
    return terms[0], shape_of(terms[0])


def _largest(change: Array, density: float) -> Array:
    """The density part of each row's entries that is largest in size; zeros for the others."""
    count = math.floor(density * change.shape[1])
    sizes = jnp.abs(change)
    threshold = jnp.sort(sizes, -1, descending=True)[:, max(count - 1, 0)]
    return jnp.where((sizes >= threshold[:, None]) & (count > 0), change, 0)


def _joined(terms: Array, weights: Array, elect: bool) -> Array:
    """The weighted sum over the first axis; with `elect` the mean of the weighted entries of the sum's sign."""
    if not elect:
        return jnp.sum(weights * terms, 0)
    sign = jnp.where(jnp.sum(terms, 0) >= 0, 1.0, -1.0)
    agrees = jnp.sign(terms) == sign[None]
    counts = jnp.sum(agrees, 0, dtype=terms.dtype)
    return jnp.sum(jnp.where(agrees, weights * terms, 0), 0) / jnp.maximum(counts, 1)
