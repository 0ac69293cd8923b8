"""Arrays that lie in files and are read when they are needed, and no further than that."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

Index = tuple[slice, ...]  # one slice an axis, each with begin and end


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """An array that is not read yet: `np.asarray` reads all of it, `read(index)` a part. A leaf of a pytree."""

    name: str  # for messages: the file and the tensor
    shape: tuple[int, ...]
    dtype: np.dtype  # what it is read as, whatever it is stored as
    fetch: Callable[[Index], np.ndarray]  # a part, as it is stored
    kept: bool = False  # stays of its dtype under `astype`: what will train loses too much in half precision

    def read(self, index: Index | None = None) -> np.ndarray:
        """The part at `index` (by default all), of `dtype`.

        Raises:
          ValueError: of the file, that it is damaged; or an entry is too large for the dtype.
        """
        found = self.fetch(tuple(slice(0, size) for size in self.shape) if index is None else index)
        if found.dtype == self.dtype:
            return found
        with np.errstate(over="ignore"):
            cast = found.astype(self.dtype)
        if self.dtype.itemsize < 4 and not np.isfinite(cast).all():
            raise ValueError(f"{self.name} has entries that are too large for {self.dtype}")
        return cast

    def astype(self, dtype: Any) -> "Lazy":
        """The same, read as another type."""
        return self if self.kept else dataclasses.replace(self, dtype=np.dtype(dtype))

    def part(self, k: int, n: int) -> "Lazy":
        """The k-th of n equal parts along the last axis."""
        width = self.shape[-1] // n

        def fetch(index: Index) -> np.ndarray:
            return self.fetch((*index[:-1], slice(index[-1].start + k * width, index[-1].stop + k * width)))

        return self if n == 1 else dataclasses.replace(self, shape=(*self.shape[:-1], width), fetch=fetch)

    @property
    def T(self) -> "Lazy":
        """With its axes in the other order."""
        return dataclasses.replace(self, shape=self.shape[::-1], fetch=lambda index: self.fetch(index[::-1]).T)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read() if dtype is None else self.astype(dtype).read()


def of(array: Any, name: str) -> Lazy:
    """An array that is there already, and stays of its dtype."""
    return Lazy(name, array.shape, np.dtype(array.dtype), lambda index: np.asarray(array)[index], kept=True)


def stacked(layers: list[Lazy]) -> Lazy:
    """Arrays of one shape along a new first axis; one at a time is read, and of each what is asked for."""
    first = layers[0]

    def fetch(index: Index) -> np.ndarray:
        chosen = layers[index[0]]
        out = np.empty((len(chosen), *(one.stop - one.start for one in index[1:])), first.dtype)
        for i, layer in enumerate(chosen):
            out[i] = layer.read(index[1:])
        return out

    return dataclasses.replace(first, shape=(len(layers), *first.shape), fetch=fetch)


def same(a: Lazy, b: Lazy, at_once: int = 1 << 24) -> bool:
    """Whether two arrays of one shape hold the same numbers; about `at_once` of each are read at a time."""
    rows = max(1, at_once // max(1, int(np.prod(a.shape[1:]))))
    rest = tuple(slice(0, size) for size in a.shape[1:])
    parts = ((slice(i, min(i + rows, a.shape[0])), *rest) for i in range(0, a.shape[0], rows))
    return all(np.array_equal(a.read(part), b.read(part)) for part in parts)


def placed(lazy: Lazy, sharding: Sharding) -> Array:
    """The array on the devices of a sharding.

    One device's part after the other is read (once, where several devices hold it), and of a program of several
    processes only those of this one's: the host never holds more than one part besides what its devices hold.
    """
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(lazy.shape).items():
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index or (), lazy.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    parts: list[Array] = []
    for bounds, devices in holders.items():
        part = lazy.read(tuple(slice(*pair) for pair in bounds))
        # Waits: what is on its way to a device takes its place on the host.
        parts += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(lazy.shape, sharding, parts)
