"""Do adapters of different ranks, and of different seeds, find the same directions? (Hu et al. 2021, section 7.2.)

    python -m experiments.study --config=configs/studies.py:subspace --workdir=runs/studies --data=E2E \\
      --out=docs/results/study_subspace.json

The paper (GPT-3, Figures 3, 4, 6 and 7): of A at r = 8 and r = 64 the top direction is shared, phi > 0.5, and the rest
little, which is why r = 1 does so well; two seeds of r = 64 share more directions in the update of query than of value,
and two random matrices none. Here: SmolLM2-135M-Instruct on E2E, query and value; beside each phi stands what random
subspaces have, max(i, j) / d.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.studies.plots import heat_maps
from experiments.studies.reading import Row, five_layers, kind, row, shared_directions, updates_of
from experiments.studies.running import Run, swept
from lora_jax import analysis


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """The ranks with seed 0, and the largest with seed 1."""
    if len(config.ranks) < 2:
        raise ValueError(f"ranks={tuple(config.ranks)}: two ranks or more are compared")
    config.run.data.path = data()
    again = config.run.copy_and_resolve_references()
    again.seed, again.lora.rank = 1, max(config.ranks)
    return {"ranks": swept(config.run, rank=config.ranks), "again": again}


def of_rank(runs: Sequence[Run], rank: int, seed: int = 0) -> Run:
    """The run of a rank and a seed."""
    return next(run for run in runs if (run.config.lora.rank, run.config.seed) == (rank, seed))


class Compared(NamedTuple):
    """The runs, and by title phi of each weight at the two largest ranks, and at the largest with two seeds."""

    runs: Sequence[Run]
    similarities: dict[str, analysis.Similarity]


def read(config: ConfigDict, runs: Sequence[Run]) -> Compared:
    """The adapters beside each other."""
    small, large = sorted(config.ranks)[-2:]
    first, second, again = (updates_of(run) for run in (of_rank(runs, small), of_rank(runs, large), runs[-1]))
    pairs = {f"r = {small} and {large}": (first, second), f"r = {large}, two seeds": (second, again)}
    compared = {title: analysis.compare(*pair) for title, pair in pairs.items()}
    inputs = {f"{kind(path)}, {title}": pair.input for title, of in compared.items() for path, pair in of.items()}
    return Compared(runs, inputs)


def rows(config: ConfigDict, compared: Compared) -> list[Row]:
    """A row for the mean of all layers, and for each of five layers, of each weight."""
    made = [row(f"LoRA, r = {run.config.lora.rank}, seed {run.config.seed}", [run]) for run in compared.runs]
    for title, (phi, random) in compared.similarities.items():
        layers = {f"layer {layer + 1}": phi[layer] for layer in five_layers(len(phi))}
        for name, grid in {"mean of all layers": phi.mean(0), **layers}.items():
            made.append({"label": f"{title}, {name}", **shared_directions(grid, random, at=(1, 2, 4, 8))})
    return made


def plot(config: ConfigDict, compared: Compared, rows: Sequence[Row], file: Path) -> None:
    """phi at five layers, and of two random matrices of the same sizes."""
    maps = {}
    for title, (phi, random) in compared.similarities.items():
        width = round(1 / float(random[0, 0]))
        normal = [jax.random.normal(jax.random.key(n), (width, size)) for n, size in enumerate(random.shape)]
        layers = {f"layer {layer + 1}": np.asarray(phi[layer]) for layer in five_layers(len(phi))}
        maps[title] = layers | {"random": np.asarray(analysis.subspace_similarity(*normal))}
    heat_maps(file, maps, top=1.0)
