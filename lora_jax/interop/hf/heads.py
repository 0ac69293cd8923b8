"""Classification heads of Hugging Face models: which one is wanted, and what config.json says of it."""

import logging
from collections.abc import Mapping
from typing import Any

from lora_jax.interop.lazy import Lazy


def wanted(
    tensors: dict[str, Lazy],
    weight: str,
    fields: Mapping[str, Any],
    head: str | None,
    labels: int | None,
    source: str,
) -> tuple[str | None, int]:
    """The head asked for and its labels, or else the file's, whose `weight` is (labels, features); None where there is
    neither. Takes a head of other labels out of the tensors."""
    in_file = tensors[weight].shape[0] if weight in tensors and tensors[weight].shape else None
    numbers = fields.get("problem_type") == "regression"
    if head is None:
        if labels is not None:
            raise ValueError(f"{source}: labels={labels} goes with head='classification'")
        if not in_file:
            return None, 0
        head = "regression" if in_file == 1 or numbers else "classification"
    labels = labels or (1 if head == "regression" and not (numbers and in_file) else in_file)
    if labels is None:
        raise ValueError(f"{source} has no head: say how many classes the new one has, labels=")
    if in_file not in (None, labels):
        logging.warning("%s has a head of %d labels, not of %d: it is not used", source, in_file, labels)
        module = weight.partition(".")[0]
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            del tensors[name]
    return head, labels


def fields_of(head: str, labels: int) -> dict[str, Any]:
    """The fields of config.json that say what a head is for."""
    ids = {f"LABEL_{i}": i for i in range(labels)}
    kind = "regression" if head == "regression" else "single_label_classification"
    return {"label2id": ids, "id2label": {str(i): name for name, i in ids.items()}, "problem_type": kind}
