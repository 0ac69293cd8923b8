"""SIGINT (Ctrl-C), SIGTERM and SIGHUP end a run after the step that it is in; a second one ends the process at once.

Of several processes (`jax.distributed`) all end after the same step, whichever gets the signal: JAX's preemption
service takes SIGTERM, and the other two are handed on to it.
"""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Seconds in which signals count as one: `timeout`, a shell that ends and systemd send two where one is meant.
_TOGETHER = 0.25

# JAX's service wants numbers that grow as long as the process lives, whichever run a step is of, and from one caller
# (the manager of checkpoints does not): the stop is planned for the step after the largest last number.
_SYNC_POINTS = itertools.count(1)
_open = False  # a block of `noted` in the main thread
_handlers: dict[int, Any] = {}  # of before that block
_times: list[float] = []  # of the signals since it began
_received: list[int] = []  # those signals; of several processes what they agreed on


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """A block in which the first signal is noted, for `requested`, and the next acts as it did before the block.

    Blocks may lie in each other: the outermost one counts. What is ignored (`nohup`) stays ignored. Signals come to the
    main thread alone.
    """
    global _open
    if not _open:
        _received.clear()
    if _open or threading.current_thread() is not threading.main_thread():
        yield
        return
    _handlers.clear()
    _times.clear()
    _open = True
    try:
        for number in SIGNALS:
            before = signal.getsignal(number)
            taken_by_jax = jax.distributed.is_initialized() and number == signal.SIGTERM
            if before not in (None, signal.SIG_IGN) and not taken_by_jax:
                _handlers[number] = before
                signal.signal(number, _note)
        yield
    finally:
        _restore()
        _open = False


def requested() -> int | None:
    """The signal that was noted in the outermost block that is open, else in the last one; None without."""
    return _received[0] if _received else None


def after_step() -> bool:
    """Whether the run has to end after this step, true for all processes after the same one; called after each."""
    if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS)):
        _received.append(signal.SIGTERM)
    return bool(_received)


def check(what: str | Path) -> None:
    """An InterruptedError, "WHAT was stopped: ...", where a signal was noted."""
    if _received:
        raise InterruptedError(f"{what} was stopped: the same command resumes it")


def _note(number: int, _: FrameType | None) -> None:
    _times.append(time.monotonic())
    if _times[-1] - _times[0] > _TOGETHER:
        _restore()
        signal.raise_signal(number)
    elif jax.distributed.is_initialized():
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        _received.append(number)


def _restore() -> None:
    for number, before in _handlers.items():
        signal.signal(number, before)
