"""Batches onto the mesh: each process makes, and puts there, the rows that its own devices hold."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.data.batches import Batch, Schedule
from lora_jax.distributed import processes
from lora_jax.distributed.sharding import batch_sharding

Put = Callable[[Batch], dict[str, jax.Array]]


def gathered(output: Any, batch: Batch, placed: dict[str, jax.Array]) -> tuple[Any, dict[str, Any]]:
    """What metrics need of a batch, to be fetched: also of the rows that other processes hold."""
    if output is None or jax.process_count() == 1:
        return output, batch
    return processes.replicate((output, {name: placed[name] for name in ("labels", "weights")}))


def validation_placer(mesh: Mesh, schedule: Schedule) -> tuple[Put, Schedule]:
    """What puts a batch of validation on the mesh, (b, ...) with b over the devices; and the schedule of the rows that
    this process puts there."""
    sharding, rows = batch_sharding(mesh), schedule.batch_size
    held = processes.own_rows(sharding, (rows,))
    return lambda batch: processes.put_rows(batch, sharding, 0, rows), _of_rows(schedule, held)


def batch_placer(mesh: Mesh, schedule: Schedule, micro: int, members: int | None = None) -> tuple[Put, Schedule]:
    """What puts a batch on the mesh as `micro` batches of equal size, (k, b, ...) with b over the devices, or of
    several members (members, k, b, ...); and the schedule of the rows that this process puts there."""
    rows, devices = schedule.batch_size, mesh.shape["data"] * mesh.shape["fsdp"]
    if micro < 1 or rows % (micro * devices):
        raise ValueError(
            f"a batch of {rows} does not divide into accumulate={micro} micro-batches over "
            f"{devices} devices (data x fsdp)"
        )
    spec, each = batch_sharding(mesh).spec, rows // micro
    held = processes.own_rows(NamedSharding(mesh, P(None, *spec)), (micro, each))
    before = () if members is None else (members,)
    sharding = NamedSharding(mesh, P(*(None for _ in before), None, *spec))
    axis = len(before) + 1

    def put(batch: Batch) -> dict[str, jax.Array]:
        parts = {n: x.reshape(*before, micro, x.shape[axis - 1] // micro, *x.shape[axis:]) for n, x in batch.items()}
        return processes.put_rows(parts, sharding, axis, each)

    return put, _of_rows(schedule, held)


def _of_rows(schedule: Schedule, held: np.ndarray | None) -> Schedule:
    return schedule if held is None else dataclasses.replace(schedule, held=held)
