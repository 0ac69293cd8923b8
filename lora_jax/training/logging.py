"""What a run writes while it goes: metrics.jsonl, TensorBoard events, loss.png."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from lora_jax.checkpoints import write_atomically
from lora_jax.core.extras import extra
from lora_jax.distributed import processes

# What differs between two runs of one config: everything else in metrics.jsonl is equal.
TIMES = ("seconds", "tokens_per_second")


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl; a half-written last line is left out."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {line[:80]!r}") from error
    return entries


class Logger(Protocol):
    """Where the metrics of a run go: W&B, MLflow, a file. A resumed run writes again what came after its checkpoint."""

    def write(self, step: int, entries: Mapping[str, float]) -> None:
        """Entries of one step: of the training loss, or of a validation."""

    def close(self) -> None:
        """The end of the run."""


class JsonLines:
    """metrics.jsonl of a workdir, of which what came after `step` is dropped first."""

    def __init__(self, workdir: str | Path, step: int) -> None:
        path = Path(workdir) / "metrics.jsonl"
        entries = [entry for entry in read_metrics(workdir) if entry["step"] <= step]
        write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
        self._file = path.open("a")

    def write(self, step: int, entries: Mapping[str, float]) -> None:
        """One line, on disk before this returns: what a checkpoint of this step counts on."""
        self._file.write(json.dumps({"step": step, **entries}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Events of TensorBoard in a workdir; those after `step` are taken back."""

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
    """A logger for one of several runs, the names of whose entries begin with the prefix; it closes nothing."""

    logger: Logger
    prefix: str

    def write(self, step: int, entries: Mapping[str, float]) -> None:
        self.logger.write(step, {self.prefix + name: value for name, value in entries.items()})

    def close(self) -> None:
        pass


class Log:
    """The metrics of a workdir: on resuming from `step`, what came after it is dropped first.

    Of several processes the first one writes; each knows all entries.

    Args:
      loggers: get every entry as well; the caller closes them.
    """

    def __init__(self, workdir: str | Path, step: int, loggers: Sequence[Logger] = ()) -> None:
        self.entries = [entry for entry in read_metrics(workdir) if entry["step"] <= step]
        self._files: list[Logger] = []
        if processes.is_primary():
            self._files = [JsonLines(workdir, step), TensorBoard(workdir, step)]
        self._loggers = [*self._files, *loggers] if processes.is_primary() else []

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files:
            file.close()


def plot_loss(workdir: str | Path) -> None:
    """Draws loss.png from metrics.jsonl: training loss and validation loss; the first of several processes does."""
    if not processes.is_primary():
        return
    with extra("train"):
        from matplotlib.figure import Figure  # slow to import

    entries = read_metrics(workdir)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [(e["step"], e[name]) for e in entries if name in e]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss per label")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(Path(workdir) / "loss.png", dpi=120)
