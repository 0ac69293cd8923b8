"""Scores of the predictions that an evaluation left: what evaluate and compare share."""

import json
from pathlib import Path
from typing import Any

from lora_jax.data.tasks import Task, references
from lora_jax.metrics import report


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows (context, prediction, references) of an evaluation's folder."""
    file = folder / "predictions.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: experiments.evaluate writes it")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def scores(rows: list[dict[str, Any]], task: Task, missing: str | None = None) -> dict[str, dict]:
    """The scores of all rows, and of those of seen and unseen categories where the data tell them apart."""
    parts = {"all": rows}
    if "seen" in rows[0]:
        parts |= {"seen": [row for row in rows if row["seen"]], "unseen": [row for row in rows if not row["seen"]]}
    return {
        name: report(*prepared(part, task), style=task.style, missing=missing) for name, part in parts.items() if part
    }


def prepared(rows: list[dict[str, Any]], task: Task) -> tuple[list[str], list[list[str]]]:
    """Predictions and references as the task's scorer gets them."""
    write = task.normalize or str
    return [write(row["prediction"]) for row in rows], [references(task, row["references"]) for row in rows]
