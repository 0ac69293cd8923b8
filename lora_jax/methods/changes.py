"""What adapters change of a base's weights, as products of two factors: of LoRA and its kin their own factors."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.arrays import Adapted, LowRank, Summed, Tuned, dense, is_adapted, is_changed, widened
from lora_jax.core.globs import matches_any
from lora_jax.core.lifting.axis_ops import cast
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.selection import CLASS, Selection, flatten, look_up
from lora_jax.core.transforms import Delta, Factors, ParamTransform, from_spec, keys_of, traits_of
from lora_jax.methods.bias_delta import BiasDelta
from lora_jax.methods.low_rank import truncated


class Update(NamedTuple):
    """The change of one weight, the product a b, float32 (or wider), with the scale in b. An example is in `updates`.

    Attributes:
      a: (s, inputs, r): all stacked axes as one, of size 1 where there are none, and all input axes as one.
      b: (s, r, outputs).
    """

    a: Array
    b: Array


class Change(NamedTuple):
    """What a method changes of one leaf.

    Attributes:
      axes: of a leaf that is a matrix, or a stack of them; "" of any other.
      factors: `a` (s.., i.., r) and `b` (s.., r, o..) of a matrix; `shift`, of the leaf's shape, of any other.
      low_rank: whether the factors are the method's own, not the change itself and an identity.
    """

    axes: str
    factors: Factors
    low_rank: bool = True


def updates(method: ParamTransform, delta: Delta, params: Any = None) -> dict[str, Update]:
    """`{path: Update}` of all weights that a method changes.

    Of LoRA, PiSSA, VeRA, `token_rows`, and an adapter that `interop.peft.load` read, the factors themselves; nothing
    dense is formed. Of any other method (DoRA, LoKr, IA3, `tune`) the change U S V^T by its singular values, as
    U sqrt(S) and sqrt(S) V^T. Biases and other leaves that are no matrices are left out, and so is what changes
    activations.

    Args:
      params: the base; not needed for methods whose factors tell its shapes, as LoRA's; shapes are enough for VeRA,
        LoKr, and for `layers` of a stack. Tuned leaves need the axes that a selection names.

    Raises:
      ValueError: nothing that is changed is a matrix; a base is needed and not given.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import analysis
    >>> params, method = {"kernel": jnp.ones((100, 70))}, lj.lora(lj.select("kernel"), rank=2)
    >>> update = analysis.updates(method, method.init(jax.random.key(0), params))["kernel"]
    >>> update.a.shape, update.b.shape
    ((1, 100, 2), (1, 2, 70))
    """
    by_path = {path: update_of(change) for path, change in changes(method, delta, params) if change.axes}
    if not by_path:
        raise ValueError(no_matrix(method))
    return by_path


def changes(method: ParamTransform, delta: Delta, params: Any = None) -> Iterator[tuple[str, Change]]:
    """`(path, Change)` of all leaves that a method changes, one after the other; what changes activations is left
    out."""
    base = {} if params is None else dict(flatten(params)[0])
    for path, w in changed_leaves(method, delta, params).items():
        yield path, _change(path, w, base.get(path), method)


def change_of(change: Array, axes: str) -> Change:
    """The `Change` of a dense one, in the leaf's axes."""
    if not {"i", "o"} <= {CLASS[letter] for letter in axes}:
        return Change("", {"shift": change})
    return Change(axes, with_identity(matrix(change, axes), axes, change.shape), low_rank=False)


def update_of(change: Change) -> Update:
    """The change of a matrix, of two factors of like size where it has no own ones."""
    a, b, stacked = change.factors["a"], change.factors["b"], change.axes.count("s")
    if not change.low_rank:
        a, b = truncated(a, b, stacked, a.shape[-1])[0].values()
    count, rank = math.prod(a.shape[:stacked]), a.shape[-1]
    return Update(a.reshape(count, -1, rank), b.reshape(count, rank, -1))


@jax.default_matmul_precision("highest")
def dense_of(change: Change) -> Array:
    """The change of a matrix, (s, inputs, outputs), or of any other leaf as one row, (1, entries)."""
    if "shift" in change.factors:
        return change.factors["shift"].reshape(1, -1)
    a, b = update_of(change._replace(low_rank=True))
    return a @ b


def matrix(w: Array, axes: str) -> Array:
    """A weight as (s, inputs, outputs), in its order of stacked, of input and of output axes.

    >>> import jax.numpy as jnp
    >>> matrix(jnp.ones((4, 3, 5, 2)), "isoo").shape
    (3, 4, 10)
    """
    sizes = {kind: math.prod(_sizes(w.shape, axes, kind)) for kind in "sio"}
    order = [j for kind in "sio" for j, letter in enumerate(axes) if CLASS[letter] == kind]
    return w.transpose(order).reshape(*sizes.values())


def weight_matrix(leaf: Any, axes: str) -> Array:
    """A weight of the base, dense, as (s, inputs, outputs) in the dtype of sums."""
    return matrix(wide(jnp.asarray(dense(leaf))), axes)


def with_identity(w: Array, axes: str, shape: tuple[int, ...]) -> Factors:
    """A change (s, inputs, outputs) of a leaf of these axes and shape as `a` and `b`, of which one is an identity."""
    stack, inputs, outputs = (_sizes(shape, axes, kind) for kind in "sio")
    rank = min(w.shape[1:])
    eye = jnp.broadcast_to(jnp.eye(rank, dtype=w.dtype), (len(w), rank, rank))
    a, b = (w, eye) if rank == w.shape[2] else (eye, w)
    return {"a": a.reshape(*stack, *inputs, rank), "b": b.reshape(*stack, rank, *outputs)}


def matrix_shape(change: Change) -> tuple[int, int, int]:
    """(s, inputs, outputs) of a matrix."""
    a, b, n = change.factors["a"], change.factors["b"], change.axes.count("s")
    return math.prod(a.shape[:n]), math.prod(a.shape[n:-1]), math.prod(b.shape[n + 1 :])


def shape_of(change: Change) -> tuple[int, ...]:
    """The shape of the leaf that is changed."""
    if "shift" in change.factors:
        return change.factors["shift"].shape
    return _leaf_shape(change.axes, change.factors["a"], change.factors["b"])


def changed_leaves(method: ParamTransform, delta: Delta, params: Any = None) -> dict[str, Adapted]:
    """`{path: adapted array}` of the leaves of the base that a method changes. Without params they have shapes alone as
    bases, those that the factors tell."""
    parts = traits_of(method.spec)
    inserted = [glob for spec, traits in parts if traits.inserts for glob in spec.get("select", ())]
    if params is None:
        method, params = _stand_in([spec for spec, _ in parts if not _has_no_weight(spec, delta)], delta)
        if any(_has_no_weight(spec, delta) for spec, _ in parts):
            delta = Delta({key: delta[key] for key in keys_of(method, params)})
    leaves = flatten(untapped(method.apply(params, delta))[0], is_adapted)[0]
    return {path: w for path, w in leaves if is_changed(w) and not matches_any(inserted, path)}


def sites_of(delta: Delta) -> list[str]:
    """The keys of a delta whose factors change activations."""
    return [key for key in delta if key.startswith("@") and not key.startswith("@shared/")]


def need_weights(method: ParamTransform, delta: Delta) -> None:
    """A ValueError for a method that changes activations, or tokens that are none of the base's."""
    if sites := sites_of(delta):
        raise ValueError(f"{sites[0]} changes activations, and no weight: it has no form as a change of weights")
    if names := [spec["method"] for spec, traits in traits_of(method.spec) if traits.inserts]:
        raise ValueError(f"{names[0]!r} has rows of its own tokens, and changes no weight of the base")


def no_matrix(method: ParamTransform) -> str:
    """The message where a method changes no matrix."""
    return f"nothing that this {method.spec['method']!r} changes is a matrix of the base"


def wide(x: Array) -> Array:
    """x in the dtype of sums."""
    return x.astype(widened(x.dtype))


def scaled_by(x: Array, scale: Array, weight: Any) -> Array:
    """weight * scale * x; the scale has x's first axes."""
    x = wide(x)
    scale = (scale * jnp.asarray(weight, scale.dtype)).astype(x.dtype)
    return x * lax.expand_dims(scale, range(scale.ndim, x.ndim))


def _change(path: str, w: Adapted, base: Any, method: ParamTransform) -> Change:
    if isinstance(w, BiasDelta):
        return Change("", {"shift": scaled_by(w.shift, w.scale, 1.0)})
    if not isinstance(w, Summed) and not hasattr(base, "astype"):
        kind = type(w).__name__
        raise ValueError(f"{path}: what {kind} changes of it depends on the base's values: pass params=")
    if isinstance(w, Tuned):
        axes = _axes_of_tuned(path, w, method)
        change = wide(w.value) - base.astype(widened(w.dtype))
    else:
        ready, axes = w.ready(), w.axes
        if type(ready) is LowRank:
            return Change(axes, {"a": wide(ready.a), "b": scaled_by(ready.b, ready.scale, 1.0)})
        change = ready.delta() if isinstance(ready, Summed) else _difference(w)
    return change_of(change, axes)


def _difference(w: Adapted) -> Array:
    """materialize() - base, before it is rounded to the base's dtype."""
    dtype = widened(w.dtype)
    return cast(w, dtype).materialize() - dense(w.base).astype(dtype)


def _axes_of_tuned(path: str, w: Tuned, method: ParamTransform) -> str:
    """The axes of a tuned leaf, as the selection of its method has them."""
    specs = [s for s, _ in traits_of(method.spec) if s["method"] == "tune" and matches_any(s["select"], path)]
    named = specs[0].get("axes") if specs else None
    return Selection((path,), named).axes_of(path, w.value)


def _sizes(shape: tuple[int, ...], axes: str, kind: str) -> tuple[int, ...]:
    return tuple(n for n, letter in zip(shape, axes, strict=True) if CLASS[letter] == kind)


def _leaf_shape(axes: str, a: Any, b: Any) -> tuple[int, ...]:
    n = axes.count("s")
    sizes = {"s": iter(a.shape[:n]), "i": iter(a.shape[n:-1]), "o": iter(b.shape[n + 1 :])}
    return tuple(next(sizes[CLASS[letter]]) for letter in axes)


def _has_no_weight(spec: Mapping[str, Any], delta: Delta) -> bool:
    """Whether a method changes activations or inserted tokens alone."""
    (_, traits), *_ = traits_of(spec)
    return traits.inserts is not None or any(key.endswith(f"/{spec['method']}") for key in sites_of(delta))


def _stand_in(parts: list[dict[str, Any]], delta: Delta) -> tuple[ParamTransform, dict[str, Any]]:
    """The method for the delta's paths by name, and leaves of the shapes that the factors tell."""
    specs, leaves = [], {}
    for spec in parts:
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
            return jax.ShapeDtypeStruct(_leaf_shape(axes, a, b), a.dtype)
    raise ValueError(f"{path}: the factors {sorted(delta[path])} do not tell the shape of the leaf: pass params=")
