"""What checkpoints and adapters share: digests, the identity of a base, files written all or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.core.transforms import Delta
from lora_jax.distributed import processes


def digest(content: str | np.ndarray) -> str:
    """blake2b of a string, or of an array's bytes, as hex."""
    raw = content.encode() if isinstance(content, str) else raw_bytes(content)
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def raw_bytes(array: np.ndarray) -> memoryview:
    """An array's bytes, uncopied where they lie in order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def as_json(value: Any) -> str:
    return json.dumps(value)  # unsorted: the order of a spec's globs counts


def named(tree: Any) -> dict[str, Any]:
    """`{name: leaf}`; a name is the leaf's path."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator=":"): leaf for path, leaf in flat}


def nested(flat: Mapping[str, Any]) -> Delta:
    """`{path:factor: array}` -> the delta."""
    delta: dict[str, dict[str, Any]] = {}
    for name, array in flat.items():
        path, _, factor = name.rpartition(":")
        delta.setdefault(path, {})[factor] = array
    return Delta(delta)


def table_of(arrays: Mapping[str, Any]) -> dict[str, list]:
    """`{name: [shape, dtype, digest]}`; one array at a time is on the host."""
    table = {}
    for name, leaf in sorted(arrays.items()):
        x = processes.on_host(leaf)
        table[name] = [list(x.shape), str(x.dtype), digest(x)]
    return table


def identity(params: Any, source: str) -> dict[str, str]:
    """What tells one base from another: where it came from, its shapes and its contents.

    Args:
      params: the base as `interop.hf.load` gives it (the layout counts: loop is not scanned), on any mesh.
      source: the folder or the hub's name it was loaded from, for messages only.

    Returns: `{"source", "shapes", "content"}`: the source, a digest of all paths, shapes and
      dtypes, and a digest of all bytes.
    """
    table = table_of(named(params))
    shapes = {name: [shape, dtype] for name, (shape, dtype, _) in table.items()}
    return {"source": str(source), "shapes": digest(as_json(shapes)), "content": digest(as_json(table))}


def check_base(expected: Mapping[str, str], actual: Mapping[str, str], where: str | Path) -> None:
    """A ValueError that shows the difference, where `actual` is not the base that `where` needs."""
    for part, what in (("shapes", "other shapes"), ("content", "other weights of the same shapes")):
        if expected[part] != actual[part]:
            raise ValueError(
                f"{where} belongs to the base {expected['source']!r} ({part} "
                f"{expected[part][:12]}), but {actual['source']!r} has {what} "
                f"({actual[part][:12]}): give the base it was trained on"
            )


def write_atomically(path: str | Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes a file, given at once or in pieces, so that a crash at any moment leaves the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own is for the owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
