"""Does LoRA put directions of its own among a weight's first ones? (Shuttleworth et al. 2024, arXiv 2410.21228.)

    python -m experiments.study --config=configs/studies.py:intruders --workdir=runs/studies --data=E2E \
      --config.run.base=GPT2 --config.text=HELD_OUT.txt --out=docs/results/study_intruders.json

The source (RoBERTa, Llama): LoRA's adapted weights have top singular vectors with a low cosine to all of the base's,
full fine-tuning's have none; small ranks have the most, and scaling them down restores the loss on the base's text.
Here: the runs of `forgetting`; the first 10 directions of each matrix, a cosine below 0.5 (PEFT's defaults), and with
config.text the losses after they are scaled by 0.75 (PEFT's default) and by 0; of the first seed.
"""

from collections.abc import Sequence
from pathlib import Path

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


def _best(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {name: at_best_rate(of_name) for name, of_name in groups(runs, lambda run: run.name).items()}


def _counts(config: ConfigDict, update: analysis.Update, w: jax.Array) -> np.ndarray:
    """How many of the first k directions of each layer intrude, (layers,)."""
    k = min(config.k, *w.shape[1:])
    return np.asarray(analysis.intruders(w, *update, k=k, epsilon=config.epsilon).intruder.sum(-1))


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each method: means over all matrices; and with text a row for each LoRA's scaled intruders."""
    best, losses, made = _best(runs), Losses(config, runs[0]), []
    params = losses.base.params
    changes = {name: updates_of(of_name[0], losses.base) for name, of_name in best.items()}
    for name, updates in changes.items():
        weights = weights_of(updates, losses.base)
        counts = [_counts(config, update, weights[path]) for path, update in updates.items()]
        values = [analysis.spectrum(*update) for update in updates.values()]
        distances = analysis.compare(updates, changes["full"]).values()
        figures = {
            "intruders": jnp.concatenate(counts),
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


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The intruders of each layer, the mean of its matrices, a line for each method."""
    base, lines = Losses(config, runs[0]).base, {}
    for name, of_name in _best(runs).items():
        updates = updates_of(of_name[0], base)
        weights = weights_of(updates, base)
        mean = np.mean([_counts(config, update, weights[path]) for path, update in updates.items()], axis=0)
        lines[name] = (range(1, len(mean) + 1), mean.tolist())
    y = f"intruders of the first {config.k} directions"
    curves(file, {"intruder dimensions": lines}, x="layer", y=y, log=False)
