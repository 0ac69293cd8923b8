"""What does an update do with the directions of its weight? (Hu et al. 2021, section 7.3 and Appendix H.4.)

    python -m experiments.study --config=configs/studies.py:amplification --workdir=runs/studies --data=E2E \\
      --out=docs/results/study_amplification.json

The paper (GPT-3, Table 7 and Figure 8): the update is not random beside W, does not repeat W's top directions either,
but amplifies directions that W has weakly: 21.5 times at r = 4, about 2 times at r = 64. The runs are those of
`subspace`. Here: SmolLM2-135M-Instruct on E2E; the update is what is added to W, with alpha / r. Random directions
stand beside, and W's own top r, the most there is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.studies.plots import heat_maps
from experiments.studies.reading import Row, base_of, kind, row, updates_of
from experiments.studies.running import Run
from experiments.studies.subspace import members as members
from lora_jax import analysis, checkpoints
from lora_jax.metrics.statistics import spread

FIGURES = ("projected", "top", "random", "update", "factor")


class Changed(NamedTuple):
    """The runs of the first seed with their updates, and the base's weights that they change, (layers, inputs,
    outputs)."""

    runs: list[tuple[Run, dict[str, analysis.Update]]]
    weights: dict[str, jax.Array]


def read(config: ConfigDict, runs: Sequence[Run]) -> Changed:
    """Updates and weights."""
    trained = checkpoints.load(runs[0].folder)
    weights = analysis.weights(trained.method, trained.delta, base_of(runs[0].config).params)
    return Changed([(run, updates_of(run)) for run in runs if run.config.seed == 0], weights)


def rows(config: ConfigDict, changed: Changed) -> list[Row]:
    """Table 7 of the middle layer, for each weight and rank, with the factor's median and range over all layers."""
    made = []
    for run, updates in changed.runs:
        made.append(row(f"LoRA, r = {run.config.lora.rank}", [run]))
        for path, (a, b) in updates.items():
            amplified = analysis.amplification(changed.weights[path], a, b)
            middle = len(a) // 2
            label = f"{kind(path)}, r = {run.config.lora.rank}, layer {middle + 1}"
            figures = {f"frobenius_{name}": float(amplified[name][middle]) for name in FIGURES[:-1]}
            figures |= {"amplified": float(amplified["factor"][middle])}
            made.append({"label": label, **figures, "amplified_layers": spread(amplified["factor"].tolist())})
    return made


def plot(config: ConfigDict, changed: Changed, rows: Sequence[Row], file: Path) -> None:
    """Figure 8, of the middle layer: phi of W's top i and the update's top j input directions, and of a random one."""
    maps: dict[str, dict[str, np.ndarray]] = {}
    for _, updates in changed.runs:
        for path, (a, b) in updates.items():
            middle, rank = len(a) // 2, a.shape[-1]
            w, update = _directions(changed.weights[path][middle]), _directions(a[middle] @ b[middle])[:, :rank]
            random = jax.random.normal(jax.random.key(0), update.shape)
            of_kind = maps.setdefault(kind(path), {})
            for title, x in ((f"r = {rank}", update), (f"random, r = {rank}", random)):
                of_kind[title] = np.asarray(analysis.subspace_similarity(w, x))
    heat_maps(file, maps, top=0.5, x="the update's top j", y="W's top i")


def _directions(x: jax.Array) -> jax.Array:
    """The left singular vectors of x, of singular values that keep their order and are nowhere zero."""
    u = jnp.linalg.svd(x, full_matrices=False)[0]
    return u * jnp.arange(u.shape[1], 0, -1)
