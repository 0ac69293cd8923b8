"""One of two processes of four devices each: trains and reports in files. Arguments: port, process, folder, cases."""

import dataclasses
import faulthandler
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import checkpoints, training
from lora_jax.data.batches import Batch, Schedule
from lora_jax.distributed import processes
from tests.helpers.mesh_runs import QUICK, prepare, schedule_of

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def watched(case: str, made: list[list[int]]) -> Schedule:
    """The schedule of a case, which notes the rows that it makes."""
    schedule = schedule_of(case, 0)

    def collate(rows: np.ndarray, length: int, count: int) -> Batch:
        made.append(rows.tolist())
        return schedule.collate(rows, length, count)

    return dataclasses.replace(schedule, collate=collate)


def without_labels(case: str) -> Schedule:
    """The schedule of a case, in whose batches no row has labels."""
    schedule = schedule_of(case, 0)

    def collate(rows: np.ndarray, length: int, count: int) -> Batch:
        batch = schedule.collate(rows, length, count)
        return batch | {"weights": batch["weights"] * 0}

    return dataclasses.replace(schedule, collate=collate)


def damage(workdir: Path) -> None:
    """One bit in the largest file of the newest checkpoint's optimizer state."""
    newest = workdir / "checkpoints" / str(checkpoints.latest_step(workdir)) / "rest"
    file = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)  # of the arrays
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def failure(act: Any) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    port, process, folder, cases = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    faulthandler.dump_traceback_later(300, exit=True)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, heartbeat_timeout_seconds=30)
    messages: list[str] = []
    logging.getLogger().addHandler(handler := logging.Handler())
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    report: dict[str, Any] = {}
    if cases:
        for case in cases:
            training.train(prepare(case, folder / case.replace("/", "_"), MESH))
        report["rows"] = made = []
        schedule = watched("gpt2/lora", made)
        training.train(prepare("gpt2/lora", folder / "tensor", {"tensor": 8}, batches=schedule))
    else:
        report = checked(folder, process, messages)
    (folder / f"found_{process}.json").write_text(json.dumps(report))


def checked(folder: Path, process: int, messages: list[str]) -> dict[str, Any]:
    """What a run, and what goes wrong, show."""
    report: dict[str, Any] = {"rows": []}
    saved = {"save_every": 2}
    first = prepare(QUICK, folder / "run", MESH, changes=saved, batches=watched(QUICK, report["rows"]))
    training.train(first)
    compiled = {"step": first.step, "validate": first.validate}

    job = prepare(QUICK, folder / "no_labels", MESH, batches=without_labels(QUICK))._replace(**compiled)
    report["no_labels"] = failure(lambda: training.train(job))
    report["left_out"] = failure(lambda: prepare(QUICK, folder / "left_out", {"data": 4}))
    report["refused"] = failure(lambda: prepare(QUICK, folder / "run", MESH, changes=saved | {"seed": 4}))

    # of one process (the test's own), gone on with
    one = prepare(QUICK, folder / "of_one", MESH, changes=saved)._replace(**compiled)
    report["resumed"] = one.start
    training.train(one)
    processes.on_primary(lambda: damage(folder / "of_one"))
    messages.clear()
    report["after_damage"] = prepare(QUICK, folder / "of_one", MESH, changes=saved).start
    report["said"] = list(messages)

    long_job = prepare(QUICK, folder / "told", MESH)._replace(total=1000, **compiled)
    (folder / f"ready_{process}").touch()  # the test sends SIGTERM to one of the processes
    result = training.train(long_job)
    return report | {"told": [result.step, result.finished]}


if __name__ == "__main__":
    main()
