"""Does LoRA need fewer examples? (Hu et al. 2021, Appendix F.3, Tables 16 and 17.)

    python -m experiments.study --config=configs/studies.py:low_data --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_low_data.json

The paper (GPT-3 on MNLI): with 100 examples LoRA leads (63.8, full 60.2), and prefixes are near chance (37.6 of
embeddings, 48.3 of layers); with 10,000 and more all come near. Here: E2E on a small GPT-2, the same steps for every
number of examples, each method's rate chosen by validation.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from configs.studies import of_method
from experiments.studies.plots import curves
from experiments.studies.reading import Row, best_rows
from experiments.studies.running import Run, swept


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """A sweep of rates and seeds for each method and number of examples."""
    made = {}
    for name, rates in config.rates.items():
        for count in config.train:
            run = of_method(config.run, name)
            run.data.path = data(count)
            made[f"{name}, n = {count}"] = swept(run, learning_rate=rates, seed=config.seeds)
    return made


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each method and number of examples, at its best rate."""
    return best_rows(runs)


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The loss over the number of examples, a line for each method."""
    scores = {row["label"]: row["validation_loss"]["score"] for row in rows}
    lines = {name: (config.train, [scores[f"{name}, n = {n}"] for n in config.train]) for name in config.rates}
    curves(file, {"low data": lines}, x="training examples", y="validation loss, nats per label")
