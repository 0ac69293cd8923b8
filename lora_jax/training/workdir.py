"""The config of a workdir: a run goes on under the config it began with, or not at all."""

import json
from pathlib import Path
from typing import Any

from lora_jax.checkpoints import latest_step, write_atomically
from lora_jax.training.logging import read_metrics

# What may change when a run goes on. How the base is called may; its identity is compared.
MAY_CHANGE = ("base", "decode", "log_every", "save_every", "keep", "mesh")


def claim(workdir: str | Path, config: Any) -> None:
    """Writes config.json, the whole resolved config (a ConfigDict), into the workdir.

    A config that left nothing else there (it failed at once) is replaced.

    Raises:
      ValueError: the workdir holds a run of another config; shows every difference.
    """
    path = Path(workdir) / "config.json"
    new = json.loads(config.to_json())
    if path.exists() and (latest_step(workdir) is not None or read_metrics(workdir)):
        old = json.loads(path.read_text())
        here, there = _flat(new), _flat(old)
        keys = sorted(here.keys() | there.keys())
        different = [
            f"{key} is {there.get(key, 'absent')!r} there and {here.get(key, 'absent')!r} here"
            for key in keys
            if key.split(".")[0] not in MAY_CHANGE and here.get(key) != there.get(key)
        ]
        if different:
            raise ValueError(
                f"{workdir} holds the run of another config: {'; '.join(different)}. "
                "Give another --workdir, or the config it began with"
            )
    write_atomically(path, (json.dumps(new, indent=2) + "\n").encode())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
