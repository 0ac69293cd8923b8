"""From the metrics that steps sum on the device to the entries of the log."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from lora_jax.training.logging import Log
from lora_jax.training.step import METRICS, State


def fetch(state: State) -> dict[str, float]:
    """The metrics in one transfer. This waits for the device."""
    return dict(zip(METRICS, jax.device_get(state.metrics).tolist(), strict=True))


def check(metrics: dict[str, float], workdir: Path) -> None:
    """A ValueError where some step's loss or gradient was not finite; what is saved stays."""
    if metrics["bad_step"]:
        raise ValueError(
            f"step {metrics['bad_step']:.0f}: the loss or its gradient is not finite; the "
            f"checkpoints from before stay in {workdir}"
        )


class Meter:
    """Writes entries of the log and keeps the time."""

    def __init__(self, log: Log, bar: tqdm, epoch_steps: int, state: State) -> None:
        self._log, self._bar, self._epoch_steps = log, bar, epoch_steps
        self._begin = self._since = time.perf_counter()
        self._before = fetch(state)["real_tokens"]  # of this interval, computed before resuming
        self._tokens = log.last("tokens")

    def write(self, done: int, state: State) -> State:
        """Logs what was summed since the last time; returns the state with the sums at zero."""
        metrics = fetch(state)
        check(metrics, self._log.workdir)
        now = time.perf_counter()
        speed = (metrics["real_tokens"] - self._before) / (now - self._since)
        self._tokens += int(metrics["real_tokens"])
        loss = metrics["loss"] / metrics["labels"]
        self._log.write(
            done,
            epoch=round(done / self._epoch_steps, 6),
            loss=loss,
            learning_rate=metrics["learning_rate"],
            gradient_norm=metrics["gradient_norm"],
            tokens=self._tokens,
            real_share=metrics["real_tokens"] / metrics["tokens"],
            tokens_per_second=speed,
            seconds=now - self._begin,
        )
        self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s")
        self._before, self._since = 0.0, now
        zeros = np.zeros(len(METRICS), np.float32)
        return state._replace(metrics=jax.device_put(zeros, state.metrics.sharding))

    @contextlib.contextmanager
    def paused(self, state: State) -> Iterator[None]:
        """What happens inside does not count for the speed."""
        jax.block_until_ready(state.metrics)
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin
