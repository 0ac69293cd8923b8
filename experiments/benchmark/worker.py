"""One side of a comparison, in a process of its own.

    python -m experiments.benchmark.worker MODULE:FUNCTION WORK

The function of experiments.benchmark.MODULE makes from the work (a JSON object) a dict of parts. For each name of a
part on stdin the part runs to its end (of a `steady` work as `timed` says), and a JSON object goes to stdout: the
seconds it took (or says itself that it took), and the most memory that the process had until then. So no side shares
threads, memory or caches with another.
"""

import importlib
import json
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    module, function = sys.argv[1].split(":")
    work = json.loads(sys.argv[2])
    try:
        parts = getattr(importlib.import_module(f"experiments.benchmark.{module}"), function)(work)
    except ModuleNotFoundError as error:
        return answer(missing=error.name)
    answer(device=device())
    for line in sys.stdin:
        part = line.strip()
        try:
            seconds = timed(parts[part], steady=bool(work.get("steady")) and part not in ("floor", "loss"))
        except Exception as error:
            traceback.print_exc()
            return answer(failed=f"{type(error).__name__}: {str(error)[:200]}")
        answer(seconds=seconds, peak=peak())


def timed(part: Callable[[], float | None], steady: bool) -> float:
    """Seconds of a part. Steady: the mean of those of a second and a half, behind one that does not count: a step
    follows on another one, not on the rest while the other sides worked."""
    if steady:
        part()
    begin, count = time.perf_counter(), 0
    while True:
        seconds, count = part(), count + 1
        taken = time.perf_counter() - begin
        if not steady or taken > 1.5:
            return taken / count if seconds is None else seconds


def peak() -> int:
    """The most bytes so far: of the accelerator's allocator where there is one, else of this process or one it ran."""
    for name in ("jax", "torch"):
        on_device = _ON_DEVICE[name](sys.modules[name]) if name in sys.modules else None
        if on_device:
            return on_device
    status = Path("/proc/self/status")  # what getrusage says is at least what the starting process had
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    of_process = int(kilobytes[1]) if kilobytes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * max(of_process, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def device() -> str:
    """Where the side computes."""
    if "jax" in sys.modules:
        return "cpu" if sys.modules["jax"].default_backend() == "cpu" else "gpu"
    return "gpu" if "torch" in sys.modules and sys.modules["torch"].cuda.is_available() else "cpu"


_ON_DEVICE = {
    "jax": lambda jax: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    "torch": lambda torch: torch.cuda.is_available() and torch.cuda.max_memory_allocated(),
}


if __name__ == "__main__":
    main()
