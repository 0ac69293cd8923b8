"""summary.json: a run in one row of a table."""

import importlib.metadata
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import cli
from lora_jax import checkpoints, training


def of(config: ConfigDict, workdir: Path, **numbers: int) -> dict[str, Any]:
    """The run of a workdir in one table row, with validation's figures of the best epoch where the config says what is
    best, else of the last."""
    entries = training.read_metrics(workdir)
    speeds = [e["tokens_per_second"] for e in entries if "tokens_per_second" in e]
    validated = [e for e in entries if "validation_loss" in e]
    best = config.get("best")
    found = max(validated, key=lambda e: e[best]) if best else validated[-1]
    found = {name: value for name, value in found.items() if name != "step"}
    return {
        "command": cli.command("train"),
        "method": config.method,
        "base": config.base,
        "seed": config.seed,
        **numbers,
        **found,
        "validation": list(found),
        "tokens_per_second": round(statistics.median(speeds)) if speeds else None,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def write(workdir: Path, summary: dict[str, Any], *, show: bool = True) -> None:
    content = json.dumps(summary, indent=2) + "\n"
    checkpoints.write_atomically(workdir / "summary.json", content.encode())
    if show:
        print(content, end="")


def machine(*packages: str) -> dict[str, Any]:
    """The device and the packages' versions, for a row of results."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    return {"device": device, "versions": versions}


def add_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Puts rows into a file of docs/results, in place of those of the same labels."""
    new = {row["label"] for row in rows}
    kept = json.loads(file.read_text())["rows"] if file.is_file() else []
    content = {"rows": [row for row in kept if row["label"] not in new] + rows}
    checkpoints.write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())
