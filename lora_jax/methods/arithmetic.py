"""Sums, differences and truncation of adapters: of what they change, computed from their factors alone.

The average of two LoRAs' A's and B's is not the average of what they change: (A1 + A2)(B1 + B2) has A1 B2 and A2 B1
besides. Here their factors stand side by side, which is exact: ranks add, and weight and alpha / r go into B.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.arrays import LowRank, Tuned, is_adapted, is_changed, widened
from lora_jax.core.globs import matches_any
from lora_jax.core.selection import CLASS, Selection, flatten, look_up, select
from lora_jax.core.transforms import Delta, ParamTransform, chain, from_spec, traits_of
from lora_jax.methods.bias_delta import BiasDelta, bias_delta
from lora_jax.methods.lora import lora
from lora_jax.methods.ranges import COUNT
from lora_jax.methods.tune import tune

Pair = tuple[ParamTransform, Delta]
Terms = list[tuple[Any, Any]]  # (weight, adapted leaf) of every pair that has a path


class Residual(NamedTuple):
    """What a truncation left out: its Frobenius norm over the whole's, for each path (a stack is one) and all."""

    paths: dict[str, Array]
    total: Array


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
    pairs, weights = list(pairs), list(weights)
    if not pairs or len(pairs) != len(weights):
        raise ValueError(f"{len(pairs)} pairs and {len(weights)} weights: give one pair or more, a weight for each")
    for method, delta in pairs:
        _need_sum(method, delta)
    if len(pairs) == 1 and isinstance(weights[0], numbers.Real) and weights[0] == 1:
        return pairs[0]
    return _adapter(*_sums(pairs, weights, params))


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
    squares = {}
    for path in axes:
        r = COUNT(f"{path}: rank", look_up(rank, path, "rank"))
        factors[path], squares[path] = _truncated(**factors[path], stacked=axes[path].count("s"), rank=r)
    if not axes:
        raise ValueError(f"nothing in this delta of {method.spec['method']!r} has low rank")
    shares = {path: _share(pair) for path, pair in squares.items()}
    return *_adapter(factors, axes), Residual(shares, _share(sum(squares.values())))


def _need_sum(method: ParamTransform, delta: Delta) -> None:
    """An error where the changes of a method do not add."""
    for spec, traits in traits_of(method.spec):
        if traits.not_additive:
            raise ValueError(f"{spec['method']!r} does not add: {traits.not_additive}")
    if sites := [path for path in delta if path.startswith("@") and not path.startswith("@shared/")]:
        raise ValueError(f"{sites[0]} does not add: it changes activations, and no weight")


def _sums(pairs: Sequence[Pair], weights: Sequence[Any], params: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """`{path: factors}` of the sum, and `{path: axes}` of those of low rank."""
    by_path: dict[str, Terms] = {}
    for (method, delta), weight in zip(pairs, weights, strict=True):
        method, base = _stand_in(method, delta) if params is None else (method, params)
        for path, w in flatten(method.apply(base, delta), is_adapted)[0]:
            if is_changed(w):
                by_path.setdefault(path, []).append((weight, w))
    average = all(isinstance(weight, numbers.Real) for weight in weights) and math.isclose(sum(weights), 1)
    leaves, factors, axes = dict(flatten(params)[0]), dict[str, Any](), dict[str, str]()
    for path, terms in by_path.items():
        terms = _same_kind(path, terms)
        first = terms[0][1]
        if isinstance(first, LowRank):
            a, b = [_wide(w.a) for _, w in terms], [_scaled(w.b, w.scale, weight) for weight, w in terms]
            factors[path] = {"a": jnp.concatenate(a, -1), "b": jnp.concatenate(b, first.scale.ndim)}
            axes[path] = first.axes
        elif isinstance(first, BiasDelta):
            factors[path] = {"shift": sum(_scaled(w.shift, w.scale, weight) for weight, w in terms)}
        else:
            # value - base is the change; in an average the base cancels, and any value does in its place
            start: Any = first.value if average and len(terms) == len(pairs) else leaves.get(path)
            if not hasattr(start, "astype"):
                raise ValueError(f"{path} is tuned, and so replaces the base: pass params= (an average needs none)")
            changes = (_scaled(_wide(w.value) - _wide(start), jnp.float32(1), weight) for weight, w in terms)
            factors[path] = {"value": sum(changes, _wide(start)).astype(first.dtype)}
    return factors, axes


def _stand_in(method: ParamTransform, delta: Delta) -> tuple[ParamTransform, dict[str, Any]]:
    """The method for the delta's paths by name, and leaves of the shapes that the factors tell."""
    specs, leaves = [], {}
    for spec, _ in traits_of(method.spec):
        paths = [path for path in delta if not path.startswith("@") and matches_any(spec.get("select", ()), path)]
        paths = [path for path in paths if not matches_any(spec.get("exclude", ()), path)]
        leaves.update({path: _leaf(path, delta, spec) for path in paths})
        specs.append(spec | {"select": paths, "exclude": []})
    return from_spec({"method": "chain", "of": specs}), leaves


def _leaf(path: str, delta: Delta, spec: dict[str, Any]) -> jax.ShapeDtypeStruct:
    named = spec.get("axes")
    axes = look_up({**named, "**": None} if isinstance(named, Mapping) else named, path, "axes")
    match delta.get("@shared/" + "/".join(path.split("/")[:-2]), {}) | delta[path]:
        case {"value": factor} | {"shift": factor}:
            return jax.ShapeDtypeStruct(factor.shape, factor.dtype)
        case {"a": a, "b": b} if not (spec.get("layers") and "s" in (axes or "")):
            axes = axes or Selection((path,)).axes_of(path, jax.ShapeDtypeStruct((1, 1), a.dtype))
            n = axes.count("s")
            sizes = {"s": iter(a.shape[:n]), "i": iter(a.shape[n:-1]), "o": iter(b.shape[n + 1 :])}
            return jax.ShapeDtypeStruct(tuple(next(sizes[CLASS[letter]]) for letter in axes), a.dtype)
    raise ValueError(f"{path}: the factors {sorted(delta[path])} do not tell the shape of the leaf: pass params=")


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


def _wide(x: Array) -> Array:
    return x.astype(widened(x.dtype))


def _scaled(x: Array, scale: Array, weight: Any) -> Array:
    """weight * scale * x; the scale has x's first axes."""
    wide = _wide(x)
    scale = (scale * jnp.asarray(weight, scale.dtype)).astype(wide.dtype)
    return wide * lax.expand_dims(scale, range(scale.ndim, wide.ndim))


@jax.default_matmul_precision("highest")
def _truncated(a: Array, b: Array, stacked: int, rank: int) -> tuple[dict[str, Array], Array]:
    """The factors at this rank, and the squared norms of what is left out and of all."""
    lead, r, outer = a.shape[:stacked], a.shape[-1], b.shape[stacked + 1 :]
    q, left = jnp.linalg.qr(a.reshape(*lead, -1, r))
    p, right = jnp.linalg.qr(b.reshape(*lead, r, -1).swapaxes(-1, -2))
    u, values, v = jnp.linalg.svd(left @ right.swapaxes(-1, -2), full_matrices=False)
    root = jnp.sqrt(values[..., None, :rank])
    a = (q @ (u[..., :rank] * root)).reshape(*a.shape[:-1], -1)
    b = (root.swapaxes(-1, -2) * v[..., :rank, :] @ p.swapaxes(-1, -2)).reshape(*lead, -1, *outer)
    return {"a": a, "b": b}, jnp.stack([jnp.sum(values[..., first:] ** 2) for first in (rank, 0)])


def _share(squares: Any) -> Array:
    return jnp.sqrt(squares[0] / jnp.maximum(squares[1], jnp.finfo(squares.dtype).tiny))


def _adapter(factors: dict[str, Any], axes: dict[str, str]) -> Pair:
    """The method that has these factors, each path by name; a chain where there are several kinds."""
    ranks = {path: factors[path]["a"].shape[-1] for path in axes}
    methods = [lora(select(*axes, axes=axes), rank=ranks, strict=False)] if axes else []
    for name, method in (("shift", bias_delta), ("value", tune)):
        if paths := [path for path in factors if name in factors[path]]:
            methods.append(method(select(*paths)))
    return methods[0] if len(methods) == 1 else chain(*methods), Delta(factors)
