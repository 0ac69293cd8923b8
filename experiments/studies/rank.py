"""How large must the rank be? (Hu et al. 2021, section 7.2 and Appendix D, Tables 6, 15 and 18.)

    python -m experiments.study --config=configs/studies.py:rank --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_rank.json

The paper: very small ranks do as well as large ones, r = 1 of query and value on GPT-3; query alone needs more (Table
6: r = 1 to 64 of q, of q and v, and of q, k, v and o); on E2E the loss falls up to r = 16 and no further (Table 18).
Here: E2E on a small GPT-2.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from configs.studies import TARGETS
from experiments.studies.plots import curves
from experiments.studies.reading import Row, at_best_rate, groups, row
from experiments.studies.running import Run, swept


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """A sweep of rates and seeds for each set of matrices and rank."""
    config.run.data.path, made = data(), {}
    for target in config.targets:
        config.run.lora.select = TARGETS[target]
        for rank in config.ranks:
            config.run.lora.rank = rank
            made[f"{target}, r = {rank}"] = swept(config.run, learning_rate=config.rates, seed=config.seeds)
    return made


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each set of matrices and rank, at its best rate."""
    made = []
    for name, of_name in groups(runs, lambda run: run.name).items():
        target, rank = name.split(", ")[0], of_name[0].config.lora.rank
        made.append(row(name, at_best_rate(of_name), target=target, size=rank))
    return made


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The loss over the rank, a line for each set of matrices."""
    lines = {}
    for target in config.targets:
        of_target = [of_rank for of_rank in rows if of_rank["target"] == target]
        scores = [of_rank["validation_loss"]["score"] for of_rank in of_target]
        lines[target] = ([of_rank["size"] for of_rank in of_target], scores)
    curves(file, {"rank": lines}, x="r", y="validation loss, nats per label")
