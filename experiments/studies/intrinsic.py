"""How few numbers suffice, of a random subspace and of LoRA? (Li et al. 2018; Aghajanyan et al. 2020; Hu et al. 2021.)

    python -m experiments.study --config=configs/studies.py:intrinsic --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_intrinsic.json

The sources: full fine-tuning's gain is had to 90% in a random subspace of a few hundred dimensions (d90, RoBERTa on
MRPC), which is why LoRA's authors expect updates of low rank. Here: E2E on a small GPT-2; the share of full
fine-tuning's gain over the frozen base, for random subspaces of several dimensions and for LoRA of several ranks.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from configs.studies import of_method
from experiments.studies import random_subspace  # registers its method
from experiments.studies.plots import curves
from experiments.studies.reading import Row, at_best_rate, groups, row
from experiments.studies.running import Run, swept

METHOD = random_subspace.random_subspace.__name__


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """A sweep of rates and seeds for each dimension, rank, and full fine-tuning; and the frozen base."""
    config.run.data.path = data()
    frozen = config.run.copy_and_resolve_references()
    frozen.method, made = "none", {}
    for dimension in config.dimensions:
        run = config.run.copy_and_resolve_references()
        run.method, run.random_subspace.dimension = METHOD, dimension
        made[f"random, d = {dimension}"] = swept(run, learning_rate=config.rates, seed=config.seeds)
    for rank in config.ranks:
        config.run.lora.rank = rank
        made[f"LoRA, r = {rank}"] = swept(config.run, learning_rate=config.rates, seed=config.seeds)
    full = swept(of_method(config.run, "full"), learning_rate=config.full_rates, seed=config.seeds)
    return {"frozen": frozen, "full": full, **made}


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each at its best rate, with its share of full fine-tuning's gain."""
    best = {name: at_best_rate(of_name) for name, of_name in groups(runs, lambda run: run.name).items()}
    made = [row(name, of_name) for name, of_name in best.items()]
    made[0]["rate"] = None
    frozen, full = (made[n]["validation_loss"]["score"] for n in (0, 1))
    for of_name in made:
        of_name["share"] = (frozen - of_name["validation_loss"]["score"]) / (frozen - full)
    return made


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The share of the gain over the trained parameters."""
    lines = {}
    for start in ("random", "LoRA", "full"):
        of_start = [of for of in rows if of["label"].startswith(start)]
        lines[start] = ([of["trained"] for of in of_start], [of["share"] for of in of_start])
    curves(file, {"gain": lines}, x="trained parameters", y="share of full fine-tuning's gain")
