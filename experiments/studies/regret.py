"""When does LoRA equal full fine-tuning? ("LoRA Without Regret", Thinking Machines 2025.)

    python -m experiments.study --config=configs/studies.py:regret --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_regret.json

The source (Llama 3 and Qwen 3, ranks 1 to 512): LoRA equals full fine-tuning while the data fit its capacity; all
layers beat attention alone, at equal parameters too; its best rate is about ten times full's, 15 in short runs; with
alpha / r the best rate hardly depends on the rank; large batches cost LoRA more than full, whatever the rank. Here: an
epoch of the first pairs of E2E on a small GPT-2; the rate of the least loss is that of a parabola over log rate.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from configs.studies import TARGETS, of_method
from experiments.studies.plots import curves
from experiments.studies.reading import Row, at_best_rate, groups, losses, optimum, over_rates, row
from experiments.studies.running import Run, swept


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """A sweep of rates and seeds for each rank, part and size of a batch."""
    config.run.data.path, made = data(), {}
    for batch in config.batches:
        config.run.data.batch_size, config.run.steps = batch, config.examples // batch
        small = batch == min(config.batches)
        cells = {f"all, r = {rank}": ("all", rank) for rank in (config.ranks if small else config.large_ranks)}
        cells |= {f"{part}, r = {rank}": (part, rank) for part, rank in config.parts.items() if small}
        for name, (part, rank) in cells.items():
            run = config.run.copy_and_resolve_references()
            run.lora.select, run.lora.rank = TARGETS[part], rank
            made[f"{name}, batch {batch}"] = swept(run, learning_rate=config.rates, seed=config.seeds)
        full = of_method(config.run, "full")
        made[f"full, batch {batch}"] = swept(full, learning_rate=config.full_rates, seed=config.seeds)
    return made


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each at its best rate, with the rate of the least loss over that of full fine-tuning."""
    by_name, made = groups(runs, lambda run: run.name), []
    for name, of_name in by_name.items():
        batch = name.rpartition(" ")[2]
        rate, full = optimum(losses(of_name)), optimum(losses(by_name[f"full, batch {batch}"]))
        more = {"best_rate": rate, "rate_ratio": rate / full}
        made.append(row(name, at_best_rate(of_name), **more))
    return made


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The loss over the rate, a line for each rank or part, a diagram for each size of a batch."""
    panels: dict = {f"batch {batch}": {} for batch in config.batches}
    for name, curve in over_rates(runs).items():
        line, _, batch = name.rpartition(", ")
        panels[batch][line] = curve
    curves(file, panels, x="learning rate", y="validation loss, nats per label")
