"""What a run leaves behind: checkpoints that resume it, and adapters as files.

A checkpoint (orbax) holds the delta and the rest of the training state, the transform's spec, the
identity of the base and a digest of every array, never the base's weights. Orbax keeps no checksum
of array data: a flipped bit would be read silently, so every reader here compares the digests, says
what is damaged (`logging.warning`) and takes the checkpoint before it. An adapter is one
`adapter.safetensors` with names `path:factor`, and spec and base identity in its metadata.

Arrays pass through this process's memory whole: one process, any mesh.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from lora_jax.transforms import Delta, ParamTransform, from_spec

S = TypeVar("S")
_PARTS = ("delta", "rest")
_ADAPTER = "adapter.safetensors"
_ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Run(NamedTuple):
    """A trained run, without its base."""

    method: ParamTransform
    delta: Delta
    step: int
    config: dict[str, Any]


# --- digests and identities -------------------------------------------------------------------


def _digest(content: str | np.ndarray) -> str:
    """blake2b of a string, or of an array's bytes, as hex."""
    if isinstance(content, str):
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    raw = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
    return hashlib.blake2b(raw.data, digest_size=16).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value)  # unsorted: the order of a spec's globs counts


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    """`{name: array on the host}`; a name is the leaf's path."""
    return {name: np.asarray(leaf) for name, leaf in jax.device_get(_named(tree)).items()}


def _named(tree: Any) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator=":"): leaf for path, leaf in flat}


def _table(arrays: Mapping[str, np.ndarray]) -> dict[str, list]:
    """`{name: [shape, dtype, digest]}`."""
    return {n: [list(x.shape), str(x.dtype), _digest(x)] for n, x in sorted(arrays.items())}


def identity(params: Any, source: str) -> dict[str, str]:
    """What tells one base from another: where it came from, its shapes and its contents.

    Args:
      params: the base as `interop.hf.load` gives it (the layout counts: loop is not scanned).
      source: the folder or the hub's name it was loaded from, for messages only.

    Returns: `{"source", "shapes", "content"}`: the source, a digest of all paths, shapes and
      dtypes, and a digest of all bytes.
    """
    table = _table(_arrays(params))
    shapes = {name: [shape, dtype] for name, (shape, dtype, _) in table.items()}
    return {"source": str(source), "shapes": _digest(_json(shapes)), "content": _digest(_json(table))}


def check_base(expected: Mapping[str, str], found: Mapping[str, str], where: str | Path) -> None:
    """A ValueError that shows the difference, where `found` is not the base that `where` needs."""
    for part, what in (("shapes", "other shapes"), ("content", "other weights of the same shapes")):
        if expected[part] != found[part]:
            raise ValueError(
                f"{where} belongs to the base {expected['source']!r} ({part} "
                f"{expected[part][:12]}), but {found['source']!r} has {what} "
                f"({found[part][:12]}): give the base it was trained on"
            )


# --- checkpoints ------------------------------------------------------------------------------


def manager(workdir: str | Path, *, keep: int = 3) -> ocp.CheckpointManager:
    """Orbax's manager of `workdir/checkpoints` for writing: saves in the background, keeps `keep`.

    What earlier writers left unfinished is removed: one process at a time writes a workdir.
    """
    folder = _folder(workdir)
    for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(folder, options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    *,
    spec: Mapping[str, Any],
    base: Mapping[str, str],
    position: Sequence[int] = (),
) -> None:
    """Begins to save a training state; `manager.wait_until_finished()` waits for it.

    Args:
      manager: of `manager(workdir)`.
      step: must be larger than every step that is there.
      state: a NamedTuple of pytrees with a field `delta`; everything in it comes back. Keys in it
        are raw data (`jax.random.key_data`).
      spec: of the transform.
      base: of `identity`.
      position: in the data (epoch, batch), for the reader.
    """
    parts = {"delta": _arrays(state.delta), "rest": _arrays(state._replace(delta=None))}
    meta: dict[str, Any] = {"step": step, "spec": dict(spec), "base": dict(base)}
    meta["position"] = list(position)
    meta["arrays"] = {part: _table(arrays) for part, arrays in parts.items()}
    items = {part: ocp.args.StandardSave(arrays) for part, arrays in parts.items()}
    items["meta"] = ocp.args.JsonSave(meta | {"digest": _digest(_json(meta))})
    if not manager.save(step, args=ocp.args.Composite(**items)):  # orbax only returns False
        raise ValueError(f"{manager.directory}: step {step} cannot be saved after step {manager.latest_step()}")


def forget_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Deletes the checkpoints after `step`, which orbax would not let a resumed run write again."""
    for later in manager.all_steps():
        if later > step:
            manager.delete(later)


def restore(workdir: str | Path, like: S, *, base: Mapping[str, str] | None = None) -> S:
    """The newest good checkpoint as a state to go on training with.

    Args:
      workdir: of the run.
      like: a state of the same structure, of arrays or ShapeDtypeStructs; their shardings say
        where each array goes (any mesh).
      base: the identity of the base at hand; another than the checkpoint's is a ValueError.

    Raises:
      FileNotFoundError: there is no checkpoint. ValueError: none is good, or another structure.
    """
    for step, meta in _good_steps(workdir):
        if base is not None:
            check_base(meta["base"], base, workdir)
        found = _read(workdir, step, meta, _PARTS)
        if found is not None:
            rest = _place(found["rest"], like._replace(delta=None), workdir)  # type: ignore[attr-defined]
            delta = _place(found["delta"], like.delta, workdir)  # type: ignore[attr-defined]
            return rest._replace(delta=delta)
    raise ValueError(f"{_folder(workdir)}: no checkpoint is readable; start again in a new workdir")


def load(workdir: str | Path, *, step: int | None = None) -> Run:
    """A run from its workdir, without its base: the newest good checkpoint, or that of `step`.

    >>> run = load("runs/e2e")  # doctest: +SKIP
    >>> adapted = run.method.apply(params, run.delta)  # doctest: +SKIP
    """
    config = json.loads(_required(Path(workdir) / "config.json").read_text())
    for found_step, meta in _good_steps(workdir, step):
        found = _read(workdir, found_step, meta, ("delta",))
        if found is not None:
            delta = _nested({name: jnp.asarray(x) for name, x in found["delta"].items()})
            return Run(from_spec(meta["spec"]), delta, found_step, config)
    raise ValueError(f"{_folder(workdir)}: no checkpoint is readable{_of(step)}")


def meta_of(workdir: str | Path) -> dict[str, Any]:
    """What the newest good checkpoint says of itself: "step", "spec" of the transform, "base" for `check_base`, ..."""
    for _, meta in _good_steps(workdir):
        return meta
    raise ValueError(f"{_folder(workdir)}: no checkpoint is readable")


def latest_step(workdir: str | Path) -> int | None:
    """The step of the newest checkpoint, unread; None where there is none."""
    return max(_steps(workdir), default=None)


def _folder(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"


def _steps(workdir: str | Path) -> list[int]:
    return [int(path.name) for path in _folder(workdir).glob("*") if path.name.isdecimal()]


def _of(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


def _required(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is {path.parent} the workdir of a run?")
    return path


def _good_steps(workdir: str | Path, step: int | None = None) -> Iterator[tuple[int, dict]]:
    """`(step, meta)` of the checkpoints whose meta is whole, newest first."""
    folder = _folder(workdir)
    steps = sorted(_steps(workdir), reverse=True)
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"{folder}: no checkpoint{_of(step)}; there are steps {steps}")
    for each in steps if step is None else [step]:
        try:
            meta = dict(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / str(each) / "meta"))
            if meta.pop("digest") != _digest(_json(meta)):
                raise ValueError("its meta differs from its digest")
        except Exception as error:  # whatever orbax raises on damaged files
            _warn(folder / str(each), error)
        else:
            yield each, meta


def _read(workdir: str | Path, step: int, meta: dict, parts: tuple[str, ...]) -> Any:
    """`{part: {name: numpy array}}`, or None (and a warning) where the checkpoint is damaged."""
    folder = _folder(workdir) / str(step)
    try:
        found = {}
        for part in parts:
            table = meta["arrays"][part]
            like = {n: np.empty(shape, jnp.dtype(dtype)) for n, (shape, dtype, _) in table.items()}
            reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
            found[part] = reader.restore(folder / part, args=ocp.args.StandardRestore(like))
            if _table(found[part]) != table:
                raise ValueError(f"its {part} differs from its digests")
    except Exception as error:  # whatever orbax and tensorstore raise on damaged files
        return _warn(folder, error)
    return found


def _warn(folder: Path, error: Exception) -> None:
    first = (str(error).splitlines() or [type(error).__name__])[0][:200]
    logging.warning("%s is damaged (%s): the checkpoint before it is used", folder, first)


def _place(arrays: Mapping[str, np.ndarray], like: Any, where: Any) -> Any:
    """The arrays in the structure, dtypes and shardings of `like`."""
    named = _named(like)
    if named.keys() != arrays.keys():
        raise ValueError(
            f"{where}: the checkpoint lacks {sorted(named.keys() - arrays.keys())[:5]} and has in "
            f"excess {sorted(arrays.keys() - named.keys())[:5]}: another method or optimizer"
        )
    placed = []
    for name, leaf in named.items():
        value = arrays[name]
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{where}: {name} is {value.dtype}{list(value.shape)} in the checkpoint, "
                f"{leaf.dtype}{list(leaf.shape)} in this run"
            )
        placed.append(jax.device_put(value, leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def _nested(flat: Mapping[str, Any]) -> Delta:
    """`{path:factor: array}` -> the delta."""
    delta: dict[str, dict[str, Any]] = {}
    for name, array in flat.items():
        path, _, factor = name.rpartition(":")
        delta.setdefault(path, {})[factor] = array
    return Delta(delta)


# --- adapters as files ------------------------------------------------------------------------


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file so that a crash at any moment leaves the old one or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own is for the owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _adapter_file(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix == ".safetensors" else Path(path) / _ADAPTER


def save_adapter(path: str | Path, method: ParamTransform, delta: Delta, base_id: Mapping[str, str]) -> Path:
    """Writes an adapter as one file; equal adapters give equal bytes.

    Args:
      path: a folder (for `adapter.safetensors`) or a file that ends in `.safetensors`.
      method: the transform; its spec is stored.
      delta: its trained delta.
      base_id: of `identity`.

    Returns: the file.
    """
    arrays = _arrays(delta)
    if bad := [name for name, x in arrays.items() if not np.isfinite(x.astype(np.float32)).all()]:
        raise ValueError(f"{path}: {bad[0]} is not finite; an adapter like that is not saved")
    info = {"format": 1, "spec": method.spec, "base": dict(base_id)}
    info["digest"] = _digest(_json([info, _table(arrays)]))
    # One key only: safetensors writes several in no fixed order.
    content = safetensors.numpy.save(arrays, metadata={"lora_jax": _json(info)})
    write_atomically(file := _adapter_file(path), content)
    return file


def load_adapter(path: str | Path) -> tuple[ParamTransform, Delta, dict[str, Any]]:
    """`(method, delta, info)` of a file of `save_adapter`; info has format, spec, base, digest.

    Raises:
      FileNotFoundError: no such file. ValueError: cut off, changed, of another kind, or an array
      is not floating-point or not finite.
    """
    file = _adapter_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: is {path} an adapter of save_adapter?")
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get("lora_jax")
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{file} was not written by save_adapter: its metadata lacks 'lora_jax'")
    for name, array in arrays.items():
        if array.dtype.name not in _ADAPTER_DTYPES:
            raise ValueError(f"{file}: {name} is {array.dtype}; an adapter is floating-point")
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{file}: {name} is not finite")
    info = _whole(text, arrays, file)
    delta = _nested({name: jnp.asarray(x) for name, x in arrays.items()})
    return from_spec(info["spec"]), delta, info


def _whole(text: str, arrays: Mapping[str, np.ndarray], file: Path) -> dict[str, Any]:
    """The metadata of an adapter's file, where it and the arrays are as they were written."""
    try:
        info = json.loads(text)
        said = info.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError):
        said = info = None
    table = _table(arrays)
    if said is None or said != _digest(_json([info, table])):
        raise ValueError(f"{file} differs from its digest: it was changed or damaged")
    if info["format"] != 1:
        raise ValueError(f"{file} is of format {info['format']}; this version reads format 1")
    return info | {"digest": said}
