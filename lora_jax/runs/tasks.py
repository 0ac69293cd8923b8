"""What a config trains: its base, its batches, its objective, and what starts warm."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from datasets import Dataset
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import training
from lora_jax.core.selection import flatten
from lora_jax.data import batches, glue, pairs, tasks
from lora_jax.data.batches import Schedule
from lora_jax.metrics.glue import glue as glue_metrics
from lora_jax.models.family import dimensions_of
from lora_jax.runs import bases, methods


class Setup(NamedTuple):
    """All that a run needs besides its method."""

    base: bases.Base
    spec: dict[str, Any]  # of what trains; {} of method "none"
    batches: dict[str, Schedule]  # "train" and "valid"
    objective: training.Objective


def load(config: ConfigDict, mesh: Mesh | None = None) -> Setup:
    """The setup of a config: a task of generation or one of GLUE; with a mesh its base is read straight onto it.

    Raises:
      FileNotFoundError: no base or no data where the config says.
    """
    return (_classification if config.data.name in glue.TASKS else _generation)(config, mesh)


def _generation(config: ConfigDict, mesh: Mesh | None) -> Setup:
    task = tasks.named(config.data.name)
    data = {split: task.load(config.data.path, split) for split in ("train", "valid")}
    base, spec = _base(config, mesh)
    model = base.model
    schedules = {}
    for split, examples in data.items():
        encoded = pairs.encode(
            examples,
            base.tokenizer,
            eos=model.config.eos_token_id,
            length=min(config.data.length, dimensions_of(model).max_length),
            long=config.data.long,
            **methods.placeholders(spec, model),
        )
        schedules[split] = batches.bucketed(encoded, config.data.batch_size, config.seed, buckets=config.data.buckets)
    return Setup(base, spec, schedules, training.language_model(model, config.label_smoothing))


def _classification(config: ConfigDict, mesh: Mesh | None) -> Setup:
    data = {split: glue.load(config.data.name, config.data.path, split) for split in ("train", "valid")}
    base, spec = _base(config, mesh)
    schedules = {split: texts(config, base, examples, spec) for split, examples in data.items()}
    return Setup(base, spec, schedules, training.classifier(base.model, metrics_of(config.data.name)))


def _base(config: ConfigDict, mesh: Mesh | None) -> tuple[bases.Base, dict[str, Any]]:
    base = bases.load(config, mesh=mesh)
    return base, {} if config.method == "none" else methods.spec(config, base.model, base.new)


def texts(config: ConfigDict, base: Any, examples: Dataset, spec: dict[str, Any]) -> Schedule:
    """Batches of examples of GLUE, for what has a model and a tokenizer, and a method of that spec."""
    task = glue.TASKS[config.data.name]
    length = min(config.data.length, dimensions_of(base.model).max_length)
    inserted = methods.placeholders(spec, base.model)
    if inserted["after"]:
        raise ValueError(f"infix={len(inserted['after'])}: a text to classify has a prefix alone")
    before = inserted["before"]
    encoded = glue.encode(examples, base.tokenizer, length=length, labels=task.outputs, before=before)
    return batches.classified(encoded, config.data.batch_size, config.seed, buckets=config.data.buckets)


def metrics_of(name: str) -> Any:
    """GLUE's metrics of a task, of a model's outputs (n, labels) and the labels."""
    return lambda outputs, labels: glue_metrics(name, predictions(name, outputs), labels)


def predictions(name: str, outputs: np.ndarray) -> np.ndarray:
    """What a model's outputs (n, labels) say: the class, or the number."""
    return outputs.argmax(-1) if glue.TASKS[name].labels else outputs[:, 0]


def warm_start(config: ConfigDict, method: lj.ParamTransform, base: bases.Base) -> tuple[dict[str, Any], str]:
    """The entries of the adapter that the config starts from, those which fit; and a line that says which do not.

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
    flat, treedef = flatten(base.params)  # what they trained whole has perhaps another shape: a head
    own = jax.tree.unflatten(treedef, [delta.get(path, {}).get("value", leaf) for path, leaf in flat])
    ours = method.apply(base.params, lj.Delta(zeros | fitting))
    if found := training.difference(theirs.apply(own, delta), ours, among=fitting):
        raise ValueError(f"{path} is of another method than the config's: {found}")
    left = sorted(set(delta) - set(fitting))
    note = f"starts from {path}: {len(fitting)} entries" + (f"; these do not fit: {', '.join(left)}" if left else "")
    return fitting, note
