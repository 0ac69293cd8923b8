"""Which matrices should LoRA adapt at one budget? (Hu et al. 2021, section 7.1, Table 5; "LoRA Without Regret", 2025.)

    python -m experiments.study --config=configs/studies.py:matrices --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_matrices.json

The paper (GPT-3, 18 M parameters): q and v at half the rank beat any one matrix, and all four at a quarter are as good;
it left the MLP out. Since: the MLP is what helps, and attention alone falls behind at equal parameters. Here: E2E on a
small GPT-2; every row trains the same number of parameters.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from configs.studies import TARGETS
from experiments.studies.plots import curves
from experiments.studies.reading import Row, at_best_rate, groups, over_rates, row
from experiments.studies.running import Run, swept


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """A sweep of rates and seeds for each set of matrices."""
    config.run.data.path, made = data(), {}
    for target, rank in config.ranks.items():
        config.run.lora.select, config.run.lora.rank, config.run.lora.alpha = TARGETS[target], rank, float(rank)
        made[target] = swept(config.run, learning_rate=config.rates, seed=config.seeds)
    return made


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each set of matrices at its best rate, the best first."""
    by_name = groups(runs, lambda run: run.name)
    made = [row(name, at_best_rate(of), size=of[0].config.lora.rank) for name, of in by_name.items()]
    return sorted(made, key=lambda row: row["validation_loss"]["score"])


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The loss over the rate, a line for each set of matrices."""
    curves(file, {"one budget": over_rates(runs)}, x="learning rate", y="validation loss, nats per label")
