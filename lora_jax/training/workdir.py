"""The config of a workdir: a run resumes under the config, and the function, that it began with, or not at all."""

import dataclasses
import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lora_jax.checkpoints import has_data, latest_step, write_atomically
from lora_jax.core.arrays import is_adapted, is_changed
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.selection import flatten
from lora_jax.data.batches import Schedule
from lora_jax.data.digest import digest, digest_of
from lora_jax.data.json_files import read_json
from lora_jax.distributed import processes
from lora_jax.training import locks
from lora_jax.training.config import OLD_MATRICES, OLD_TOKEN_EMBEDDING, TrainConfig, as_json, with_new_names
from lora_jax.training.logging import read_metrics

# What may change when a run resumes. How the base is called may; its identity is compared.
MAY_CHANGE = ("base", "decode", "log_every", "save_every", "max_to_keep", "mesh")
# Other paths of the data may be given too, from a checkpoint on that has digests of them: those are compared.
_PATHS = {"data.path", "data.train", "data.valid", "data.template", "data.validation", "tokenizer", "warm_start"}

# What config.json had then: key -> (value, today's value of the same meaning).
_OLD_VALUES: dict[str, tuple[list[str], list[str]]] = {
    "optimizer.decay": (OLD_MATRICES, ["matrices"]),
    "prefix_embedding.select": (OLD_TOKEN_EMBEDDING, []),
}


def claim(workdir: str | Path, config: Any, *, sweep: str | Path | None = None, compared: bool = False) -> None:
    """Makes this process the one that writes the workdir (`locks.locked`), until it has trained there or ends, and
    writes config.json, the resolved config (a ConfigDict or a TrainConfig). One that left nothing else there (it failed
    at once) is replaced. Of several processes the first one does it.

    Args:
      sweep: of a member of a sweep, the sweep's workdir, which has the checkpoints.
      compared: base and data are those of the run. Before that, another path of theirs is not written over the path
        of a run that has a checkpoint.

    Raises:
      ValueError: another process writes the workdir, or it holds a run of another config (shows every difference); on
        all processes. Or its name is not UTF-8, or its config.json is damaged.

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from lora_jax import training
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     training.claim(workdir, training.TrainConfig(steps=100))
    ...     json.loads(Path(workdir, "config.json").read_text())["steps"]
    100
    """
    workdir = Path(workdir).expanduser()
    path, new = workdir / "config.json", as_json(config)
    content = (json.dumps(new, indent=2) + "\n").encode()

    def write() -> None:
        if path.exists() and (latest_step(workdir) is not None or read_metrics(workdir)):
            here, there = _comparable(new), _comparable(with_new_names(read_json(path, strict=False)))
            different = {
                key: f"{key} is {there.get(key, 'absent')!r} there and {here.get(key, 'absent')!r} here"
                for key in sorted(here.keys() | there.keys())
                if key.split(".")[0] not in MAY_CHANGE and here.get(key) != there.get(key)
            }
            moved = {key for key in _PATHS if here.get(key) and there.get(key)}
            if different.keys() & moved and has_data(sweep or workdir):
                different = {key: text for key, text in different.items() if key not in moved}
            if different:
                problem = f"{workdir} holds the run of another config: {'; '.join(different.values())}"
                raise ValueError(f"{problem}. Give another --workdir, or the config it began with")
            resumes = latest_step(sweep or workdir) is not None
            if resumes and not compared and any(here.get(key) != there.get(key) for key in ("base", *_PATHS)):
                return
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)

    with locks.locked(workdir, keep=True):
        processes.on_primary(write)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A config's values by their full keys, with the defaults of the keys that it does not have."""
    values = flatten_dict(as_json(TrainConfig()), sep=".") | flatten_dict(config, sep=".")
    return values | {key: new for key, (old, new) in _OLD_VALUES.items() if values.get(key) == old}


def data_of(batches: Schedule, validation: Schedule | None, initial: Mapping[str, Any] = {}) -> dict[str, Any]:
    """What a checkpoint keeps of a run's data, as encoded, and of the entries that it starts from; JSON."""
    parts = {"train": digest(batches)} | ({} if validation is None else {"validation": digest(validation)})
    return parts | ({"initial": {"content": digest_of(dict(initial))}} if initial else {})


def check_resumed(
    workdir: str | Path, then: Mapping[str, Any], now: Mapping[str, Any], done: int = 0, total: int = 0
) -> None:
    """Raises a ValueError if a run's data differ from those it began with, or give fewer steps than it has done.

    Args:
      then, now: of `data_of`. Earlier versions kept none; what both have is compared.
      done, total: the steps.

    >>> from lora_jax import training
    >>> then = {"train": {"examples": 100, "content": "5e21"}}
    >>> training.check_resumed("runs/e2e", then, {"train": {"examples": 90, "content": "a07c"}})
    Traceback (most recent call last):
    ValueError: runs/e2e holds a run on other training data: it began with 100 examples (5e21), here are 90 examples
    (a07c). Give another --workdir, or the data it began with
    """
    way_out = "Give another --workdir, or the data it began with"
    both = {part: then[part].keys() & now[part].keys() for part in then.keys() & now.keys()}
    different = {part for part, names in both.items() if any(then[part][name] != now[part][name] for name in names)}
    for part, name in (("train", "training"), ("validation", "validation")):
        if part in different:
            old, new = (f"{x['examples']} examples ({list(x.values())[-1][:12]})" for x in (then[part], now[part]))
            raise ValueError(
                f"{workdir} holds a run on other {name} data: it began with {old}, here are {new}. {way_out}"
            )
    if "initial" in different:
        raise ValueError(f"{workdir} holds a run that began from another adapter (warm_start). Give another --workdir")
    if done > total:
        raise ValueError(f"{workdir}: the run has done {done} steps, but its data now give {total}. {way_out}")


def difference(first: Any, second: Any, among: Container[str] | None = None) -> str:
    """Where two adapted trees of one base compute different functions, in words; "" where they do not. What acts in
    training alone (dropout) is not compared; `among` limits it to some paths.

    >>> import jax, numpy as np, lora_jax as lj
    >>> from lora_jax import training
    >>> params = {"kernel": np.ones((3, 2), "float32")}
    >>> one, two = (lj.lora(lj.select("kernel"), rank=1, alpha=alpha) for alpha in (1, 2))
    >>> delta = one.init(jax.random.key(0), params)
    >>> training.difference(one.apply(params, delta), two.apply(params, delta))
    'kernel has scale 1.0 in one, 2.0 in the other'
    """
    (first, taps), (second, other_taps) = untapped(first), untapped(second)
    ours, theirs = ({tap.name: (tap.fn, tap.layers, tap.count) for tap in group} for group in (taps, other_taps))
    for name in (name for name in ours | theirs if among is None or name in among):
        if ours.get(name) != theirs.get(name):
            return f"{name} is {ours.get(name)} in one, {theirs.get(name)} in the other"
    ones, others = ({p: w for p, w in flatten(tree, is_adapted)[0] if is_changed(w)} for tree in (first, second))
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
