"""What a run writes while it goes: metrics.jsonl, TensorBoard events, loss.png."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from lora_jax.checkpoints import write_atomically
from lora_jax.core.extras import extra
from lora_jax.data.batches import Batch
from lora_jax.data.json_files import parse_json
from lora_jax.distributed import processes
from lora_jax.training.step import METRICS, State

# What differs between two runs of one config: everything else in metrics.jsonl is equal.
TIMES = ("seconds", "tokens_per_second")


def read_metrics(workdir: str | Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl up to a step, none where there is no such file; a half-written last line is left
    out. A ValueError where a line is no JSON object of numbers, "step" among them.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     _ = Path(workdir, "metrics.jsonl").write_bytes(b'{"step": 100, "loss": 2.5}' + os.linesep.encode())
    ...     read_metrics(workdir)
    [{'step': 100, 'loss': 2.5}]
    """
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(_entry(line))
        except ValueError as error:
            problem = f"{path}:{number}: no entry of metrics ({error}): {line[:80]!r}"
            raise ValueError(f"{problem}; mend the line or delete it") from error
    return [entry for entry in entries if entry["step"] <= last_step]


def _entry(line: bytes) -> dict[str, Any]:
    entry = parse_json(line, strict=False)
    if not isinstance(entry, dict) or "step" not in entry:
        raise ValueError("it has no step")
    if wrong := [name for name, value in entry.items() if not isinstance(value, int | float)]:
        raise ValueError(f"its {wrong[0]} is no number")
    return entry


class Logger(Protocol):
    """Where the metrics of a run go: W&B, MLflow, a file. A resumed run writes again what came after its checkpoint.

    >>> from lora_jax import training
    >>> class Printer:
    ...     def write(self, step, entries):
    ...         print(f"step {step}: {entries}")
    ...     def close(self):
    ...         pass
    >>> training.Prefixed(Printer(), "seed_0/").write(100, {"loss": 2.5})
    step 100: {'seed_0/loss': 2.5}
    """

    def write(self, step: int, entries: Mapping[str, float]) -> None:
        """Entries of one step: of the training loss, or of a validation."""

    def close(self) -> None:
        """The end of the run."""


class JsonLines:
    """Writes metrics.jsonl of a workdir, after dropping the entries that came after `step`.

    >>> import tempfile
    >>> from lora_jax import training
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     lines = training.JsonLines(workdir, step=0)
    ...     lines.write(100, {"loss": 2.5})
    ...     lines.close()
    ...     training.read_metrics(workdir)
    [{'step': 100, 'loss': 2.5}]
    """

    def __init__(self, workdir: str | Path, step: int) -> None:
        path = Path(workdir) / "metrics.jsonl"
        lines = [json.dumps(entry) + "\n" for entry in read_metrics(workdir, step)]
        write_atomically(path, "".join(lines).encode())
        self._file = path.open("a")

    def write(self, step: int, entries: Mapping[str, float]) -> None:
        """One line, on disk before this returns: what a checkpoint of this step counts on."""
        self._file.write(json.dumps({"step": step, **entries}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes TensorBoard's events into a workdir; earlier ones after `step` are purged. An example is in `Log`."""

    def __init__(self, workdir: str | Path, step: int) -> None:
        with extra("train"):
            from tensorboardX import SummaryWriter  # slow to import: takes torch along

        self._board = SummaryWriter(str(workdir), purge_step=step + 1)

    def write(self, step: int, entries: Mapping[str, float]) -> None:
        for name, value in entries.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class Prefixed(NamedTuple):
    """A logger for one of several runs, the names of whose entries begin with the prefix; it closes nothing.

    An example is in `Logger`.
    """

    logger: Logger
    prefix: str

    def write(self, step: int, entries: Mapping[str, float]) -> None:
        self.logger.write(step, {self.prefix + name: value for name, value in entries.items()})

    def close(self) -> None:
        pass


class Log:
    """The metrics of a workdir: on resuming from `step`, what came after it is dropped first. Of several processes the
    first one writes; each knows all entries. The `loggers` get every entry as well; the caller closes them.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from lora_jax import training
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     with training.Log(workdir, step=0) as log:
    ...         log.write(100, loss=2.5)
    ...         log.write(200, loss=2.25, validation_loss=2.5)
    ...     training.plot_loss(workdir)
    ...     print(log.last("loss"), training.read_metrics(workdir) == log.entries, Path(workdir, "loss.png").exists())
    2.25 True True
    """

    def __init__(self, workdir: str | Path, step: int, loggers: Sequence[Logger] = ()) -> None:
        self.entries = read_metrics(workdir, step)
        writes = processes.is_primary()
        self._files: list[Logger] = [JsonLines(workdir, step), TensorBoard(workdir, step)] if writes else []
        self._loggers = [*self._files, *loggers] if writes else []

    def write(self, step: int, **values: float) -> None:
        """One entry, on disk before this returns."""
        self.entries.append({"step": step} | values)
        for logger in self._loggers:
            logger.write(step, values)

    def last(self, name: str, default: float = 0) -> Any:
        """The newest value of that name."""
        return next((entry[name] for entry in reversed(self.entries) if name in entry), default)

    def highest(self, name: str) -> float:
        """The highest value of that name; minus infinity where there is none."""
        return max((entry[name] for entry in self.entries if name in entry), default=-math.inf)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()


def fetch(state: State) -> list[dict[str, float]]:
    """The metrics of a run, or of each member of a sweep, in one transfer. This waits for the device."""
    rows = np.atleast_2d(jax.device_get(state.metrics)).tolist()
    return [dict(zip(METRICS, row, strict=True)) for row in rows]


class LabelCount:
    """Finds a batch without labels. Each of several processes has only its rows of a batch; asking the others at every
    step would mean waiting for them: they are asked before something is written."""

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
            problem = f"step {step + 1}: batch {index} of epoch {epoch} has no labels"
            raise ValueError(f"{problem}; the checkpoints from before stay in {self._workdir}")
        self._checked += len(self._has_labels)
        self._has_labels = []


class Meter:
    """Writes entries of the log, or of the logs of a sweep's members, and keeps the time."""

    def __init__(self, logs: Sequence[Log], bar: tqdm, epoch_steps: int, state: State) -> None:
        self._logs, self._bar, self._epoch_steps = logs, bar, epoch_steps
        self._begin = self._since = time.perf_counter()
        self._before = sum(metrics["real_tokens"] for metrics in fetch(state))  # of this interval, before resuming
        self._tokens = [log.last("tokens") for log in logs]
        # The members, by number, whose loss or gradient was not finite, and the step: no more is logged of them.
        self.bad: dict[int, int] = {}

    def write(self, done: int, state: State) -> State:
        """Logs what was summed since the last time; returns the state with the sums at zero."""
        by_member = fetch(state)
        now = time.perf_counter()
        speed = (sum(metrics["real_tokens"] for metrics in by_member) - self._before) / (now - self._since)
        losses = []
        for number, (log, metrics) in enumerate(zip(self._logs, by_member, strict=True)):
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
        shown = f"loss {low:.4f}" if len(by_member) == 1 else f"losses {low:.4f} to {high:.4f}"
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


def plot_loss(workdir: str | Path) -> None:
    """Draws loss.png from metrics.jsonl: training loss and validation loss, each with an axis of its own, as the former
    has dropout and label smoothing; the first of several processes does. A warning where it cannot be drawn.

    An example is in `Log`.
    """
    if processes.is_primary():
        with warns_of_plot(Path(workdir) / "loss.png"):
            _plot_loss(workdir)


@contextlib.contextmanager
def warns_of_plot(file: Path) -> Iterator[None]:
    """Around drawing a plot of a run that is trained: an error in it costs the plot alone, with a warning."""
    try:
        yield
    except Exception as error:  # whatever matplotlib raises
        logging.warning("%s could not be drawn: %s", file, (str(error).splitlines() or [type(error).__name__])[0])


def _plot_loss(workdir: str | Path) -> None:
    with extra("train"):
        from matplotlib.figure import Figure  # slow to import

    entries = read_metrics(workdir)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (
        ("loss", "-", "training loss, with dropout and label smoothing"),
        ("validation_loss", "o-", "validation loss, with neither"),
    )
    for axes, (name, style, title) in zip(figure.subplots(1, 2), panels, strict=True):
        if points := [(entry["step"], entry[name]) for entry in entries if name in entry]:
            axes.plot(*zip(*points, strict=True), style)
        axes.set(xlabel="step", ylabel="loss per label", title=title)
        axes.title.set_size("medium")
        axes.grid(alpha=0.3)
    figure.savefig(Path(workdir) / "loss.png", dpi=120)
