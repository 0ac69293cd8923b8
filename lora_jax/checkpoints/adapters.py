"""Adapters as files: one `adapter.safetensors` with names `path:factor`, spec and base identity in its metadata."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from lora_jax.checkpoints.files import digest, named, nested, raw_bytes, table_of, write_atomically
from lora_jax.core.transforms import Delta, ParamTransform, from_spec
from lora_jax.data.json_files import parse_json
from lora_jax.distributed import processes
from lora_jax.methods.arguments import brief

_ADAPTER = "adapter.safetensors"
# What an adapter may be of, as numpy and as the file calls it; in the file the widest come first.
_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def _adapter_file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path / _ADAPTER


@brief
def save_adapter(path: str | Path, method: ParamTransform, delta: Delta, base_id: Mapping[str, Any]) -> Path:
    """Writes an adapter as one file, which it returns; equal adapters give equal bytes. `path` is a folder (for
    `adapter.safetensors`) or a file that ends in `.safetensors`, `base_id` comes from `identity`.

    With several processes all of them call it, and the first one writes. One factor at a time is in their memory.

    >>> import tempfile, jax, lora_jax as lj
    >>> from lora_jax import checkpoints
    >>> params, method = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> delta = method.init(jax.random.key(0), params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = checkpoints.save_adapter(folder, method, delta, checkpoints.identity(params, "ones"))
    ...     method, delta, info = checkpoints.load_adapter(folder)
    >>> file.name, info["base"]["source"]
    ('adapter.safetensors', 'ones')
    """
    if not (isinstance(method, ParamTransform) and isinstance(delta, Delta) and isinstance(base_id, Mapping)):
        given = ", ".join(type(x).__name__ for x in (path, method, delta, base_id))
        wanted = "(path, method, delta, checkpoints.identity(params, source))"
        raise TypeError(f"save_adapter takes {wanted}; got ({given})")
    arrays, table = named(delta), {}
    for name in sorted(arrays):
        x = processes.on_host(arrays[name])
        _check_finite(path, name, x)
        table[name] = [list(x.shape), str(x.dtype), digest(x)]
    info = {"format": 1, "spec": method.spec, "base": dict(base_id)}
    info["digest"] = digest(json.dumps([info, table]))
    pieces = _pieces(arrays, table, json.dumps(info))
    file = _adapter_file(path)
    if processes.is_primary():
        write_atomically(file, pieces)
    else:
        for _ in pieces:  # takes part in gathering them
            pass
    processes.everywhere(True)  # the file is there, for all
    return file


def _check_finite(path: str | Path, name: str, array: np.ndarray) -> None:
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"{path}: {name} is {array.dtype}; an adapter is floating-point")
    if not np.isfinite(array.astype(np.float32)).all():
        raise ValueError(f"{path}: {name} is not finite; an adapter like that is neither saved nor loaded")


def _pieces(arrays: Mapping[str, Any], table: Mapping[str, list], info: str) -> Iterator[bytes | memoryview]:
    """A safetensors file, as the library writes it (https://huggingface.co/docs/safetensors), an array at a time."""
    order = sorted(table, key=lambda name: (list(_DTYPES).index(table[name][1]), name))
    header: dict[str, Any] = {"__metadata__": {"lora_jax": info}}
    end = 0
    for name in order:
        shape, dtype, _ = table[name]
        begin, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for name in order:
        yield raw_bytes(processes.on_host(arrays[name]))


@brief
def load_adapter(path: str | Path) -> tuple[ParamTransform, Delta, dict[str, Any]]:
    """`(method, delta, info)` of a file of `save_adapter`; info has format, spec, base, digest.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is cut off, changed, of another kind, or an array is not floating-point or not finite.

    An example is in `save_adapter`.
    """
    file = _adapter_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: is {path} an adapter of save_adapter?")
    text, arrays = _read(file)
    if text is None:
        raise ValueError(f"{file} was not written by save_adapter: its metadata lacks 'lora_jax'")
    try:
        info = parse_json(text.encode(), strict=False)
        stored = info.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError):
        stored = info = None
    if stored is None or stored != digest(json.dumps([info, table_of(arrays)])):
        raise ValueError(f"{file} differs from its digest: it was changed or damaged")
    if info.get("format") != 1:
        raise ValueError(f"{file} is of format {info.get('format')!r}; this version reads format 1")
    if not (isinstance(info.get("spec"), dict) and isinstance(info.get("base"), dict)):
        raise ValueError(f"{file} was not written by save_adapter: it lacks its method's spec or its base's identity")
    delta = nested({name: jnp.asarray(x) for name, x in arrays.items()})
    return method_of(file, info["spec"]), delta, info | {"digest": stored}


def _read(file: Path) -> tuple[str | None, dict[str, np.ndarray]]:
    """The metadata's text and the arrays of a safetensors file, all of them floating-point and finite."""
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get("lora_jax")
            for name in opened.keys():  # before numpy meets a type or a size that it does not have
                entry = opened.get_slice(name)
                if entry.get_dtype() not in _DTYPES.values():
                    raise ValueError(f"{name} is {entry.get_dtype()}; an adapter is floating-point")
                np.empty(entry.get_shape(), np.uint8)
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    except (safetensors.SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{file} is no adapter, or not all of one: {error}") from error
    for name, array in arrays.items():
        _check_finite(file, name, array)
    return text, arrays


def method_of(file: Path, spec: dict[str, Any]) -> ParamTransform:
    """The method of the spec that a file holds; a ValueError that names the file where the spec makes none."""
    try:
        return from_spec(spec)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file}: {error}") from error
