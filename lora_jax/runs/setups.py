"""All that a config's run needs: its base, its batches, its objective, and what starts warm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import training
from lora_jax.core.selection import flatten
from lora_jax.data.batches import Schedule
from lora_jax.runs import bases, methods
from lora_jax.runs.tasks import Task, task_named


class Setup(NamedTuple):
    """All that a run needs.

    Attributes:
      base: the pretrained model.
      method: what trains; None of method "none".
      batches: the schedules of "train" and "valid".
      objective: with its metrics.
    """

    base: bases.Base
    method: lj.ParamTransform | None
    batches: dict[str, Schedule]
    objective: training.Objective


def load(
    config: ConfigDict,
    mesh: Mesh | None = None,
    *,
    task: Task | None = None,
    method: lj.ParamTransform | None = None,
    metrics: Mapping[str, training.Metric] = {},
) -> Setup:
    """The setup of a config; with a mesh its base is read straight onto it.

    Args:
      task, method: instead of those that the config names.
      metrics: of validation, besides the task's own.

    Raises:
      FileNotFoundError: no base or no data where the config says.
    """
    task = task or task_named(config.data.name)
    data = {split: task.load(config.data.path, split) for split in ("train", "valid")}
    base = bases.load(config, mesh=mesh, task=task)
    if method is None and config.method != "none":
        method = lj.from_spec(methods.spec(config, base.model, base.new))
    spec = method.spec if method else {}
    schedules = {split: task.batches(examples, config, base, spec) for split, examples in data.items()}
    objective = training.with_metrics(task.objective(config, base.model), metrics)
    return Setup(base, method, schedules, objective)


def warm_start(config: ConfigDict, method: lj.ParamTransform, base: bases.Base) -> tuple[dict[str, Any], str]:
    """The entries of the adapter that the config starts from, those which fit; and a line that names the others.

    Raises:
      ValueError: another base's adapter, one that the config's method scales otherwise, or nothing of it fits.
    """
    if not config.get("warm_start"):
        return {}, ""
    path = Path(config.warm_start)
    if (path / "config.json").is_file() and not (path / "adapter").is_dir():
        seeds = sorted(str(folder) for folder in path.glob("seed_*"))
        why = f"name one of its seeds: {', '.join(seeds)}" if seeds else "it was stopped before its adapter was written"
        raise FileNotFoundError(f"warm_start={path} is a run without an adapter: {why}")
    theirs, delta = bases.adapter(path / "adapter" if (path / "adapter").is_dir() else path, base)
    wanted = jax.eval_shape(method.init, jax.random.key(0), base.params)
    shapes = {name: jax.tree.map(np.shape, factors) for name, factors in delta.items()}
    fitting = {n: delta[n] for n, factors in wanted.items() if shapes.get(n) == jax.tree.map(np.shape, factors)}
    if not fitting:
        raise ValueError(f"{path}: nothing of this adapter fits the method of the config")
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), wanted)
    flat, treedef = flatten(base.params)  # a tuned leaf may have another shape there: a head
    theirs_base = jax.tree.unflatten(treedef, [delta.get(path, {}).get("value", leaf) for path, leaf in flat])
    ours = method.apply(base.params, lj.Delta(zeros | fitting))
    if other := training.difference(theirs.apply(theirs_base, delta), ours, among=fitting):
        raise ValueError(f"{path} is of another method than the config's: {other}")
    left = sorted(set(delta) - set(fitting))
    note = f"starts from {path}: {len(fitting)} entries" + (f"; these do not fit: {', '.join(left)}" if left else "")
    return fitting, note
