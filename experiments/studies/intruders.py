"""Does LoRA put directions of its own among a weight's first ones? (Shuttleworth et al. 2024, arXiv 2410.21228.)

    python -m experiments.study --config=configs/studies.py:intruders --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --config.text=HELD_OUT.txt --out=docs/results/study_intruders.json

The source (RoBERTa, Llama): LoRA's adapted weights have top singular vectors with a low cosine to all of the base's,
full fine-tuning's have none; small ranks have the most, and scaling them down restores the loss on the base's text.
Here: the runs of `forgetting`; the first 10 directions of each matrix, a cosine below 0.5 (PEFT's defaults), and with
config.text the losses after they are scaled by 0.75 (PEFT's default) and by 0; of the first seed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.studies.forgetting import Losses
from experiments.studies.forgetting import members as members
from experiments.studies.plots import curves
from experiments.studies.reading import Row, at_best_rate, groups, row, updates_of, weights_of
from experiments.studies.running import Run
from lora_jax import analysis, checkpoints


class Changed(NamedTuple):
    """By method the runs of the best rate, the first seed's updates, and how many directions of each layer intrude,
    (layers,) for each matrix; and the losses, which have the base."""

    best: dict[str, list[Run]]
    updates: dict[str, dict[str, analysis.Update]]
    counts: dict[str, list[np.ndarray]]
    losses: Losses


def read(config: ConfigDict, runs: Sequence[Run]) -> Changed:
    """Updates and intruders."""
    losses = Losses(config, runs[0])
    best = {name: at_best_rate(of_name) for name, of_name in groups(runs, lambda run: run.name).items()}
    updates = {name: updates_of(of_name[0], losses.base) for name, of_name in best.items()}
    weights = weights_of({path: None for of in updates.values() for path in of}, losses.base)
    counts = {name: [_counts(config, of[path], weights[path]) for path in of] for name, of in updates.items()}
    return Changed(best, updates, counts, losses)


def _counts(config: ConfigDict, update: analysis.Update, w: jax.Array) -> np.ndarray:
    """How many of the first k directions of each layer intrude, (layers,)."""
    k = min(config.k, *w.shape[1:])
    return np.asarray(analysis.intruders(w, *update, k=k, epsilon=config.epsilon).intruder.sum(-1))


def rows(config: ConfigDict, changed: Changed) -> list[Row]:
    """A row for each method: means over all matrices; and with text a row for each LoRA's scaled intruders."""
    best, losses, made = changed.best, changed.losses, []
    params = losses.base.params
    for name, updates in changed.updates.items():
        values = [analysis.spectrum(*update) for update in updates.values()]
        distances = analysis.compare(updates, changed.updates["full"]).values()
        figures = {
            "intruders": jnp.concatenate(changed.counts[name]),
            "effective_rank": jnp.concatenate([analysis.effective_rank(of) for of in values]),
            "rank_90": jnp.concatenate([analysis.rank_of_share(of, 0.9) for of in values]),
            "alignment": jnp.concatenate([pair.alignment for pair in distances]),
            "distance": jnp.concatenate([pair.distance for pair in distances]),
        }
        trained = checkpoints.load(best[name][0].folder)
        made.append(row(name, best[name], **{key: float(jnp.mean(of)) for key, of in figures.items()}))
        if config.text:
            made[-1] |= losses(trained.method.apply(params, trained.delta))
            for strength in (0.75, 0.0) if name != "full" else ():
                options = {"k": config.k, "epsilon": config.epsilon}
                method, delta, _ = analysis.scale_intruders(trained.method, trained.delta, params, strength, **options)
                label = f"{name}, intruders scaled by {strength:g}"
                made.append({"label": label, **losses(method.apply(params, delta))})
    return made


def plot(config: ConfigDict, changed: Changed, rows: Sequence[Row], file: Path) -> None:
    """The intruders of each layer, the mean of its matrices, a line for each method."""
    means = {name: np.mean(counts, axis=0) for name, counts in changed.counts.items()}
    lines = {name: (range(1, len(mean) + 1), mean.tolist()) for name, mean in means.items()}
    y = f"intruders of the first {config.k} directions"
    curves(file, {"intruder dimensions": lines}, x="layer", y=y, log=False)
