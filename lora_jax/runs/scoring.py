"""Scores of the predictions that an evaluation left: what evaluate and compare share."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_jax.data.tasks import TextTask, references
from lora_jax.metrics import report

TextMetric = Callable[[list[str], list[list[str]]], float]  # (predictions, references of each) -> a figure


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows (context, prediction, references) of an evaluation's folder."""
    file = folder / "predictions.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: experiments.evaluate writes it")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def scores(
    rows: list[dict[str, Any]], task: TextTask, missing: str | None = None, metrics: Mapping[str, TextMetric] = {}
) -> dict[str, dict]:
    """The scores of all rows, and of those of seen and unseen categories where the data tell them apart: of the task's
    style with their intervals, and of further metrics without."""
    parts = {"all": rows}
    if "seen" in rows[0]:
        parts |= {"seen": [row for row in rows if row["seen"]], "unseen": [row for row in rows if not row["seen"]]}
    result = {}
    for name, part in parts.items():
        if part:
            texts = prepared(part, task)
            result[name] = report(*texts, style=task.style, missing=missing)
            for further, metric in metrics.items():
                score = float(metric(*texts))
                result[name][further] = {"score": score, "low": score, "high": score}
    return result


def prepared(rows: list[dict[str, Any]], task: TextTask) -> tuple[list[str], list[list[str]]]:
    """Predictions and references as the task's scorer gets them."""
    write = task.normalize or str
    return [write(row["prediction"]) for row in rows], [references(task, row["references"]) for row in rows]
