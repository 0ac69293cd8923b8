"""Checkpoints of a run, which resume it on any mesh and by any number of processes.

A checkpoint (orbax) holds the delta and the rest of the training state, the transform's spec, the identity of the base
and a checksum of every array, never the base's weights. Each process writes and reads what its devices hold. Orbax
keeps no checksum of array data: a flipped bit would be read silently, so every reader here compares the checksums,
warns of what is damaged (`logging.warning`) and takes the checkpoint before it.
"""

import concurrent.futures.thread  # noqa: F401  what it does at the end is registered, see below
import contextlib
import functools
import json
import logging
import shutil
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lora_jax.checkpoints.adapters import method_of
from lora_jax.checkpoints.files import check_base, checksums, digest, named, nested
from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.data.json_files import LARGEST, read_json
from lora_jax.distributed import processes
from lora_jax.methods.arguments import brief

S = TypeVar("S")
_MANAGERS: weakref.WeakSet[ocp.CheckpointManager] = weakref.WeakSet()


class Run(NamedTuple):
    """A trained run, without its base. An example is in `training.train`."""

    method: ParamTransform
    delta: Delta
    step: int
    config: dict[str, Any]

    def __repr__(self) -> str:
        return f"Run(step {self.step}, {self.method})"


class _Manager(ocp.CheckpointManager):
    """Leaves it to the training loop to ask JAX whether the run has to end (`training.loop`).

    JAX's service plans the stop for the step after the last number that it was asked with. Orbax asks too, with the
    step that it saves, also late and from another thread: the stop could then be planned for a step that is past.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def manager(workdir: str | Path, *, keep: int = 3) -> ocp.CheckpointManager:
    """Orbax's manager of `workdir/checkpoints` for writing: saves in the background, keeps the newest `keep`. A process
    that ends waits for what is being written.

    What earlier writers left unfinished is removed: one run at a time writes a workdir. With several processes all of
    them call this, with one folder that all of them can read and write.

    An example is in `save`.
    """
    folder = _folder(workdir)

    def clear() -> None:
        for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    processes.on_primary(clear)
    writer = _Manager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))
    _MANAGERS.add(writer)
    return writer


def _finish_saves() -> None:
    """Waits, at the end of the process, for what is being written."""
    for writer in list(_MANAGERS):
        try:
            writer.wait_until_finished()
        except Exception as error:  # whatever orbax and tensorstore raise
            logging.error("%s cannot be written: %s", writer.directory, _first_line(error))


# Writing needs pools of threads, which Python has stopped when it calls what `atexit` has. This it calls before, in the
# opposite order of registration: before it stops the pools.
threading._register_atexit(_finish_saves)  # type: ignore[attr-defined]


@contextlib.contextmanager
def opened(workdir: str | Path, *, keep: int = 3) -> Iterator[ocp.CheckpointManager]:
    """`manager` as a context, at whose end it waits for what is being written.

    Raises:
      OSError: it, or another file that the block writes, could not be written; names the newest complete checkpoint.

    An example is in `save`.
    """
    try:
        writer = manager(workdir, keep=keep)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to see
                writer.close()
            raise
    except OSError as error:
        if error.errno is None:  # names the checkpoint already
            raise
        _raise_unwritten(workdir, error)
    try:
        writer.close()
    except Exception as error:  # whatever orbax and tensorstore raise
        _raise_unwritten(workdir, error)


def _raise_unwritten(workdir: str | Path, error: Exception) -> NoReturn:
    """Raises an OSError that names the newest complete checkpoint of a run of which something could not be written."""
    step = latest_step(workdir)
    kept = "there is no checkpoint yet" if step is None else f"the checkpoint of step {step} is complete"
    raise OSError(f"{workdir} cannot be written: {_first_line(error)}. {kept}; the same command resumes it") from error


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    *,
    spec: Mapping[str, Any],
    base: Mapping[str, Any],
    position: Sequence[int] = (),
    data: Mapping[str, Any] = {},
) -> None:
    """Begins to save a training state; `manager.wait_until_finished()` waits for it.

    With several processes all of them call it; each writes what its devices hold.

    Args:
      step: must be larger than every step that is there.
      state: a NamedTuple of pytrees with a field `delta`, on any mesh; everything in it comes back. Keys in it are raw
        data (`jax.random.key_data`).
      spec, base: of the transform, and of `identity`.
      position: in the data (epoch, batch), for the reader.
      data: digests of the data, JSON, which a run that resumes is compared with.

    Raises:
      OSError: this checkpoint, or the one before, could not be written; names the complete one.

    >>> import tempfile, jax, jax.numpy as jnp, optax, lora_jax as lj
    >>> from lora_jax import checkpoints, training
    >>> params, method = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> base = checkpoints.identity(params, "ones")
    >>> state = training.new_state(method, optax.sgd(0.1), params, jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     with checkpoints.opened(workdir) as manager:  # or manager = checkpoints.manager(workdir)
    ...         for step in (10, 20):
    ...             checkpoints.save(manager, step, state, spec=method.spec, base=base)
    ...     with checkpoints.opened(workdir) as manager:
    ...         checkpoints.forget_after(manager, 10)
    ...     print(checkpoints.latest_step(workdir), checkpoints.meta_of(workdir)["base"]["source"])
    ...     same = checkpoints.restore(workdir, state, base=base)
    ...     print(checkpoints.has_data(workdir))  # `save` had none
    10 ones
    False
    >>> bool((same.delta["kernel"]["a"] == state.delta["kernel"]["a"]).all())
    True
    """
    parts = {"delta": named(state.delta), "rest": named(state._replace(delta=None))}
    parts = {part: {name: jnp.asarray(x) for name, x in arrays.items()} for part, arrays in parts.items()}
    meta: dict[str, Any] = {"step": step, "spec": dict(spec), "base": dict(base), "position": list(position)}
    meta |= {"data": dict(data), "arrays": {}}
    for part, arrays in parts.items():  # [shape, dtype, checksum]
        sums = checksums(arrays)
        meta["arrays"][part] = {
            n: [list(arrays[n].shape), str(arrays[n].dtype), checksum] for n, checksum in sums.items()
        }
    items = {part: ocp.args.StandardSave(arrays) for part, arrays in parts.items()}
    items["meta"] = ocp.args.JsonSave(meta | {"digest": digest(json.dumps(meta))})
    try:
        saved = manager.save(step, args=ocp.args.Composite(**items))
    except Exception as error:  # whatever orbax and tensorstore raise, of this save or the one before
        _raise_unwritten(Path(manager.directory).parent, error)
    if not saved:  # orbax only returns False
        raise ValueError(f"{manager.directory}: step {step} cannot be saved after step {manager.latest_step()}")


def forget_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Deletes the checkpoints after `step`, which orbax would not let a resumed run write again.

    An example is in `save`.
    """
    for later in manager.all_steps():
        if later > step:
            manager.delete(later)


def restore(workdir: str | Path, like: S, *, base: Mapping[str, Any] | None = None) -> S:
    """The newest good checkpoint as a state to resume from.

    With several processes all of them call it, and each reads what its devices will hold.

    Args:
      like: a state of the same structure, of arrays or ShapeDtypeStructs, on whose shardings (any mesh) the arrays go.
      base: the identity of the base at hand; another than the checkpoint's is a ValueError.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: none is good, or another structure.

    An example is in `save`.
    """
    parts = {"delta": like.delta, "rest": like._replace(delta=None)}  # type: ignore[attr-defined]
    for step, meta in _good_steps(workdir):
        if base is not None:
            check_base(meta["base"], base, workdir)
        wanted = {part: _wanted(tree, meta["arrays"][part], workdir) for part, tree in parts.items()}
        arrays = _read(workdir, step, meta, wanted)
        if arrays is not None:
            delta, rest = (jax.tree.unflatten(jax.tree.structure(parts[p]), arrays[p].values()) for p in parts)
            return rest._replace(delta=delta)
    raise ValueError(f"{_folder(workdir)}: no checkpoint is readable; start again in a new workdir")


@brief
def load(workdir: str | Path, *, step: int | None = None) -> Run:
    """A run from its workdir, without its base: the newest good checkpoint, or that of `step`.

    An example is in `training.train`.
    """
    file = Path(workdir).expanduser() / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: is {workdir} the workdir of a run?")
    config = read_json(file, strict=False)
    for good_step, meta in _good_steps(workdir, step):
        table = meta["arrays"]["delta"]
        wanted = {n: np.empty(shape, jnp.dtype(dtype)) for n, (shape, dtype, _) in table.items()}
        arrays = _read(workdir, good_step, meta, {"delta": wanted})
        if arrays is not None:
            method = method_of(_folder(workdir) / str(good_step), meta["spec"])
            return Run(method, nested(arrays["delta"]), good_step, config)
    raise ValueError(f"{_folder(workdir)}: no checkpoint is readable{'' if step is None else f' at step {step}'}")


def meta_of(workdir: str | Path) -> dict[str, Any]:
    """The metadata of the newest good checkpoint: "step", "spec" of the transform, "base" for `check_base`, ...

    An example is in `save`.
    """
    for _, meta in _good_steps(workdir):
        return meta
    raise ValueError(f"{_folder(workdir)}: no checkpoint is readable")


def has_data(workdir: str | Path) -> bool:
    """Whether the newest good checkpoint has digests of its data; for one process. An example is in `save`."""
    folders = (_folder(workdir) / str(step) for step in sorted(_steps(workdir))[::-1])
    return bool(next((meta for meta in map(_meta, folders) if meta), {}).get("data"))


def latest_step(workdir: str | Path) -> int | None:
    """The step of the newest checkpoint, unread; None where there is none.

    >>> latest_step("no/such/workdir") is None
    True
    """
    return max(_steps(workdir), default=None)


def _folder(workdir: str | Path) -> Path:
    return Path(workdir).expanduser().absolute() / "checkpoints"


def _steps(workdir: str | Path) -> list[int]:
    return [int(path.name) for path in _folder(workdir).glob("*") if path.name.isdecimal()]


def _good_steps(workdir: str | Path, step: int | None = None) -> Iterator[tuple[int, dict]]:
    """`(step, meta)` of the checkpoints whose metadata are good, newest first; the same on all processes."""
    folder = _folder(workdir)
    steps = processes.on_primary(lambda: sorted(_steps(workdir), reverse=True))
    if not steps or step not in (None, *steps):
        there = f" at step {step}; there are steps {steps}" if steps else f": is {workdir} the workdir of a run?"
        raise FileNotFoundError(f"{folder}: no checkpoint{there}")
    for candidate in steps if step is None else [step]:
        meta = processes.on_primary(functools.partial(_meta, folder / str(candidate)))
        if meta is not None:
            yield candidate, meta


def _meta(folder: Path) -> dict | None:
    """The metadata of a checkpoint, or None (and a warning) where they are damaged."""
    try:
        meta = read_json(folder / "meta" / "metadata", strict=False, largest=16 * LARGEST)
        if meta.pop("digest", "") == digest(json.dumps(meta)):
            return meta
        raise ValueError("its meta differs from its digest")
    except (ValueError, TypeError, OSError) as error:
        _warn(folder, error)
        return None


def _read(workdir: str | Path, step: int, meta: dict, wanted: dict[str, dict[str, Any]]) -> Any:
    """`{part: {name: array}}` as wanted, or None (and a warning) where one process finds the checkpoint damaged."""
    folder, read, error = _folder(workdir) / str(step), {}, None
    for part, arrays in wanted.items():
        try:
            if not (folder / part).is_dir():
                raise FileNotFoundError("the folder is missing")
            # no Checkpointer: after an error here it would let the other processes wait
            read[part] = ocp.StandardCheckpointHandler().restore(folder / part, args=ocp.args.StandardRestore(arrays))
        except Exception as caught:  # whatever orbax and tensorstore raise on damaged files
            error = error or ValueError(f"its {part}: {caught}")
    if processes.everywhere(error is None):
        read = {part: {name: jnp.asarray(read[part][name]) for name in arrays} for part, arrays in wanted.items()}
        bad = [f"{part}/{n}" for part in read for n in _differing(read[part], meta["arrays"][part])]
        if not bad:
            return read
        error = ValueError(f"{len(bad)} arrays differ from their checksums, {bad[0]} first")
    _warn(folder, error or ValueError("another process cannot read its part"))
    return None


def _differing(arrays: Mapping[str, jax.Array], table: Mapping[str, list]) -> list[str]:
    """The names of the arrays that are not what was saved."""
    if other := [n for n, x in arrays.items() if [list(x.shape), str(x.dtype)] != table[n][:2]]:
        return other
    if any(len(stored) == 32 for _, _, stored in table.values()):  # written before 2026-11-29: digests of the bytes
        sums = {n: digest(processes.on_host(x)) for n, x in arrays.items()}
    else:
        sums = checksums(arrays)
    return [n for n, (_, _, stored) in table.items() if sums[n] != stored]


def _warn(folder: Path, error: Exception) -> None:
    logging.warning("%s is damaged (%s): the checkpoint before it is used", folder, _first_line(error))


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-90:]}"  # which file, and why


def _wanted(like: Any, table: Mapping[str, list], where: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What to read, by name, in the order, dtypes and shardings of `like`, where the checkpoint has it."""
    leaves = named(like)
    if leaves.keys() != table.keys():
        lacks, excess = sorted(leaves.keys() - table.keys())[:5], sorted(table.keys() - leaves.keys())[:5]
        raise ValueError(
            f"{where}: the checkpoint lacks {lacks} and has in excess {excess}: another method or optimizer"
        )
    wanted = {}
    for name, leaf in leaves.items():
        shape, dtype, _ = table[name]
        if (tuple(shape), dtype) != (leaf.shape, str(leaf.dtype)):
            here = f"{leaf.dtype}{list(leaf.shape)}"
            raise ValueError(f"{where}: {name} is {dtype}{shape} in the checkpoint, {here} in this run")
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return wanted
