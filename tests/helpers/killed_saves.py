"""Kills a process at each operation on files of a saving path: `python -m tests.helpers.killed_saves FOLDER PATH`.

FOLDER is empty, or holds the runs that an earlier call made. Every save is a forked process that ends by SIGKILL. This
one starts no backend of JAX, so that the forked ones can.
"""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.faults import Disk, failing, kill
from tests.helpers.saving_paths import NEW, OLD, PATHS, make_runs, paths_of_runs


def forked(function: Callable[..., Any], *args: Any) -> int:
    """The exit status of a process that calls it."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path, name: str) -> None:
    if name not in PATHS and not (root / "run_2").is_dir():
        assert forked(make_runs, root) == 0
    path = (PATHS | paths_of_runs(root))[name]
    folders, old = root / name, root / name / "old"
    old.mkdir(parents=True)
    assert forked(path.old, old) == 0

    def killed(folder: Path, n: int) -> None:
        with failing(Disk(n, kill)):
            path.new(folder)

    def check() -> None:
        seen = [path.load(folders / str(i)) for i in range(1, n + 1)]
        assert seen[-1] == NEW and {*seen} == {OLD, NEW}, seen
        print(f"{name}: killed at {n - 1} operations; the old files {seen.count(OLD)} times, else the new ones")

    status, n = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        n += 1
        shutil.copytree(old, folders / str(n))
        status = forked(killed, folders / str(n), n)
    assert status == 0, f"the save at {n}"
    assert forked(check) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
