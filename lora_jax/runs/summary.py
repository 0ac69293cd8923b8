"""A run in one row of a table: summary.json."""

import json
import statistics
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lora_jax import checkpoints, training


def summarize(config: ConfigDict, workdir: str | Path, *, command: str | None = None, **numbers: int) -> dict[str, Any]:
    """The run of a workdir in one table row, with validation's figures of the best epoch where the config says what is
    best, else of the last.

    Args:
      command: the command line that makes the run again, kept in the row.
      numbers: further entries.
    """
    entries = training.read_metrics(workdir)
    speeds = [entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry]
    validated = [entry for entry in entries if "validation_loss" in entry]
    best = config.get("best")
    chosen = max(validated, key=lambda entry: entry[best]) if best else validated[-1]
    figures = {name: value for name, value in chosen.items() if name != "step"}
    return {
        **({"command": command} if command else {}),
        "method": config.method,
        "base": config.base,
        "seed": config.seed,
        **numbers,
        **figures,
        "validation": list(figures),
        "tokens_per_second": round(statistics.median(speeds)) if speeds else None,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def write_summary(workdir: str | Path, summary: dict[str, Any]) -> None:
    """Writes summary.json."""
    checkpoints.write_atomically(Path(workdir) / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
