"""Do LoRA's relatives tie once each has its own learning rate? ("Learning rate matters", arXiv 2602.04998.)

    python -m experiments.study --config=configs/studies.py:rates --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_rates.json

The source: nine variants are within 1 to 2% of each other at their own best rates, and reported gains come from one
rate for all. Here: LoRA and eight others and full fine-tuning, E2E on a small GPT-2; beside each best loss stand that
at LoRA's best rate, where it was tried, and the worst one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from configs.studies import of_method
from experiments.studies.plots import curves
from experiments.studies.reading import Row, at_best_rate, groups, losses, over_rates, row
from experiments.studies.running import Run, swept


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """A sweep of rates and seeds for each method."""
    config.run.data.path = data()
    named = {name: (of_method(config.run, name), rates) for name, rates in config.rates.items()}
    return {name: swept(run, learning_rate=rates, seed=config.seeds) for name, (run, rates) in named.items()}


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each method at its best rate, the best first."""
    by_name = groups(runs, lambda run: run.name)
    shared, made = at_best_rate(by_name["lora"])[0].rate, []
    for name, of_name in by_name.items():
        by_rate = losses(of_name)
        more = {"at_shared_rate": by_rate.get(shared), "worst_rate": max(by_rate.values())}
        made.append(row(name, at_best_rate(of_name), **more))
    return sorted(made, key=lambda row: row["validation_loss"]["score"])


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The loss over the rate, a line for each method."""
    curves(file, {"rates": over_rates(runs)}, x="learning rate", y="validation loss, nats per label")
