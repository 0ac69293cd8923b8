"""Rows of docs/results."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from lora_jax import checkpoints


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
