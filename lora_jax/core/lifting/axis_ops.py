"""Slicing, transposing and reshaping an adapted array: its base and, through `layout`, the factors with those axes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.arrays import Adapted, Encoded, factor_axes, is_adapted
from lora_jax.core.selection import CLASS

Ints = Sequence[int]


def rebuild(w: Adapted, axes: str, change: Callable[[Array, list, list], Any], shape: Ints | None = None) -> Adapted:
    """The array with these axes, base and factors by `change(array, old, new)`; old and new name the array's axes, as
    they are and as they shall be, by the base's axis that each follows. `shape`: where it has other input or output
    axes than before."""
    if isinstance(w, Encoded):
        arrays = w.resized(axes, shape) if shape is not None else {}
    elif is_adapted(w.base):
        arrays = {"base": rebuild(w.base, axes, change, shape)}
    else:
        arrays = {"base": change(w.base, list(range(w.ndim)), list(range(len(axes))))}
    for name, layout in w.layout.items():
        if (factor := getattr(w, name)) is not None:
            arrays[name] = change(factor, factor_axes(layout, w.axes), factor_axes(layout, axes))
    return w.replace(core=axes.lstrip("s"), **arrays)


def each(w: Adapted, change: Callable[[Array], Any]) -> Adapted:
    """`change` of base and factors alike, axes as they are."""
    return rebuild(w, w.axes, lambda array, *_: change(array))


def cast(w: Adapted, dtype: Any) -> Adapted:
    """Base and factors in another float dtype; scales, and what is `exact`, keep theirs: the product applies them."""
    if isinstance(w, Encoded):
        return w.cast(dtype)
    kept = {name: getattr(w, name) for name in w.layout if set(w.layout[name]) == {"s"} or name in w.exact}
    kept |= {"base": cast(w.base, dtype)} if is_adapted(w.base) else {}
    new = each(w, lambda array: array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array)
    return new.replace(**kept)


def transpose(w: Adapted, permutation: Ints) -> Adapted:
    """`lax.transpose`: the axes in this order."""
    order = tuple(permutation)
    if order == tuple(range(w.ndim)):
        return w
    axes = "".join(w.axes[axis] for axis in order)
    rank = {axis: j for j, axis in enumerate(order)}

    def change(array: Array, where: list, _: list) -> Array:
        if array is w.base:
            return lax.transpose(array, order)
        # within a class a factor follows the base's order; between classes and own axes it keeps its own
        slots: dict[str, list[int]] = {}
        for slot, axis in enumerate(where):
            if isinstance(axis, int):
                slots.setdefault(CLASS[w.axes[axis]], []).append(slot)
        sources = list(range(len(where)))
        for group in slots.values():
            for slot, source in zip(group, sorted(group, key=lambda s: rank[where[s]]), strict=True):
                sources[slot] = source
        return array if sources == sorted(sources) else lax.transpose(array, sources)

    return rebuild(w, axes, change)


def squeeze(w: Adapted, dimensions: Ints) -> Adapted:
    """`lax.squeeze`: without these axes, each of size 1."""

    def change(array: Array, where: list, _: list) -> Array:
        return lax.squeeze(array, [where.index(d) for d in dimensions if d in where])

    kept = [j for j in range(w.ndim) if j not in dimensions]
    return rebuild(w, "".join(w.axes[j] for j in kept), change, [w.shape[j] for j in kept])


def slice_(w: Adapted, start_indices: Ints, limit_indices: Ints, strides: Ints | None) -> Adapted:
    """`lax.slice`: from start to limit along each axis of the base, every stride-th."""
    steps = strides or (1,) * w.ndim

    def change(array: Array, where: list, _: list) -> Array:
        bounds = [
            (start_indices[axis], limit_indices[axis], steps[axis]) if isinstance(axis, int) else (0, size, 1)
            for axis, size in zip(where, array.shape, strict=True)
        ]
        keeps_all = all(b == (0, size, 1) for b, size in zip(bounds, array.shape, strict=True))
        return array if keeps_all else lax.slice(array, *zip(*bounds, strict=True))

    return rebuild(w, w.axes, change)


def dynamic_slice(w: Adapted, starts: Sequence[Any], sizes: Ints) -> Adapted:
    """`lax.dynamic_slice`: so many entries along each axis of the base, from starts that may be traced."""

    def change(array: Array, where: list, _: list) -> Array:
        for slot, axis in enumerate(where):
            if isinstance(axis, int) and sizes[axis] != array.shape[slot]:
                array = lax.dynamic_slice_in_dim(array, starts[axis], sizes[axis], slot)
        return array

    return rebuild(w, w.axes, change)


def split(w: Adapted, axis: int, sizes: Ints) -> list[Adapted]:
    """`lax.split`: pieces of these sizes along an axis."""
    pieces, start = [], 0
    for size in map(int, sizes):
        starts, limits = [0] * w.ndim, list(w.shape)
        starts[axis], limits[axis] = start, start + size
        pieces.append(slice_(w, starts, limits, None))
        start += size
    return pieces


def unstack(w: Adapted, axis: int) -> list[Adapted]:
    """The entries along an axis, each without it."""
    return [squeeze(piece, (axis,)) for piece in split(w, axis, (1,) * w.shape[axis])]


def broadcast(w: Adapted, shape: Ints, dimensions: Ints) -> Adapted:
    """`lax.broadcast_in_dim`; every new axis counts as stacked."""
    letters = ["s"] * len(shape)
    for old, new in enumerate(dimensions):
        letters[new] = w.axes[old]

    def change(array: Array, old: list, new: list) -> Array:
        at = [new.index(dimensions[axis] if isinstance(axis, int) else axis) for axis in old]
        sizes = [shape[axis] if isinstance(axis, int) else array.shape[old.index(axis)] for axis in new]
        return lax.broadcast_in_dim(array, sizes, at)

    return rebuild(w, "".join(letters), change)


def reshape(w: Adapted, shape: Ints) -> Adapted | None:
    """`lax.reshape`; None where the new shape joins axes of different classes, which no factor can follow."""

    def change(array: Array, old: list, new: list) -> Array:
        return array.reshape([shape[a] if isinstance(a, int) else array.shape[old.index(a)] for a in new])

    axes = _reshaped_axes(w.axes, w.shape, shape)
    return None if axes is None else rebuild(w, axes, change, shape)


def _reshaped_axes(axes: str, old: Ints, new: Ints) -> str | None:
    """The letters of the new axes: runs of old and new axes with equal products must stay within one class."""
    if 0 in old:
        return None
    letters, i, j = "", 0, 0
    while i < len(old) or j < len(new):
        # an axis of size one goes as it came: a new one is stacked
        if i < len(old) and old[i] == 1 and (j == len(new) or new[j] != 1):
            i += 1
            continue
        if j < len(new) and new[j] == 1 and (i == len(old) or old[i] != 1):
            letters, j = letters + "s", j + 1
            continue
        first_i, first_j, i, j = i, j, i + 1, j + 1
        while (have := math.prod(old[first_i:i])) != (want := math.prod(new[first_j:j])):
            i, j = (i + 1, j) if have < want else (i, j + 1)
        group = axes[first_i:i]
        if len({CLASS[letter] for letter in group}) > 1:
            return None
        letters += group if i - first_i == j - first_j else group[-1] * (j - first_j)
    return letters
