"""A side's process, seen from the benchmark."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any


class Missing(Exception):
    """The side cannot run here, and why."""


class Side:
    """A worker that does its parts when told to."""

    def __init__(self, target: str, work: dict[str, Any], env: dict[str, str] | None = None):
        begin = time.perf_counter()
        settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # all sides are there at once
        if not target.startswith("ours"):
            settings["GLIBC_TUNABLES"] = ""  # peers run as they come: without experiments/__init__.py's huge pages
        command = [sys.executable, "-m", "experiments.benchmark.worker", target, json.dumps(work)]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | settings | (env or {}),
        )
        self.peak = 0
        self.first: dict[str, float] = {}
        reply = self._answer()
        if "missing" in reply:
            raise self._gone(f"no module {reply['missing']}")
        self.device = reply["device"]
        self.first["ready"] = time.perf_counter() - begin

    def run(self, part: str) -> float:
        """Does a part once: its seconds."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.process.stdin.write(part + "\n")
            self.process.stdin.flush()
        reply = self._answer()
        if "failed" in reply:
            raise self._gone(reply["failed"])
        if part != "floor" and not (self.first.get("floor")):
            self.peak = reply["peak"]  # until the bare products want memory of their own
        self.first.setdefault(part, reply["seconds"])
        return reply["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise self._gone("it ended: " + (self.errors.read().strip().splitlines() or [""])[-1][:300])
        return json.loads(line)

    def _gone(self, why: str) -> Missing:
        self.close()
        return Missing(why)

    def close(self) -> None:
        """Ends the process; twice does no harm."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
