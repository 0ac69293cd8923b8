"""Does the best learning rate stay when the rank changes? ("muA", arXiv 2602.06204; LoRA-RITE, 2410.20625; LoRA-Muon.)

    python -m experiments.study --config=configs/studies.py:transfer --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_transfer.json

The sources: by start and scale the best rate is invariant to the rank, or goes with 1 / r; with alpha / r it hardly
moves; optimizers that know the pairs carry it over rank, width and depth. Here: ranks 1 to 64 of all matrices, scaled
by alpha / r and alpha / sqrt(r) under AdamW, and three such optimizers; width is left out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from experiments.studies.plots import curves
from experiments.studies.reading import Row, at_best_rate, groups, losses, optimum, over_rates, row
from experiments.studies.running import Run, swept


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """A sweep of rates and seeds for each rank and way to scale or to train it."""
    config.run.data.path, made = data(), {}
    ways = [("adamw", rule) for rule in config.rules] + [(name, "alpha/r") for name in config.optimizers]
    for optimizer, rule in ways:
        run = config.run.copy_and_resolve_references()
        run.optimizer.name, run.lora.scale_rule = optimizer, rule
        for rank in config.ranks:
            run.lora.rank = rank
            made[f"{optimizer}, {rule.replace('/', ' over ')}, r = {rank}"] = swept(
                run, learning_rate=config.rates, seed=config.seeds
            )
    return made


def _way(run: Run) -> str:
    return run.name.rpartition(", ")[0]


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each way and rank; the spread of the rates of the least loss over the ranks stands with the way."""
    made = []
    for way, of_way in groups(runs, _way).items():
        by_rank = groups(of_way, lambda run: run.config.lora.rank)
        best = {rank: optimum(losses(of_rank)) for rank, of_rank in by_rank.items()}
        made.append({"label": way, "rate_spread": max(best.values()) / min(best.values())})
        made += [
            row(f"{way}, r = {rank}", at_best_rate(of), size=rank, best_rate=best[rank]) for rank, of in by_rank.items()
        ]
    return made


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The loss over the rate, a line for each rank, a diagram for each way."""
    by_way = groups(runs, _way)
    panels = {way: over_rates(of_way, lambda run: f"r = {run.config.lora.rank}") for way, of_way in by_way.items()}
    curves(file, panels, x="learning rate", y="validation loss, nats per label")
