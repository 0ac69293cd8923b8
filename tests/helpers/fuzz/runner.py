"""Reads spoiled files, each within 10 s and 1 GB: what comes of it is right, or an error that names a file."""

import contextlib
import multiprocessing
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.fuzz.mutations import Files, spoil

SECONDS, BYTES = 10, 1 << 30


class Part(NamedTuple):
    """Files of one kind."""

    files: Files  # that are right
    load: Callable[[Path], Any]  # reads a folder of them
    check: Callable[[Path, Any], None]  # AssertionError unless what was read is what the folder's files say
    spoil: Callable[[random.Random, Files], Files] = spoil


class Report(NamedTuple):
    """What came of a number of mutations."""

    right: int = 0
    refused: int = 0
    faults: tuple[str, ...] = ()
    seconds: float = 0.0


class TooLong(BaseException):
    """No error that a reader catches."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def end(*_: object) -> None:
        raise TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def with_memory(most: int) -> Iterator[None]:
    """The process may take so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def outcome(part: Part, seed: int) -> str:
    """ "right", "refused", or what is wrong."""
    spoiled = part.spoil(random.Random(seed), part.files)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        write(Path(made), spoiled)
        try:
            with within(SECONDS):
                value = part.load(Path(made))
        except (ValueError, OSError) as error:
            if made not in str(error):
                return f"an error that names no file: {type(error).__name__}: {str(error)[:300]}"
            return "refused"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a library in Rust too
            return f"{type(error).__name__}: {str(error)[:300]}"
        try:
            part.check(Path(made), value)
        except Exception as error:
            return f"wrong: {type(error).__name__}: {str(error)[:600]}"
    return "right"


def fuzz(part: Part, seeds: range) -> Report:
    """In this process."""
    begin, counts, faults = time.perf_counter(), {"right": 0, "refused": 0}, []
    with with_memory(BYTES):
        for seed in seeds:
            result = outcome(part, seed)
            if result in counts:
                counts[result] += 1
            else:
                faults.append(f"seed {seed}: {result}")
    return Report(counts["right"], counts["refused"], tuple(faults), time.perf_counter() - begin)


def fuzz_apart(make: Callable[[], Part], seeds: range) -> Report:
    """In processes of their own, which a fault may end: then it is the seeds that did."""
    reports, step = [], 500
    for start in range(seeds.start, seeds.stop, step):
        some = range(start, min(start + step, seeds.stop))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                reports.append(pool.submit(_made_and_fuzzed, make, some).result())
            except Exception as error:
                reports.append(Report(faults=(f"seeds {some}: the process ended: {error}",)))
    faults = tuple(fault for report in reports for fault in report.faults)
    sums = (sum(getattr(report, name) for report in reports) for name in ("right", "refused"))
    return Report(*sums, faults, sum(report.seconds for report in reports))


def _made_and_fuzzed(make: Callable[[], Part], seeds: range) -> Report:
    return fuzz(make(), seeds)
