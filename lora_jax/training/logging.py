"""What a run writes while it goes: metrics.jsonl, TensorBoard events, loss.png."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

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


class Log:
    """Writes metrics of a workdir; on resuming from `step`, what came after it is dropped first.

    Of several processes the first one writes; each knows all entries.
    """

    def __init__(self, workdir: str | Path, step: int) -> None:
        self.workdir = Path(workdir)
        self.entries = [e for e in read_metrics(workdir) if e["step"] <= step]
        if not processes.first():
            return
        with extra("train"):
            from tensorboardX import SummaryWriter  # slow to import: takes torch along

        path = Path(workdir) / "metrics.jsonl"
        write_atomically(path, "".join(json.dumps(e) + "\n" for e in self.entries).encode())
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """One entry, on disk before this returns: what a checkpoint of this step counts on."""
        self.entries.append({"step": step} | values)
        if not processes.first():
            return
        self._file.write(json.dumps(self.entries[-1]) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def last(self, name: str, default: float = 0) -> Any:
        """The newest value of that name."""
        return next((e[name] for e in reversed(self.entries) if name in e), default)

    def highest(self, name: str) -> float:
        """The highest value of that name; minus infinity where there is none."""
        return max((e[name] for e in self.entries if name in e), default=-math.inf)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if processes.first():
            self._file.close()
            self._board.close()


def plot_loss(workdir: str | Path) -> None:
    """Draws loss.png from metrics.jsonl: training loss and validation loss; the first of several processes does."""
    if not processes.first():
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
