"""Workdirs that another process holds."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def held_elsewhere(workdir: Path, holder: str = "") -> Iterator[None]:
    """As if another process held the workdir: a lock belongs to an opened file, not to a process."""
    workdir.mkdir(exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        file.write(holder)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_free(workdir: Path) -> bool:
    try:
        with (workdir / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
