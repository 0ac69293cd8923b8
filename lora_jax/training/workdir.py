"""The config of a workdir: a run resumes under the config, and the function, that it began with, or not at all."""

import dataclasses
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lora_jax.checkpoints import latest_step, write_atomically
from lora_jax.core.arrays import is_adapted
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.selection import flatten
from lora_jax.distributed import processes
from lora_jax.training.config import TrainConfig, as_json, with_new_names
from lora_jax.training.logging import read_metrics

# What may change when a run resumes. How the base is called may; its identity is compared.
MAY_CHANGE = ("base", "decode", "log_every", "save_every", "max_to_keep", "mesh")

# What config.json had then: key -> (value, today's value of the same meaning).
_OLD_VALUES: dict[str, tuple[list[str], list[str]]] = {
    "optimizer.decay": (
        [
            "**/{kernel,embedding}/{value,a,b,w1,w1_a,w1_b,w2,w2_a,w2_b,rows}",
            "@shared/**/a",
            "@*/*/{down,up,down_left,down_right,up_left,up_right,values}",
        ],
        ["matrices"],
    ),
    "prefix_embedding.select": (["**/{wte,word}/embedding"], []),
}


def claim(workdir: str | Path, config: Any) -> None:
    """Writes config.json, the resolved config (a ConfigDict or a TrainConfig), into the workdir; one that left nothing
    else there (it failed at once) is replaced. Of several processes the first one does it.

    Raises:
      ValueError: the workdir holds a run of another config; shows every difference; on all processes.
    """
    path, new = Path(workdir) / "config.json", as_json(config)

    def write() -> None:
        if path.exists() and (latest_step(workdir) is not None or read_metrics(workdir)):
            here, there = _comparable(new), _comparable(with_new_names(json.loads(path.read_text())))
            different = [
                f"{key} is {there.get(key, 'absent')!r} there and {here.get(key, 'absent')!r} here"
                for key in sorted(here.keys() | there.keys())
                if key.split(".")[0] not in MAY_CHANGE and here.get(key) != there.get(key)
            ]
            if different:
                problem = f"{workdir} holds the run of another config: {'; '.join(different)}"
                raise ValueError(f"{problem}. Give another --workdir, or the config it began with")
        write_atomically(path, (json.dumps(new, indent=2) + "\n").encode())

    processes.on_primary(write)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A config's values by their full keys, with the defaults of the keys that it does not have."""
    values = flatten_dict(as_json(TrainConfig()), sep=".") | flatten_dict(config, sep=".")
    return values | {key: new for key, (old, new) in _OLD_VALUES.items() if values.get(key) == old}


def difference(first: Any, second: Any, among: Container[str] | None = None) -> str:
    """Where two adapted trees of one base compute different functions, in words; "" where they do not. What acts in
    training alone (dropout) is not compared; `among` limits it to some paths."""
    (first, taps), (second, other_taps) = untapped(first), untapped(second)
    ours, theirs = ({tap.name: (tap.fn, tap.layers, tap.count) for tap in group} for group in (taps, other_taps))
    for name in (name for name in ours | theirs if among is None or name in among):
        if ours.get(name) != theirs.get(name):
            return f"{name} is {ours.get(name)} in one, {theirs.get(name)} in the other"
    ones, others = ({p: w for p, w in flatten(tree, is_adapted)[0] if is_adapted(w)} for tree in (first, second))
    for path in (path for path in [*ones, *others] if among is None or path in among):
        one, other = ones.get(path), others.get(path)
        if type(one) is not type(other):
            return f"{path} is {one or 'not adapted'} in one, {other or 'not adapted'} in the other"
        for field in dataclasses.fields(one):  # type: ignore[arg-type]
            a, b = getattr(one, field.name), getattr(other, field.name)
            if a is b or field.name in ("base", "key", "dropout"):
                continue
            if np.shape(a) != np.shape(b) or not (a == b if field.metadata else np.allclose(a, b, 1e-6, 0)):
                return f"{path} has {field.name} {a} in one, {b} in the other"
    return ""
