"""What an adapted array does in a matrix product, an embedding lookup and a convolution, and in operations on its axes.

A rule brings the weight to the order `(stacked.., i.., o..)`, x to `(batch.., free.., i..)`, removes stacked axes with
`jax.vmap`, calls the weight's `product`, and brings the result to the order that the equation gives.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.arrays import Adapted, is_adapted, scaled, sides
from lora_jax.core.lifting import axis_ops
from lora_jax.core.lifting.interpreter import TraceState, rule
from lora_jax.core.selection import CLASS


def _with_array(product: Callable) -> Callable:
    """A product of x with an array or with one that is `Encoded`, whose values then last no longer than it takes."""

    @functools.wraps(product)
    def of_any(op: Any, x: Array, w: Any, *rest: Array) -> Array:
        return w.within(functools.partial(product, op), x, *rest) if is_adapted(w) else product(op, x, w, *rest)

    return of_any


@dataclasses.dataclass(frozen=True)
class Dot:
    """`dot_general` over x's last `count` axes and w's first."""

    count: int
    left: bool  # the weight stands on the left: operands keep their sides, so that the base's product keeps its bits
    dtype: Any
    precision: Any
    preferred: Any
    out_sharding: NamedSharding | None  # of (x's free axes.., o..)
    drops_input: bool = True

    @_with_array
    def __call__(self, x: Array, w: Array) -> Array:
        return self._dot(x, w, self.count, self.out_sharding)

    def down(self, x: Array, a: Array) -> Array:
        return self._collapsed(x, a.astype(self.dtype), self.count, self._replicated_last(x.ndim - self.count))

    def up(self, z: Array, b: Array) -> Array:
        return self._collapsed(z.astype(self.dtype), b.astype(self.dtype), 1, self.out_sharding)

    def scale_input(self, x: Array, w: Array, scale: Array) -> Array:
        return self(scaled(x, scale), w)

    def _collapsed(self, x: Array, w: Array, count: int, sharding: NamedSharding | None) -> Array:
        """`_dot` over x's free axes as one. The gradient of a factor contracts them: of two, XLA first transposes the
        whole activation (on a CPU, 27 ms of 8 x 128 x 3072 floats; the product of one axis takes 0.6). Axes on an
        explicit mesh stay as they are."""
        free = x.ndim - count
        if free < 2 or sharding is not None or any(jax.typeof(x).sharding.spec):
            return self._dot(x, w, count, sharding)
        y = self._dot(lax.collapse(x, 0, free), w, count, None)
        return y.reshape(*x.shape[:free], *y.shape[1:])

    def _dot(self, x: Array, w: Array, count: int, sharding: NamedSharding | None) -> Array:
        free = x.ndim - count
        contract = (tuple(range(free, x.ndim)), tuple(range(count)))
        how = {"precision": self.precision, "preferred_element_type": self.preferred}
        if not self.left:
            return lax.dot_general(x, w, (contract, ((), ())), out_sharding=sharding, **how)
        outputs = w.ndim - count
        order = (*range(outputs, outputs + free), *range(outputs))
        sharding = _reordered(sharding, order)
        return _transpose(lax.dot_general(w, x, (contract[::-1], ((), ())), out_sharding=sharding, **how), order)

    def _replicated_last(self, free: int) -> NamedSharding | None:
        if self.out_sharding is None:
            return None
        spec = (*self.out_sharding.spec, *[None] * free)[:free]
        return NamedSharding(self.out_sharding.mesh, PartitionSpec(*spec, None))


@dataclasses.dataclass(frozen=True)
class LookUp:
    """Rows of w by integer ids."""

    how: tuple[tuple[str, Any], ...]  # gather's mode, fill_value and promises
    drops_input: bool = False

    @_with_array
    def __call__(self, ids: Array, w: Array) -> Array:
        last = tuple(range(ids.ndim, ids.ndim + w.ndim - 1))
        numbers = lax.GatherDimensionNumbers(offset_dims=last, collapsed_slice_dims=(0,), start_index_map=(0,))
        return lax.gather(w, ids[..., None], numbers, (1, *w.shape[1:]), **dict(self.how))

    down = __call__

    def up(self, z: Array, b: Array) -> Array:
        return jnp.tensordot(z, b.astype(z.dtype), 1)

    def scale_input(self, x: Array, w: Array, scale: Array) -> Array:
        return scaled(self(x, w), lax.expand_dims(self(x, scale), range(x.ndim, x.ndim + w.ndim - 1)))


@dataclasses.dataclass(frozen=True)
class Convolution:
    """`conv_general_dilated`, channels last; a factor is shared by the feature groups."""

    groups: int
    how: tuple[tuple[str, Any], ...]
    drops_input: bool = True

    @_with_array
    def __call__(self, x: Array, w: Array) -> Array:
        n = w.ndim - 2
        last = (0, n + 1, *range(1, n + 1))
        numbers = lax.ConvDimensionNumbers(last, (n + 1, n, *range(n)), last)
        how = {"dimension_numbers": numbers, "feature_group_count": self.groups, **dict(self.how)}
        return lax.conv_general_dilated(x, w, **how)

    def down(self, x: Array, a: Array) -> Array:
        z = self(x, jnp.tile(a.astype(x.dtype), self.groups))
        return z.reshape(*z.shape[:-1], self.groups, a.shape[-1])

    def up(self, z: Array, b: Array) -> Array:
        by_group = b.astype(z.dtype).reshape(b.shape[0], self.groups, -1)
        y = jnp.einsum("...gr,rgo->...go", z, by_group, precision=dict(self.how)["precision"])
        return y.reshape(*y.shape[:-2], b.shape[-1])

    @_with_array
    def scale_input(self, x: Array, w: Array, scale: Array) -> Array:
        return self(x, scaled(w, scale[..., None]))


@rule("dot_general")
def _dot(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any] | None:
    left = is_adapted(values[0])
    if left and is_adapted(values[1]):
        return None
    contract, batch = eqn.params["dimension_numbers"]
    w, x = values if left else values[::-1]
    (wc, xc), (wb, xb) = (contract, batch) if left else (contract[::-1], batch[::-1])
    towards = _towards(w, wc)
    if towards is None or any(w.axes[axis] != "s" for axis in wb):
        return None
    state.contracts(eqn, w, transposed=towards is not w)
    if w.indivisible:
        wc, xc = zip(*sorted(zip(wc, xc, strict=True)), strict=True)
    stacked, outputs = _axes_of(w, "s", without=wb), _free_axes(towards, wc)
    x_free = [axis for axis in range(x.ndim) if axis not in (*xb, *xc)]
    batched, of_x = _named("b", range(len(wb))), _named("x", x_free)
    of_w = _named("w", (axis for axis in range(w.ndim) if axis not in (*wb, *wc)))
    have = batched + _named("w", stacked) + of_x + _named("w", outputs)
    order = [have.index(axis) for axis in batched + (of_w + of_x if left else of_x + of_w)]
    p = eqn.params
    out_sharding = None if wb or stacked else _reordered(p.get("out_sharding"), order)
    op = Dot(len(wc), left, x.dtype, p["precision"], p["preferred_element_type"], out_sharding)
    x, canonical = _transpose(x, (*xb, *x_free, *xc)), axis_ops.transpose(towards, (*wb, *stacked, *wc, *outputs))
    return [_transpose(_over_stacked(op, len(wb), len(stacked))(x, canonical), order)]


@rule("gather")
def _gather(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any] | None:
    w, indices = values
    p = eqn.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    starts = numbers.start_index_map
    partial = [j for j in range(w.ndim) if sizes[j] != w.shape[j]] or list(starts[:1])
    fills = p["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if is_adapted(indices) or numbers.operand_batching_dims or (fills and len(starts) > 1):
        return None
    if len(partial) != 1 or partial[0] not in starts or sizes[partial[0]] != 1:
        return None
    picked = partial[0]
    ids = indices[..., starts.index(picked)]
    how = ("mode", "fill_value", "unique_indices", "indices_are_sorted")
    op = LookUp(tuple((name, p[name]) for name in how))
    kept = [axis for axis in range(w.ndim) if axis not in numbers.collapsed_slice_dims]
    rest, batch = iter(kept), iter(range(ids.ndim))
    rank = ids.ndim + len(kept)
    want = [("w", next(rest)) if n in numbers.offset_dims else ("n", next(batch)) for n in range(rank)]
    if w.axes[picked] == "s":
        return [_stacked_rows(w, ids, op, picked, want)]
    towards = _towards(w, (picked,))
    if towards is None:
        return None
    stacked, outputs = _axes_of(w, "s"), _free_axes(towards, (picked,))
    y = _over_stacked(op, 0, len(stacked))(ids, axis_ops.transpose(towards, (*stacked, picked, *outputs)))
    have = _named("w", stacked) + _named("n", range(ids.ndim)) + _named("w", outputs)
    if picked in kept:
        y, have = y[..., None], [*have, ("w", picked)]
    return [_transpose(y, [have.index(axis) for axis in want])]


@rule("conv_general_dilated")
def _convolution(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any] | None:
    x, w = values
    p = eqn.params
    numbers = p["dimension_numbers"]
    out, in_, *window = numbers.rhs_spec
    classes = [CLASS[letter] for letter in w.axes] if is_adapted(w) else []
    if is_adapted(x) or p["batch_group_count"] != 1 or classes != ["o" if j == out else "i" for j in range(w.ndim)]:
        return None
    if w.indivisible and not _keeps_order(w, (*window, in_, out)):
        return None
    how = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision", "preferred_element_type")
    op = Convolution(p["feature_group_count"], tuple((name, p[name]) for name in how))
    batch, feature, *spatial = numbers.lhs_spec
    y = axis_ops.transpose(w, (*window, in_, out)).product(_transpose(x, (batch, *spatial, feature)), op)
    batch, feature, *spatial = numbers.out_spec
    have = [batch, *spatial, feature]
    return [_transpose(y, [have.index(axis) for axis in range(y.ndim)])]


def _keeps_order(w: Adapted, order: Sequence[int]) -> bool:
    """Whether the window, the other inputs and the outputs each keep the order of their axes."""
    return all(sorted(same) == same for side in ("k", "iv", "o") if (same := [a for a in order if w.axes[a] in side]))


def _towards(w: Adapted, contracted: Sequence[int]) -> Adapted | None:
    """w or its transposed form, the one whose input axes are the contracted ones."""
    if sorted(contracted) == _axes_of(w, "i"):
        return w
    flipped = w.transposed() if sorted(contracted) == _axes_of(w, "o") else None
    if flipped is not None and is_adapted(flipped.base):
        return flipped.replace(base=flipped.base.transposed())
    return flipped


def _named(what: str, axes: Iterable[int]) -> list[tuple[str, int]]:
    """The axes of one operand, so that those of several make one list."""
    return [(what, axis) for axis in axes]


def _axes_of(w: Adapted, kind: str, without: Sequence[int] = ()) -> list[int]:
    return [j for j, letter in enumerate(w.axes) if CLASS[letter] == kind and j not in without]


def _free_axes(w: Adapted, contracted: Sequence[int]) -> list[int]:
    return [j for j, letter in enumerate(w.axes) if letter != "s" and j not in contracted]


def _over_stacked(op: Any, shared: int, alone: int) -> Callable[[Array, Adapted], Array]:
    """`product` over leading stacked axes: `shared` of x and w, then `alone` of w only."""

    def product(x: Array, w: Adapted) -> Array:
        return w.product(x, op)

    for in_axes in [(None, 0)] * alone + [(0, 0)] * shared:
        product = jax.vmap(product, in_axes=in_axes)
    return product


def _stacked_rows(w: Adapted, ids: Array, op: LookUp, picked: int, want: list) -> Adapted:
    """Whole arrays of a stack chosen by ids: an array with the ids' axes stacked."""
    rest = [axis for axis in range(w.ndim) if axis != picked]

    def rows(array: Array) -> Array:
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        return array[jnp.clip(ids, 0, array.shape[0] - 1)] if is_key else op(ids, array)

    w = axis_ops.each(axis_ops.transpose(w, (picked, *rest)), rows)
    have = _named("n", range(ids.ndim)) + _named("w", rest)
    if ("w", picked) in want:
        w = axis_ops.broadcast(w, (1, *w.shape), range(1, w.ndim + 1))
        have = [("w", picked), *have]
    return axis_ops.transpose(w, [have.index(axis) for axis in want])


def _transpose(x: Array, order: Sequence[int]) -> Array:
    return x if tuple(order) == tuple(range(x.ndim)) else lax.transpose(x, tuple(order))


def _reordered(sharding: NamedSharding | None, order: Sequence[int]) -> NamedSharding | None:
    """The sharding of the equation's result, for the result before its last transposition."""
    if sharding is None:
        return None
    spec = [*sharding.spec, *[None] * (len(order) - len(sharding.spec))]
    entries: list[Any] = [None] * len(order)
    for entry, axis in zip(spec, order, strict=True):
        entries[axis] = entry
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


@rule("convert_element_type")
def _convert(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any] | None:
    dtype = eqn.params["new_dtype"]
    return [axis_ops.cast(values[0], dtype)] if jnp.issubdtype(dtype, jnp.floating) else None


@rule("stop_gradient", "pvary", "copy", "name")
def _each(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any]:
    return [axis_ops.each(values[0], lambda leaf: eqn.primitive.bind(leaf, **eqn.params))]


@rule("sharding_constraint")
def _constraint(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any]:
    w = values[0]  # to codes, which have their own placement, it is a hint
    return [w.replace(base=eqn.primitive.bind(w.base, **eqn.params)) if isinstance(w.base, Array) else w]


def _structural(name: str, change: Callable[..., Any]) -> None:
    @rule(name)
    def apply(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any] | None:
        if not is_adapted(values[0]) or any(map(is_adapted, values[1:])):
            return None
        w = values[0]
        if w.indivisible and name == "transpose" and not _keeps_order(w, eqn.params["permutation"]):
            return None
        outputs = change(*values, **eqn.params)
        outputs = outputs if outputs is None or isinstance(outputs, list) else [outputs]
        return None if outputs and w.indivisible and any(sides(piece) != sides(w) for piece in outputs) else outputs


_structural("transpose", axis_ops.transpose)
_structural("squeeze", axis_ops.squeeze)
_structural("reshape", lambda w, new_sizes, **_: axis_ops.reshape(w, new_sizes))
_structural("slice", axis_ops.slice_)
_structural("dynamic_slice", lambda w, *starts, slice_sizes: axis_ops.dynamic_slice(w, starts, slice_sizes))
_structural("split", axis_ops.split)
_structural("unstack", lambda w, axis, **_: axis_ops.unstack(w, axis))
_structural("broadcast_in_dim", lambda w, *_, shape, **p: axis_ops.broadcast(w, shape, p["broadcast_dimensions"]))
