"""What the studies read of their runs: the best rate, rows, updates, layers."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import lora_jax as lj
from experiments.studies.plots import Curve
from experiments.studies.running import Run
from lora_jax import Delta, analysis, checkpoints
from lora_jax.core.globs import matches_any
from lora_jax.core.selection import flatten, look_up
from lora_jax.methods.changes import weight_matrix
from lora_jax.metrics.statistics import spread
from lora_jax.models.family import family_of
from lora_jax.runs import bases
from lora_jax.runs.config import ATTENTION_AND_MLP_KERNELS
from lora_jax.runs.tasks import task_named

Row = dict[str, Any]


def groups(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    """The runs by a key, in their order."""
    by_key: dict[Any, list[Run]] = {}
    for run in runs:
        by_key.setdefault(key(run), []).append(run)
    return by_key


def losses(runs: Iterable[Run]) -> dict[float, float]:
    """The median loss over seeds by rate."""
    by_rate = groups(runs, lambda run: run.rate)
    return {rate: statistics.median(run.loss for run in of_rate) for rate, of_rate in sorted(by_rate.items())}


def at_best_rate(runs: Sequence[Run]) -> list[Run]:
    """The runs, a seed each, of the rate with the lowest median loss; a ValueError where every run diverged."""
    by_rate = losses(runs)
    best = min(by_rate, key=lambda rate: by_rate[rate])
    if by_rate[best] == float("inf"):
        raise ValueError(f"{runs[0].name}: at every rate {tuple(by_rate)} most runs diverged: give lower ones")
    return [run for run in runs if run.rate == best]


def optimum(by_rate: Mapping[float, float]) -> float:
    """The rate where the parabola through the best rate and its two neighbours, over log rate, is lowest; the best
    itself at an end of the grid."""
    rates = [rate for rate in sorted(by_rate) if by_rate[rate] < float("inf")]
    at = min(range(len(rates)), key=lambda n: by_rate[rates[n]])
    if at in (0, len(rates) - 1):
        return rates[at]
    three = rates[at - 1 : at + 2]
    x = np.log(three)
    curve = np.polyfit(x - x[1], [by_rate[rate] for rate in three], 2)
    return float(np.exp(x[1] - curve[1] / (2 * curve[0]))) if curve[0] > 0 else rates[at]


def best_rows(runs: Sequence[Run]) -> list[Row]:
    """A row for each member at its best rate."""
    return [row(name, at_best_rate(of_name)) for name, of_name in groups(runs, lambda run: run.name).items()]


def over_rates(runs: Iterable[Run], key: Callable[[Run], Any] = lambda run: run.name) -> dict[Any, Curve]:
    """By member, or by a key, the median loss over the rate."""
    by_key = {name: losses(of) for name, of in groups(runs, key).items()}
    return {name: ([*by_rate], [*by_rate.values()]) for name, by_rate in by_key.items()}


def shared_directions(phi: Any, random: Any, at: Iterable[int]) -> dict[str, float]:
    """Of phi (n, m) of two adapters: of the first directions alone, of all, and what random ones have."""
    figures = {f"phi_{n}": float(phi[n - 1, n - 1]) for n in at if n <= min(random.shape)}
    floors = {"floor_1": float(random[0, 0]), "floor_all": float(random[-1, -1])}
    return figures | {"phi_all": float(phi[-1, -1])} | floors


def row(label: str, runs: Sequence[Run], **more: Any) -> Row:
    """A row of the runs of one rate, a seed each."""
    done = [run for run in runs if run.summary is not None]
    first = done[0].summary or {}
    return {
        "label": label,
        "trained": first["trained"],
        "rate": runs[0].rate,
        "validation_loss": spread([run.loss for run in done]),
        **more,
        "seed": [run.config.seed for run in done],
        "device": first["device"],
        "jax": first["jax"],
    }


def base_of(config: ConfigDict) -> bases.Base:
    """The base of a run."""
    return bases.load(config, task=task_named(config.data.name))


def updates_of(run: Run, base: bases.Base | None = None) -> dict[str, analysis.Update]:
    """What a run changed of the matrices of attention and MLP; of full fine-tuning with the base."""
    trained = checkpoints.load(run.folder)
    method, delta = trained.method, trained.delta
    if method.spec["method"] == "tune" and base is not None:
        kernels = [path for path in delta if matches_any(ATTENTION_AND_MLP_KERNELS, path)]
        method = lj.tune(lj.select(*kernels, axes=dict(family_of(base.model).axes)))
        delta = Delta({path: delta[path] for path in kernels})
    return analysis.updates(method, delta, None if base is None else base.params)


def kernels_of(base: bases.Base) -> list[str]:
    """The paths of the matrices of attention and MLP."""
    return [path for path, _ in flatten(base.params)[0] if matches_any(ATTENTION_AND_MLP_KERNELS, path)]


def weights_of(paths: Iterable[str], base: bases.Base) -> dict[str, jax.Array]:
    """Weights of the base, (layers, inputs, outputs)."""
    leaves, axes = dict(flatten(base.params)[0]), family_of(base.model).axes
    return {path: weight_matrix(leaves[path], look_up(axes, path, "axes")) for path in paths}


def kind(path: str) -> str:
    """`h/attn/query/kernel` -> `query`."""
    return path.split("/")[-2]


def five_layers(count: int) -> list[int]:
    """The first, the last and three between, the middle one among them; fewer of fewer layers."""
    return sorted({round(n * (count - 1) / 4) for n in range(5)})
