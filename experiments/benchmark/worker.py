"""One side of a comparison, in a process of its own.

    python -m experiments.benchmark.worker MODULE:FUNCTION WORK

The function of experiments.benchmark.MODULE makes from the work (a JSON object) a dict of parts. For each name of a
part on stdin the part runs once, to its end, and a JSON object goes to stdout: the seconds it took (or says itself that
it took), and the most memory that the process had until then. So no side shares threads, memory or caches with another.
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers, flush=True)

    module, function = sys.argv[1].split(":")
    work = json.loads(sys.argv[2])
    try:
        parts = getattr(importlib.import_module(f"experiments.benchmark.{module}"), function)(work)
    except ModuleNotFoundError as error:
        return answer(missing=error.name)
    answer()
    for line in sys.stdin:
        try:
            if (
                work.get("steady") and line.strip() != "floor"
            ):  # a step of many: behind another one, not after a rest while other sides worked
                parts[line.strip()]()
            begin = time.perf_counter()
            said = parts[line.strip()]()
        except Exception as error:
            traceback.print_exc()
            return answer(failed=f"{type(error).__name__}: {str(error)[:200]}")
        taken = time.perf_counter() - begin
        answer(seconds=taken if said is None else said, peak=peak())


def peak() -> int:
    """The most bytes so far: of the accelerator's allocator where there is one, else of the process."""
    for name in ("jax", "torch"):
        found = _ON_DEVICE[name](sys.modules[name]) if name in sys.modules else None
        if found:
            return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_ON_DEVICE = {
    "jax": lambda jax: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    "torch": lambda torch: torch.cuda.is_available() and torch.cuda.max_memory_allocated(),
}


if __name__ == "__main__":
    main()
