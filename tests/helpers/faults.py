"""File operations that fail: the n-th of all that a saving path does, on a full disk or by the end of the process."""

import builtins
import contextlib
import errno
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from lora_jax.interop.hf import models

OPERATIONS = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "chmod", "fsync", "open")


class Killed(BaseException):
    """The end of the process, as far as its files go: no later operation happens either."""


class Disk:
    """Counts the operations on files; the n-th one fails, and so do all later ones if `dead` ends the process."""

    def __init__(self, n: int, end: Callable[[], Any] | None = None) -> None:
        self.n, self.end, self.count, self.dead = n, end, 0, False

    def step(self, half: Callable[[], Any] = lambda: None) -> None:
        """One operation; where it is the one that fails, `half` of it is done."""
        if self.dead:
            raise Killed
        self.count += 1
        if self.count != self.n:
            return
        half()
        if self.end is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.dead = True
        self.end()
        raise Killed

    def operation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return function(*args, **kwargs)

        return counted

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """`open`, whose file to write to does half of the write that fails."""
        if not {*mode} & {*"wax+"}:
            return _OPEN(file, mode, *args, **kwargs)
        self.step()
        return _Written(_OPEN(file, mode, *args, **kwargs), self)

    def save_file(self, tensors: Any, file: Any, metadata: Any = None) -> None:
        """safetensors' own, which writes by itself."""
        content = safetensors.numpy.save(tensors, metadata)
        self.step(lambda: Path(file).write_bytes(content[: len(content) // 2]))
        Path(file).write_bytes(content)


_OPEN = io.open


class _Written:
    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, content: Any) -> int:
        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._disk.step(half)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


@contextlib.contextmanager
def failing(disk: Disk) -> Iterator[None]:
    """Inside, every operation on files counts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, disk.operation(getattr(os, name)))
        patch.setattr(io, "open", disk.open)
        patch.setattr(builtins, "open", disk.open)
        patch.setattr(models, "save_file", disk.save_file)
        yield


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def every_failure(
    old: Path, save: Callable[[Path], Any], *, killed: bool
) -> Iterator[tuple[int, Path, BaseException | None]]:
    """For n = 1, 2, ...: a copy of a folder in which `save` failed at its n-th operation, and the error: None where the
    failure did no harm, as in the last one, which has fewer operations."""
    for n in range(1, 200):
        folder = old.parent / str(n)
        shutil.copytree(old, folder)
        disk = Disk(n, (lambda: None) if killed else None)
        error: BaseException | None = None
        try:
            with failing(disk):
                save(folder)
        except (OSError, Killed) as caught:
            error = caught
        yield n, folder, error
        if disk.count < n:
            return
    raise AssertionError("there is no end of operations")
