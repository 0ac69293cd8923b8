"""Arrays in files, of which the needed parts are read when they are needed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

Index = tuple[slice, ...]  # one slice an axis, each with start and stop


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """An array that is not read yet: `np.asarray` reads all of it, `read(index)` a part. A leaf of a pytree."""

    name: str  # the file and the tensor, for messages
    shape: tuple[int, ...]
    dtype: np.dtype  # of what is read, whatever the file's dtype
    fetch: Callable[[Index], np.ndarray]  # the part at an index, of the file's dtype
    kept: bool = False  # whether `astype` keeps the dtype, as for what will train: half precision loses too much

    def read(self, index: Index | None = None) -> np.ndarray:
        """The part at `index` (by default all), of `dtype`; a ValueError where the file is damaged, or an entry is too
        large for the dtype."""
        stored = self.fetch(tuple(slice(0, size) for size in self.shape) if index is None else index)
        if stored.dtype == self.dtype:
            return stored
        with np.errstate(over="ignore"):
            cast = stored.astype(self.dtype)
        if self.dtype.itemsize < 4 and not np.isfinite(cast).all():
            raise ValueError(f"{self.name} has entries that are too large for {self.dtype}")
        return cast

    def astype(self, dtype: Any) -> "Lazy":
        """The same array, read as another dtype."""
        return self if self.kept else dataclasses.replace(self, dtype=np.dtype(dtype))

    def part(self, k: int, n: int) -> "Lazy":
        """The k-th of n equal parts along the last axis."""
        width = self.shape[-1] // n

        def fetch(index: Index) -> np.ndarray:
            return self.fetch((*index[:-1], slice(index[-1].start + k * width, index[-1].stop + k * width)))

        return self if n == 1 else dataclasses.replace(self, shape=(*self.shape[:-1], width), fetch=fetch)

    @property
    def T(self) -> "Lazy":
        """The array with its axes in the other order."""
        return dataclasses.replace(self, shape=self.shape[::-1], fetch=lambda index: self.fetch(index[::-1]).T)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read() if dtype is None else self.astype(dtype).read()


def of(array: Any, name: str) -> Lazy:
    """An array in memory as a Lazy that keeps its dtype."""
    return Lazy(name, array.shape, np.dtype(array.dtype), lambda index: np.asarray(array)[index], kept=True)


def stacked(layers: list[Lazy]) -> Lazy:
    """Arrays of one shape along a new first axis; they are read one at a time, and of each the part of the index."""
    first = layers[0]

    def fetch(index: Index) -> np.ndarray:
        chosen = layers[index[0]]
        out = np.empty((len(chosen), *(axis.stop - axis.start for axis in index[1:])), first.dtype)
        for i, layer in enumerate(chosen):
            out[i] = layer.read(index[1:])
        return out

    return dataclasses.replace(first, shape=(len(layers), *first.shape), fetch=fetch)


def same(a: Lazy, b: Lazy, at_once: int = 1 << 24) -> bool:
    """Whether two arrays of one shape hold the same numbers; about `at_once` entries of each are read at a time."""
    rows = max(1, at_once // max(1, int(np.prod(a.shape[1:]))))
    rest = tuple(slice(0, size) for size in a.shape[1:])
    parts = ((slice(i, min(i + rows, a.shape[0])), *rest) for i in range(0, a.shape[0], rows))
    return all(np.array_equal(a.read(part), b.read(part)) for part in parts)


def placed(lazy: Lazy, sharding: Sharding) -> Array:
    """The array on the devices of a sharding that this process can address. Its parts are read one after the other,
    once where several devices hold the same: the host holds one part at most besides what its devices hold."""
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(lazy.shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index or (), lazy.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    parts: list[Array] = []
    for bounds, devices in holders.items():
        part = lazy.read(tuple(slice(*pair) for pair in bounds))
        # Waits: until an array is on the device, the host holds it too.
        parts += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(lazy.shape, sharding, parts)
