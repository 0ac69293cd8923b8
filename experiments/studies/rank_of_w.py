"""Is W itself rank-deficient? (Asked by Hu et al. 2021, section 8.)

    python -m experiments.study --config=configs/studies.py:rank_of_w --workdir=runs/studies \\
      --out=docs/results/study_rank_of_w.json

The paper: that updates have a low rank suggests that W could have one too. Here: the singular values of every matrix
of a base, their effective rank, and how many of them have 90 and 99% of the sum of squares, beside those of random
matrices of the same sizes. Nothing trains.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.studies.plots import curves
from experiments.studies.reading import Row, base_of, five_layers, kernels_of, kind, weights_of
from experiments.studies.running import Run
from lora_jax import analysis
from lora_jax.metrics.statistics import spread

Values = dict[str, tuple[jax.Array, jax.Array]]


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """None."""
    return {}


def read(config: ConfigDict, runs: Sequence[Run]) -> Values:
    """By kind of matrix the singular values, (layers, k), and those of a random one, (1, k), as large."""
    base = base_of(config.run)
    by_kind: Values = {}
    for path, w in weights_of(kernels_of(base), base).items():
        size = jnp.linalg.norm(w[0]) / w[0].size ** 0.5
        random = size * jax.random.normal(jax.random.key(0), w[:1].shape)
        values, of_random = (jnp.linalg.svd(x, compute_uv=False) for x in (w, random))
        by_kind[kind(path)] = values, of_random
    return by_kind


def rows(config: ConfigDict, by_kind: Values) -> list[Row]:
    """A row for each kind of matrix: medians and ranges over the layers."""
    made = []
    for name, (values, random) in by_kind.items():
        figures = {
            "effective_rank": analysis.effective_rank(values),
            "largest": values[:, 0],
            "smallest": values[:, -1] / values[:, 0],
        }
        figures |= {f"rank_{round(100 * share)}": analysis.rank_of_share(values, share) for share in config.shares}
        row = {key: spread(of.tolist()) for key, of in figures.items()}
        of_random = {"rank_90_random": int(analysis.rank_of_share(random, 0.9)[0])}
        made.append({"label": f"{name}, {values.shape[-1]} singular values", **row, **of_random})
    return made


def plot(config: ConfigDict, by_kind: Values, rows: Sequence[Row], file: Path) -> None:
    """The singular values over the largest, of five layers and of a random matrix, a diagram for each kind."""
    panels = {}
    for name, (values, random) in by_kind.items():
        shown = {f"layer {layer + 1}": values[layer] for layer in five_layers(len(values))} | {"random": random[0]}
        numbers = range(1, values.shape[-1] + 1)
        panels[name] = {title: (numbers, np.asarray(of / of[0]).tolist()) for title, of in shown.items()}
    curves(file, panels, x="number", y="singular value over the largest", log=False, marker="-")
