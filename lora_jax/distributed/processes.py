"""Several processes as one run (`jax.distributed`): what each holds, what the first does for all, what all agree on.

All processes call these functions in the same order; with one process each does the same without communication.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from lora_jax.distributed.sharding import batch_sharding

T = TypeVar("T")
# What one process raises, all raise; the first of these that it is.
_ERRORS = (FileNotFoundError, OSError, TypeError, ValueError)
_PIECE = 1024  # sizes are rounded up to it: each size of what is sent is a compiled program


def connect(
    coordinator: str | None, processes: int | None, process: int | None, *, auto: bool = False, heartbeat: int = 10
) -> None:
    """Makes this process one of several; before anything uses a device. Nothing happens where nothing is given.

    Args:
      coordinator: "HOST:PORT" of process 0.
      processes, process: how many there are, and which of them this one is, from 0.
      auto: the three are found (Slurm, Open MPI, TPU pods).
      heartbeat: seconds of silence after which a process counts as dead.

    Raises:
      ValueError: some of the three are missing or make no sense, or the processes do not find each other.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if auto and len(missing) < len(given):
        raise ValueError("--distributed=auto finds coordinator, processes and process itself: leave them out")
    if not auto and len(missing) == len(given):
        return
    if not auto and missing:
        needed = "--coordinator=HOST:PORT, --processes=N and --process=I"
        raise ValueError(f"several processes need {needed}: {missing[0]} is missing")
    if process is not None and processes is not None and process >= processes:
        raise ValueError(f"--process={process} of --processes={processes}: they are counted from 0")
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=heartbeat)
    except (ValueError, RuntimeError) as error:
        hint = " Say it with --coordinator, --processes and --process" if auto else ""
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"the processes do not find each other: {reason}.{hint}") from error


def is_primary() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def on_primary(function: Callable[[], T]) -> T:
    """The function's result on the first process, JSON, returned on all of them; none returns before it has ended.

    A ValueError, TypeError or OSError of the function is raised, with its message, on every process.
    """
    if jax.process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    if is_primary():
        try:
            answer = {"value": function()}
        except _ERRORS as error:
            kind = next(kind for kind in _ERRORS if isinstance(error, kind))
            answer = {"error": kind.__name__, "message": str(error)}
    content = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(_padded(size), np.uint8)
    padded[: len(content)] = content if is_primary() else 0
    answer = json.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())
    if "error" in answer:
        raise next(kind for kind in _ERRORS if kind.__name__ == answer["error"])(answer["message"])
    return answer["value"]


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether any process sets it; every process gives equally many."""
    if jax.process_count() == 1:
        return list(flags)
    padded = np.zeros(_padded(len(flags)), np.uint8)
    padded[: len(flags)] = flags
    return multihost_utils.process_allgather(padded).any(0)[: len(flags)].tolist()


def everywhere(flag: bool) -> bool:
    """Whether the flag is set on all processes."""
    return not anywhere([not flag])[0]


def _padded(size: int) -> int:
    return -(-size // _PIECE) * _PIECE


def check_mesh(mesh: Mesh) -> None:
    """A ValueError where a process has no device on the mesh: all of them take part in every step."""
    if left_out := set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}:
        problem = f"the mesh {dict(mesh.shape)} leaves out the devices of process {min(left_out)}"
        devices = f"all {jax.device_count()} devices of the {jax.process_count()} processes"
        raise ValueError(f"{problem}: spread data, fsdp and tensor over {devices}")


def place(tree: Any, shardings: Any) -> Any:
    """`jax.device_put`, to one sharding or one for each leaf, of arrays that every process has in full, or that are on
    the mesh already. Each process puts there what its devices hold."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, sharding: Sharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def own_rows(sharding: Sharding, shape: tuple[int, ...]) -> np.ndarray | None:
    """The indices, (rows,) ascending, of the rows of an array that this process's devices hold.

    The rows lie in order over the array's first axes, which have this shape. None where there is one process, which
    holds all. Two processes may hold the same row.
    """
    if jax.process_count() == 1:
        return None
    held = np.zeros(shape, bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        held[index] = True
    return np.flatnonzero(held)


def batch_placer(
    mesh: Mesh, size: int, micro: int | None = None, members: int | None = None
) -> tuple[Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]], np.ndarray | None]:
    """A function that puts a batch of `size` rows on the mesh, and `own_rows`, those that this process makes.

    Arrays there are (b, ...); with `micro` (k, b, ...), k micro-batches of equal size; with `members` (members, k, b,
    ...), made of one batch of each member.
    """
    devices, spec = mesh.shape["data"] * mesh.shape["fsdp"], batch_sharding(mesh).spec
    if micro is not None and (micro < 1 or size % (micro * devices)):
        parts = f"accumulate={micro} micro-batches over {devices} devices (data x fsdp)"
        raise ValueError(f"a batch of {size} does not divide into {parts}")
    of_member, rows = (() if micro is None else (micro,)), size // (micro or 1)
    lead = of_member if members is None else (members, *of_member)
    axis = len(lead) - len(of_member)  # of the rows in a batch
    by_rows, sharding = (jax.NamedSharding(mesh, jax.P(*(None for _ in x), *spec)) for x in (of_member, lead))

    def put(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        parts = {n: x.reshape(*lead, x.shape[axis] // (micro or 1), *x.shape[axis + 1 :]) for n, x in batch.items()}
        if jax.process_count() == 1:
            return jax.device_put(parts, sharding)
        shapes = {name: (*lead, rows, *x.shape[len(lead) + 1 :]) for name, x in parts.items()}
        return {n: jax.make_array_from_process_local_data(sharding, x, shapes[n]) for n, x in parts.items()}

    return put, own_rows(by_rows, (*of_member, rows))


def replicate(tree: Any) -> Any:
    """Arrays of one mesh, replicated on every device of it, so that each process can fetch them."""
    sharding = jax.tree.leaves(tree)[0].sharding
    replicated = jax.jit(_same, out_shardings=jax.NamedSharding(sharding.mesh, jax.P()))(tree)
    # CPU devices of several processes may deadlock where small programs that wait for each other run at once
    return jax.block_until_ready(replicated) if jax.default_backend() == "cpu" else replicated


def _same(tree: Any) -> Any:
    return tree


def on_host(leaf: Any) -> np.ndarray:
    """All of an array in this process's memory, wherever it lies; all processes call it."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    # An array keeps what it once gave the host, for as long as it lives: this one of the same buffers soon ends.
    parts = [shard.data for shard in leaf.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts))
