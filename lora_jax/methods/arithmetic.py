"""Sums, differences and truncation of adapters: of what they change, computed from their factors alone.

The average of two LoRAs' A's and B's is not the average of what they change: (A1 + A2)(B1 + B2) has A1 B2 and A2 B1
besides. Here their factors stand side by side, which is exact: ranks add, and weight and alpha / r go into B.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax.core.arrays import LowRank, Tuned
from lora_jax.core.selection import CLASS, flatten
from lora_jax.core.transforms import Delta, ParamTransform, traits_of
from lora_jax.methods.bias_delta import BiasDelta
from lora_jax.methods.changes import changed_leaves, scaled_by, sites_of, wide
from lora_jax.methods.low_rank import Pair, Residual, adapter_of, checked_pairs, cut
from lora_jax.methods.sparse_merging import dare, ties

__all__ = ["Residual", "add", "dare", "difference", "ties", "truncate"]

Terms = list[tuple[Any, Any]]  # (weight, adapted leaf) of every pair that has a path


def add(pairs: Sequence[Pair], weights: Sequence[Any], *, params: Any = None) -> Pair:
    """The adapter `(method, delta)` whose change of every leaf is the sum of `weights[n]` times that of `pairs[n]`.

    Exact, up to rounding in float32. Targets, ranks and scales may differ. What has low rank becomes one LoRA of scale
    1, without dropout, with an A for every path and every layer of a stack (zero where none had one); bias deltas
    become one bias delta, tuned leaves (with a base) one tuned leaf. One pair of weight 1 is returned as it is. Works
    under jit.

    Args:
      pairs: of one base.
      weights: a number for each pair; they may be negative or traced.
      params: the base, which `token_rows` and tuned leaves replace, and so need (tuned leaves not for an average: all
        pairs have them, and the weights add up to 1). Shapes are enough for VeRA and for `layers` of a stack.

    A method that does not add (DoRA, IA3, adapters, prefixes), or changes of two kinds of one leaf, are a ValueError.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, loras = {"kernel": jnp.ones((100, 70))}, [lj.lora(lj.select("kernel"), rank=rank) for rank in (2, 4)]
    >>> pairs = [(lora, lora.init(jax.random.key(0), params)) for lora in loras]
    >>> method, delta = lj.arithmetic.add(pairs, [0.5, 0.5])
    >>> delta
    Delta: 1 paths, 1,020 numbers
      kernel: a float32(100, 6), b float32(6, 70)
    """
    pairs, weights = checked_pairs(pairs, weights)
    for method, delta in pairs:
        _need_sum(method, delta)
    if len(pairs) == 1 and isinstance(weights[0], numbers.Real) and weights[0] == 1:
        return pairs[0]
    return adapter_of(*_sums(pairs, weights, params))


def difference(one: Pair, other: Pair, *, params: Any = None) -> Pair:
    """What `one` changes beyond `other`: `add([one, other], [1, -1])`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params, method = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> delta = lj.Delta({"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}})
    >>> nothing, zero = lj.arithmetic.difference((method, delta), (method, delta))
    >>> float(jnp.abs(lj.merge(nothing.apply(params, zero))["kernel"] - params["kernel"]).max())
    0.0
    """
    return add([one, other], [1, -1], params=params)


def truncate(
    method: ParamTransform, delta: Delta, rank: int | Mapping[str, int], *, params: Any = None
) -> tuple[ParamTransform, Delta, Residual]:
    """The adapter of at most this rank that is nearest in the Frobenius norm, and by how much it is off.

    By the singular values of A B (Eckart and Young 1936), those of the r x r core of the QR decompositions of A and
    B^T; every layer of a stack has its own. Their roots go into A and B alike. Tuned leaves and bias deltas stay as
    they are. `truncate(*add(pairs, weights), rank)` is a sum of a given rank.

    Args:
      rank: 1 or more, or a mapping glob -> rank (first match wins; no match is an error).
      params: as in `add`, and so the errors; one besides where nothing has low rank.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> method = lj.lora(lj.select("kernel"), rank=2)
    >>> delta = lj.Delta({"kernel": {"a": jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), "b": jnp.eye(2)}})
    >>> smaller, factors, residual = lj.arithmetic.truncate(method, delta, rank=1)
    >>> factors["kernel"]["a"].shape
    (3, 1)
    """
    _need_sum(method, delta)
    factors, axes = _sums([(method, delta)], [1], params)
    nothing = f"nothing in this delta of {method.spec['method']!r} has low rank"
    return cut(((path, axes.get(path, ""), factors[path]) for path in factors), rank, nothing)


def _need_sum(method: ParamTransform, delta: Delta) -> None:
    """An error where the changes of a method do not add."""
    for spec, traits in traits_of(method.spec):
        if traits.not_additive:
            raise ValueError(f"{spec['method']!r} does not add: {traits.not_additive}")
    if sites := sites_of(delta):
        raise ValueError(f"{sites[0]} does not add: it changes activations, and no weight")


def _sums(pairs: Sequence[Pair], weights: Sequence[Any], params: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """`{path: factors}` of the sum, and `{path: axes}` of those of low rank."""
    by_path: dict[str, Terms] = {}
    for (method, delta), weight in zip(pairs, weights, strict=True):
        for path, w in changed_leaves(method, delta, params).items():
            by_path.setdefault(path, []).append((weight, w))
    average = all(isinstance(weight, numbers.Real) for weight in weights) and math.isclose(sum(weights), 1)
    leaves, factors, axes = dict(flatten(params)[0]), dict[str, Any](), dict[str, str]()
    for path, terms in by_path.items():
        terms = _same_kind(path, terms)
        first = terms[0][1]
        if isinstance(first, LowRank):
            a, b = [wide(w.a) for _, w in terms], [scaled_by(w.b, w.scale, weight) for weight, w in terms]
            factors[path] = {"a": jnp.concatenate(a, -1), "b": jnp.concatenate(b, first.scale.ndim)}
            axes[path] = first.axes
        elif isinstance(first, BiasDelta):
            factors[path] = {"shift": sum(scaled_by(w.shift, w.scale, weight) for weight, w in terms)}
        else:
            # value - base is the change; in an average the base cancels, and any value does in its place
            start: Any = first.value if average and len(terms) == len(pairs) else leaves.get(path)
            if not hasattr(start, "astype"):
                raise ValueError(f"{path} is tuned, and so replaces the base: pass params= (an average needs none)")
            changes = (scaled_by(wide(w.value) - wide(start), jnp.float32(1), weight) for weight, w in terms)
            factors[path] = {"value": sum(changes, wide(start)).astype(first.dtype)}
    return factors, axes


def _same_kind(path: str, terms: Terms) -> Terms:
    """The terms, if they are of one kind that adds and of one shape; of low rank is whatever `lift` meets as such."""
    terms = [(weight, w if isinstance(w, Tuned | BiasDelta) else w.ready()) for weight, w in terms]
    kinds = {type(w) for _, w in terms}
    if len(kinds) > 1 or not kinds <= {LowRank, BiasDelta, Tuned}:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{path}: changes of {names} do not add; low-rank products do, or shifts, or tuned leaves")
    if len({(w.shape, *(CLASS[letter] for letter in w.axes)) for _, w in terms}) > 1:
        raise ValueError(f"{path}: the adapters are of different bases: {', '.join(str(w) for _, w in terms)}")
    return terms
