"""Can gradients choose the matrices to adapt better than "q and v"? (Future work of Hu et al. 2021, section 8.)

    python -m experiments.study --config=configs/studies.py:choose --workdir=runs/studies --data=GLUE \\
      --config.run.base=BERT --out=docs/results/study_choose.json

The paper takes q and v of every layer, by Table 5, and asks for more principled ways. Here: MRPC on a small BERT;
before training the gradient's norm of every matrix of attention and MLP (`gradient`) or the sum of |w g|
(`sensitivity`), over the parameters that LoRA would need there, is the order in which matrices are taken until the
budget of q and v is spent; beside them draws of chance. The gradients are those below a new classifier.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.studies.plots import curves
from experiments.studies.reading import Row, at_best_rate, groups, over_rates, row
from experiments.studies.running import Run, swept
from lora_jax.core.globs import matches_any
from lora_jax.core.selection import flatten
from lora_jax.data.json_files import read_json
from lora_jax.distributed import processes
from lora_jax.metrics.glue import MAIN
from lora_jax.metrics.statistics import spread
from lora_jax.runs import tables
from lora_jax.runs.config import ATTENTION_AND_MLP_KERNELS, QV
from lora_jax.runs.run import load_setup

Scores = dict[str, dict[str, float]]


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """A sweep of rates and seeds for each choice of matrices; the scores are kept in scores.json."""
    config.run.data.path, file = data(), Path(config.folder) / "scores.json"
    if not file.is_file():
        tables.write_json(file, scores(config))
    scored = read_json(file, strict=False)
    sizes, made = scored.pop("sizes"), {}
    qv = [path for path in sizes if matches_any(QV, path)]
    budget = sum(sizes[path] for path in qv)
    orders: dict[str, Iterable[str]] = {
        name: sorted(of, key=lambda path: -of[path] / sizes[path]) for name, of in scored.items()
    }
    for draw in range(config.draws):
        orders[f"chance {draw}"] = random.Random(draw).sample(sorted(sizes), len(sizes))
    choices = {"q and v": qv} | {name: taken(order, sizes, budget) for name, order in orders.items()}
    for name, chosen in choices.items():
        config.run.lora.select = tuple(chosen)
        made[name] = swept(config.run, learning_rate=config.rates, seed=config.seeds)
    return made


def taken(order: Iterable[str], sizes: Mapping[str, float], budget: float) -> list[str]:
    """The first matrices of an order that fit into the budget, those that do not left out."""
    chosen: list[str] = []
    for path in order:
        if sum(sizes[of] for of in chosen) + sizes[path] <= budget:
            chosen.append(path)
    return chosen


def scores(config: ConfigDict) -> Scores:
    """`gradient` and `sensitivity` of every matrix, over the first batches; `sizes`, inputs + outputs, of each."""
    count, config = config.batches, config.run.copy_and_resolve_references()
    config.model.dropout = config.model.attention_dropout = 0.0
    setup = load_setup(config)
    params, objective = setup.base.params, setup.objective

    def loss(params: Any, batch: Any) -> jax.Array:
        total, labels = objective.loss(params, batch)
        return total / labels

    put, _ = processes.batch_placer(setup.base.placement.mesh, config.data.batch_size)
    gradient, total = jax.jit(jax.grad(loss)), None
    for batch in islice(setup.batches["train"](0), count):
        of_batch = gradient(params, put(batch))
        total = of_batch if total is None else jax.tree.map(jnp.add, total, of_batch)
    weights = {path: leaf for path, leaf in flatten(params)[0] if matches_any(ATTENTION_AND_MLP_KERNELS, path)}
    gradients = {path: leaf / count for path, leaf in flatten(total)[0] if path in weights}
    return {
        "gradient": {path: float(jnp.linalg.norm(of)) for path, of in gradients.items()},
        "sensitivity": {path: float(jnp.sum(jnp.abs(weights[path] * of))) for path, of in gradients.items()},
        "sizes": {path: sum(leaf.shape) for path, leaf in weights.items()},
    }


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each choice at its best rate, with its matrices."""
    made, figure = [], MAIN[config.run.data.name]
    for name, of_name in groups(runs, lambda run: run.name).items():
        best = at_best_rate(of_name)
        figures = {
            figure: spread([run.summary[figure] for run in best if run.summary]),
            "chosen": len(best[0].config.lora.select),
        }
        made.append(row(name, best, **figures, matrices=list(best[0].config.lora.select)))
    return made


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The loss over the rate, a line for each choice."""
    curves(file, {"one budget": over_rates(runs)}, x="learning rate", y="validation loss")
