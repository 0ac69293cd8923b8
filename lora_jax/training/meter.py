"""From the metrics that steps sum on the device to the entries of the log."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from lora_jax.data.batches import Batch
from lora_jax.distributed import processes
from lora_jax.training.logging import Log
from lora_jax.training.step import METRICS, State


def fetch(state: State) -> list[dict[str, float]]:
    """The metrics of a run, or of each member of a sweep, in one transfer. This waits for the device."""
    rows = np.atleast_2d(jax.device_get(state.metrics)).tolist()
    return [dict(zip(METRICS, row, strict=True)) for row in rows]


class LabelCount:
    """Finds a batch without labels.

    Each of several processes has only its rows of a batch. Asking the others at every step would mean waiting for them:
    they are asked before something is written, so that nothing is written of such a batch.
    """

    def __init__(self, workdir: Path, epoch_steps: int, start: int) -> None:
        self._workdir, self._epoch_steps, self._checked = workdir, epoch_steps, start
        self._has_labels: list[bool] = []

    def note(self, batch: Batch) -> None:
        """Of every step's batch, in order."""
        self._has_labels.append(bool(batch["weights"].any()))
        if jax.process_count() == 1:
            self.check()

    def check(self) -> None:
        """A ValueError on all processes that names the first batch without labels since the last check."""
        has_labels = processes.anywhere(self._has_labels)
        if not all(has_labels):
            step = self._checked + has_labels.index(False)
            epoch, index = divmod(step, self._epoch_steps)
            raise ValueError(
                f"step {step + 1}: batch {index} of epoch {epoch} has no labels; the checkpoints "
                f"from before stay in {self._workdir}"
            )
        self._checked += len(self._has_labels)
        self._has_labels = []


class Meter:
    """Writes entries of the log, or of the logs of a sweep's members, and keeps the time.

    Attributes:
      bad: the members, by number, whose loss or gradient was not finite, and the step; nothing more is logged of them.
    """

    def __init__(self, logs: Sequence[Log], bar: tqdm, epoch_steps: int, state: State) -> None:
        self._logs, self._bar, self._epoch_steps = logs, bar, epoch_steps
        self._begin = self._since = time.perf_counter()
        self._before = sum(metrics["real_tokens"] for metrics in fetch(state))  # of this interval, before resuming
        self._tokens = [log.last("tokens") for log in logs]
        self.bad: dict[int, int] = {}

    def write(self, done: int, state: State) -> State:
        """Logs what was summed since the last time; returns the state with the sums at zero."""
        fetched = fetch(state)
        now = time.perf_counter()
        speed = (sum(metrics["real_tokens"] for metrics in fetched) - self._before) / (now - self._since)
        losses = []
        for number, (log, metrics) in enumerate(zip(self._logs, fetched, strict=True)):
            if metrics["bad_step"]:
                self.bad.setdefault(number, int(metrics["bad_step"]))
                continue
            self._tokens[number] += int(metrics["real_tokens"])
            losses.append(metrics["loss"] / metrics["labels"])
            log.write(
                done,
                epoch=round(done / self._epoch_steps, 6),
                loss=losses[-1],
                learning_rate=metrics["learning_rate"],
                gradient_norm=metrics["gradient_norm"],
                tokens=self._tokens[number],
                real_share=metrics["real_tokens"] / metrics["tokens"],
                tokens_per_second=speed,
                seconds=now - self._begin,
            )
        low, high = min(losses, default=math.nan), max(losses, default=math.nan)
        shown = f"loss {low:.4f}" if len(fetched) == 1 else f"losses {low:.4f} to {high:.4f}"
        self._bar.set_postfix_str(f"{shown}, {speed:,.0f} tokens/s")
        self._before, self._since = 0.0, now
        zeros = np.zeros(state.metrics.shape, np.float32)
        for number, step in self.bad.items():
            np.atleast_2d(zeros)[number, METRICS.index("bad_step")] = step
        return state._replace(metrics=processes.place(zeros, state.metrics.sharding))

    def say(self, text: str) -> None:
        """A line above the bar."""
        if processes.is_primary():
            self._bar.write(text)

    @contextlib.contextmanager
    def paused(self, state: State) -> Iterator[None]:
        """What happens inside does not count for the speed."""
        jax.block_until_ready(state.metrics)
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin
