"""What checkpoints and adapters share: digests, checksums, the identity of a base, files written all or not at all."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, NamedSharding, P, lax

from lora_jax.core.transforms import Delta
from lora_jax.distributed import processes

fcntl: Any  # advisory locks
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def digest(content: str | np.ndarray) -> str:
    """blake2b, as hex, of a string (JSON with unsorted keys: the order of globs counts), or of an array's bytes."""
    raw = content.encode() if isinstance(content, str) else raw_bytes(content)
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def raw_bytes(array: np.ndarray) -> memoryview:
    """An array's bytes, uncopied where they lie in order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def named(tree: Any) -> dict[str, Any]:
    """`{name: leaf}`; a name is the leaf's path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=":"): leaf for path, leaf in leaves}


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


def identity(
    params: Any, source: str, *, config: Mapping[str, Any] | None = None, tokenizer: Any = None
) -> dict[str, Any]:
    """What tells one base from another: `{"source", "shapes", "content"}`, of which "shapes" is a digest of all paths,
    shapes and dtypes, and "content" one of all bytes; and "config" and "tokenizer" where they are given.

    Args:
      params: the base as `interop.hf.load` gives it (the layout counts: loop is not scanned), on any mesh.
      source: the folder or the hub's name it was loaded from, for messages only.
      config: what else its function depends on, JSON (`models.family.function_fields`).
      tokenizer: that of the base, of which the identity has a digest.

    >>> identity({"kernel": jnp.ones((2, 2))}, "two by two")["source"]
    'two by two'
    """
    table = table_of(named(params))
    shapes = {name: [shape, dtype] for name, (shape, dtype, _) in table.items()}
    parts = {"source": str(source), "shapes": digest(json.dumps(shapes)), "content": digest(json.dumps(table))}
    further = {} if config is None else {"config": json.loads(json.dumps(dict(config)))}
    return parts | further | ({} if tokenizer is None else {"tokenizer": _tokenizer_digest(tokenizer)})


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of a tokenizer without the truncation and padding that its file asks for, which texts are encoded without. A
    field that is not set is as one that is not there: later versions of `tokenizers` write more of them."""

    def set_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: x for name, x in pairs if x is not None and x is not False and x not in ("", [], {})}

    # The vocabulary and what follows, most of it, are digested as they are written: parsing them takes three times as
    # long as all else. Inside a string the quotes of `"vocab":` would be escaped.
    head, key, rest = tokenizer.to_str().partition('"vocab":')
    fields = json.loads(f"{head}{key}0}}}}" if key else head, object_pairs_hook=set_fields)
    for name in ("truncation", "padding"):
        fields.pop(name, None)
    return digest(json.dumps(fields, sort_keys=True) + rest)


def checksums(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Of each array 16 hex digits that its values, bit by bit, and their positions determine; of any dtype but keys.

    They are computed where the arrays are, equal on every mesh; with several processes all of them call this. Each
    element's bits are mixed with a hash of its position in the array, and the results added up modulo 2^32: a sum does
    not depend on how the elements are spread over devices. A change of one element always changes the first sum (the
    mixing is one-to-one); for all else two sums leave a chance of 2^-64.

    >>> one, same, other = (checksums({"a": jnp.array(x)})["a"] for x in ([1.0, 2.0], [1.0, 2.0], [2.0, 1.0]))
    >>> one == same, one == other
    (True, False)
    """
    return {name: "".join(f"{part:08x}" for part in pair.tolist()) for name, pair in on_each(_sums, arrays)}


def on_each(function: Callable[[Array], Array], arrays: Mapping[str, Array]) -> Iterator[tuple[str, np.ndarray]]:
    """Of each array its name and a small result of the function, which is compiled once a shape and runs where the
    array is; with several processes all of them call this."""
    for name, x in arrays.items():
        sharding = getattr(x, "sharding", None)
        replicated = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
        # one after the other: CPU devices of several processes deadlock in many small programs at once
        yield name, jax.device_get(jax.jit(function, out_shardings=replicated)(x))


def _sums(x: Array) -> Array:
    """(2,) uint32."""
    words = _words(x)
    position = jnp.full(words.shape, 0x9E3779B9, jnp.uint32)
    for axis in range(words.ndim):
        position = _mixed(position + lax.broadcasted_iota(jnp.uint32, words.shape, axis))
    one, other = _mixed(words + position), _mixed((words ^ position) * np.uint32(0x2C1B3C6D))
    return jnp.stack([jnp.sum(one, dtype=jnp.uint32), jnp.sum(other, dtype=jnp.uint32)])


def _words(x: Array) -> Array:
    """The bits of the elements as uint32, of wider ones as several along a last axis."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
    if bits < 8:  # a float32 holds them all
        return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    if bits < 32:
        return lax.bitcast_convert_type(x, jnp.uint8 if bits == 8 else jnp.uint16).astype(jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.uint32)


def _mixed(x: Array) -> Array:
    """MurmurHash3's finalizer (Appleby 2011), which is one-to-one."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def check_base(expected: Mapping[str, Any], actual: Mapping[str, Any], where: str | Path) -> None:
    """A ValueError that shows the difference, where `actual` is not the base that `where` needs. Of config and
    tokenizer, which older files and identities of parameters alone lack, what both have is compared. A base in other
    bits (`config.model.base_bits`) is a warning: it is the same base, with values that are off by their rounding.

    >>> base = identity({"kernel": jnp.ones((2, 2))}, "ones")
    >>> check_base(base, base, "adapter.safetensors")  # nothing: it is the same base
    """
    needed, given = f"{where} belongs to the base {expected['source']!r}", repr(actual["source"])
    for part, what in (
        ("shapes", "other shapes"),
        ("content", "other weights of the same shapes"),
        ("tokenizer", "another tokenizer"),
    ):
        if part == "tokenizer" and not (part in expected and part in actual):
            continue
        if expected[part] != actual[part]:
            digests = expected[part][:12], actual[part][:12]
            problem = f"{needed} ({part} {digests[0]}), but {given} has {what} ({digests[1]})"
            raise ValueError(f"{problem}: give the base it was trained on")
    if (then := expected.get("bits")) != (now := actual.get("bits")):
        kept = [f"in {bits} bits" if bits else "as it is" for bits in (then, now)]
        logging.warning("%s was trained on its base %s, which is %s here", where, *kept)
    then, now = expected.get("config") or {}, actual.get("config") or {}
    if different := [name for name in then if name in now and then[name] != now[name]]:
        fields = ", ".join(f"{name} {then[name]!r}, not {now[name]!r}" for name in different)
        raise ValueError(f"{needed}, whose config has {fields} as {given}: give the base it was trained on")


def write_atomically(path: str | Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes a file, given at once or in pieces, so that a crash at any moment leaves the old one or the new one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder, "notes.txt"), b"all of it or nothing")
    """
    with naming(path):
        _write_atomically(Path(path).expanduser(), content)


def _write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = open_beside(path)
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_beside(path: Path) -> tuple[int, Path]:
    """A new file beside a path, to be renamed to it: its descriptor and its path. Who may read it is as the umask says;
    a file of `tempfile` would be its owner's alone."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileExistsError):
            return os.open(temporary, flags, 0o666), temporary


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """A context for writing a file or a folder, in which the OSError of a full disk names it.

    >>> from lora_jax import checkpoints
    >>> with checkpoints.naming("results.json"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'results.json'
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
