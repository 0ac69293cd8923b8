"""One process writes a workdir: an advisory lock on its file .lock, which the kernel frees when the process ends.

Of several processes of one run the first one holds it. What only reads a workdir needs no lock.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from lora_jax.checkpoints.files import fcntl
from lora_jax.distributed import processes

F = TypeVar("F", bound=Callable)

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of file systems without locks


@dataclasses.dataclass
class _Lock:
    file: int  # the open .lock: closing it frees the lock
    blocks: int = 0  # of `locked`, that are open


_HELD: dict[Path, _Lock] = {}  # by this process


@contextlib.contextmanager
def locked(*workdirs: str | Path, keep: bool = False) -> Iterator[None]:
    """A block in which this process, or the job that it is one of, alone writes the workdirs. Blocks may lie in each
    other: the outermost one frees the locks at its end, or with `keep` leaves them, unless there is an error, to the
    next block, or to the end of the process.

    Raises:
      ValueError: another process writes a workdir, or its name is not UTF-8; on all processes of a job.
    """
    if bad := [str(workdir) for workdir in workdirs if _not_utf8(workdir)]:
        raise ValueError(f"the workdir {bad[0]!r} is not UTF-8, as names in checkpoints must be: give another")
    paths = [Path(workdir).expanduser().resolve() for workdir in workdirs]
    entered: list[Path] = []
    try:
        for path in paths:
            processes.on_primary(functools.partial(_enter, path))
            entered.append(path)
        yield
    except BaseException:
        keep = False
        raise
    finally:
        for path in entered if processes.is_primary() else ():
            _leave(path, keep)


def holding(*, keep: bool = False, check: Callable[..., object] = lambda *_: None) -> Callable[[F], F]:
    """A decorator: the function, of a config, a workdir and more, runs in a block of `locked`, after `check(config,
    what is more)`: nothing is written before."""

    def of(function: F) -> F:
        @functools.wraps(function)
        def alone(config: Any, workdir: str | Path, *args: Any, **options: Any) -> Any:
            check(config, *args)
            with locked(workdir, keep=keep):
                return function(config, workdir, *args, **options)

        return cast(F, alone)

    return of


def _not_utf8(path: str | Path) -> bool:
    """Whether a path holds bytes that are no UTF-8, which Python keeps as half surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in os.path.abspath(path))


def _enter(path: Path) -> None:
    held, name = _HELD.get(path), path / ".lock"
    if held is None or not (name.exists() and os.path.samestat(os.fstat(held.file), name.stat())):
        file = _opened(path)
        if held:  # of a folder that was deleted and made again
            os.close(held.file)
        _HELD[path] = _Lock(file, held.blocks if held else 0)
    _HELD[path].blocks += 1


def _leave(path: Path, keep: bool) -> None:
    if held := _HELD.get(path):  # a forked process has none
        held.blocks -= 1
        if not held.blocks and not keep:
            del _HELD[path]
            with contextlib.suppress(OSError):
                os.ftruncate(held.file, 0)
            os.close(held.file)


def _opened(path: Path) -> int:
    """The .lock of a workdir, locked. It stays for ever: deleting it could free the lock of another process."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(file, path)
        except BaseException:
            os.close(file)
            raise
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    return file


def _take(file: int, path: Path) -> None:
    """Locks the open file, and writes into it who holds it."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no advisory locks")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        way_out = "wait for it, stop it, or give another --workdir"
        raise ValueError(f"{path} is being written by {_holder(file)}: {way_out}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn(error.strerror)
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
    with contextlib.suppress(OSError):  # of a full disk: what is written next says so
        os.ftruncate(file, 0)
        os.write(file, holder.encode())


@functools.cache
def _warn(reason: str) -> None:
    logging.warning("the workdir cannot be locked (%s): nothing keeps a second process from writing there", reason)


def _holder(file: int) -> str:
    """Who holds the lock, in words."""
    try:
        holder = json.loads(os.read(file, 4096))
        return f"process {holder['pid']} on host {holder['host']} since {holder['since']}"
    except (ValueError, TypeError, KeyError):  # it has only just taken it
        return "another process"


def _forget() -> None:
    for held in _HELD.values():
        os.close(held.file)
    _HELD.clear()


if hasattr(os, "register_at_fork"):  # a child would keep the lock of a parent that has ended
    os.register_at_fork(after_in_child=_forget)
