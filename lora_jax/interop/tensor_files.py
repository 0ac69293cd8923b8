"""Safetensors files of unknown origin, read strictly: a file is valid as a whole, or an error names it.

Stricter than the safetensors library where a file is ambiguous or could do harm: duplicate keys, a header of more than
16 MiB, entries that are no objects, types and numbers that no weight has. Nothing is unpickled.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.data.json_files import LARGEST, parse_json
from lora_jax.interop.lazy import Index, Lazy

FLOATS = ("float32", "float16", "bfloat16")

# The file's names -> numpy's; other types keep the file's name.
_DTYPES = {f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64)}
_DTYPES |= {"BF16": "bfloat16", "BOOL": "bool", "C64": "complex64"}


def read_file(path: str | os.PathLike, *, ignored: re.Pattern | None = None) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, as they are stored; without those whose whole name `ignored` matches.

    The caller checks that the file may be read (`folders.inside`).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is cut off, damaged or ambiguous, or a tensor is of another type than FLOATS or not finite.
    """
    tensors = open_file(path, ignored=ignored)
    with _opened(Path(path)) as file:
        return {name: _tensor(file, name, tensor.dtype, Path(path)) for name, tensor in tensors.items()}


def open_file(path: str | os.PathLike, *, ignored: re.Pattern | None = None) -> dict[str, Lazy]:
    """As `read_file`, but tensors are read, and checked to be finite, when they are used. Each reading opens the file
    and closes it again, which frees its mapped memory; a ValueError where the file was changed in between."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    _check_header(path)
    with _opened(path) as file:
        names = [name for name in file.keys() if ignored is None or not ignored.fullmatch(name)]
        return {name: _lazy(file, name, path) for name in names}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _check_header(path: Path) -> None:
    """A ValueError for what the safetensors library does not refuse in a header."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise _damaged(path, f"{size} bytes hold no header")
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST, size - 8):
            raise _damaged(path, f"a header of {length} bytes in a file of {size}")
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise _damaged(path, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    if wrong := [name for name in header if name != "__metadata__" and not isinstance(header[name], dict)]:
        raise _damaged(path, f"the entry of {wrong[0]} is no object")


def _lazy(file: Any, name: str, path: Path) -> Lazy:
    """One tensor of an open file, which is opened again to read it."""
    entry = file.get_slice(name)
    dtype = _DTYPES.get(entry.get_dtype(), entry.get_dtype())
    if dtype not in FLOATS:
        raise ValueError(f"{path}: {name} is {dtype}, not {', '.join(FLOATS[:-1])} or {FLOATS[-1]}")
    stored, shape, version = jnp.dtype(dtype), tuple(entry.get_shape()), version_of(path)

    def fetch(index: Index) -> np.ndarray:
        is_all = all((axis.start, axis.stop) == (0, size) for axis, size in zip(index, shape, strict=True))
        with _opened(path) as file:
            if version_of(path) != version:
                raise ValueError(f"{path} was changed while it was read: read all of it again")
            return _tensor(file, name, stored, path, None if is_all else index)

    return Lazy(f"{path}: {name}", shape, stored, fetch)


def version_of(path: Path) -> tuple[int, int, int]:
    """What changes when the file is written to or replaced."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _tensor(file: Any, name: str, dtype: np.dtype, path: Path, index: Index | None = None) -> np.ndarray:
    """One tensor of an open file, or a part of it."""
    entry = file.get_slice(name)
    shape = entry.get_shape() if index is None else [axis.stop - axis.start for axis in index]
    try:
        # Allocated by numpy first: where memory is short the library panics, which is no Exception.
        np.empty(shape, dtype)
        tensor = file.get_tensor(name) if index is None else entry[index]
    except (ValueError, OverflowError, MemoryError) as error:  # shapes that numpy does not have
        raise _damaged(path, f"{name} has shape {shape}: {error}") from error
    if not np.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} has entries that are not finite")
    return tensor


def _damaged(path: Path, why: Any) -> ValueError:
    return ValueError(f"{path} is cut off or damaged ({why}): fetch it again")
