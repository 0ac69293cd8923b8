"""Scores a run: one text for every distinct context of a split, by the official scores of its data.

    python -m experiments.evaluate --workdir=runs/e2e
    python -m experiments.evaluate --workdir=runs/e2e --params=base --split=valid --limit=100 --num_beams=1

Decodes as the config says, or the flags. Writes evaluation/SPLIT-PARAMS/ into the workdir: predictions.jsonl (context,
prediction, references) and evaluate.json (the numbers that it prints, with 95% bootstrap intervals). The same command
goes on where it was stopped. experiments.compare compares two runs.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from datasets import Dataset

from experiments import cli, reload
from lora_jax import checkpoints, training
from lora_jax.data.batches import bucketed
from lora_jax.data.pairs import contexts, encode
from lora_jax.data.tasks import named
from lora_jax.metrics.scores import FILLED
from lora_jax.models.family import dimensions_of
from lora_jax.runs import methods, scoring

flags.declare_key_flag("split")
flags.declare_key_flag("data")
flags.DEFINE_integer("limit", None, "Only so many contexts, the first ones.", lower_bound=1)
flags.DEFINE_enum(
    "missing",
    None,
    ["first", "empty"],
    "WebNLG, DART: what stands for references that a context lacks to have as many as the others: its first one (the "
    "authors' way) or an empty one (multi-bleu's).",
)
flags.adopt_module_key_flags(reload)
flags.declare_key_flag("workdir")
flags.mark_flag_as_required("workdir")


def main() -> None:
    values = flags.FLAGS
    split = values.split or "test"
    loaded = reload.load()
    config = loaded.config.data
    task = named(config.name)
    if values.missing and task.style not in FILLED:
        raise ValueError(f"--missing={values.missing}: references of {config.name} are not filled, leave it out")
    data = first_contexts(task.load(values.data or config.path, split), values.limit)
    groups = contexts(data)
    part = f"{split}-{values.params}" + (f"-first{values.limit}" if values.limit else "")
    folder = Path(values.workdir) / "evaluation" / part
    kept = folder / "predictions.jsonl.part"
    resumed = kept.exists()
    started = time.perf_counter()
    predictions = reload.complete_contexts(loaded, list(groups), kept)
    seconds = time.perf_counter() - started
    rows = [
        {"context": context, "prediction": prediction, "references": references}
        for (context, references), prediction in zip(groups.items(), predictions, strict=True)
    ]
    if "seen" in data.column_names:
        seen = dict(zip(data["context"], data["seen"], strict=True))
        rows = [row | {"seen": seen[row["context"]]} for row in rows]
    checkpoints.write_atomically(folder / "predictions.jsonl", reload.json_lines(rows))
    loss, skipped = validation_loss(loaded, data)
    scores = scoring.scores(rows, task, values.missing)
    result = {
        "command": cli.command("evaluate"),
        "split": split,
        "params": values.params,
        "step": loaded.step,
        "decoding": reload.decoding(loaded.config),
        "missing": values.missing,
        "contexts": len(groups),
        "references": len(data),
        "skipped": skipped,
        "loss": loss,
        "perplexity": math.exp(loss),
        "scores": scores,
        "seconds": None if resumed else seconds,
        "device": jax.devices()[0].device_kind,
    }
    content = json.dumps(result, indent=2) + "\n"
    checkpoints.write_atomically(folder / "evaluate.json", content.encode())
    kept.unlink()
    show(result)
    print(f"written: {folder}")


def first_contexts(data: Dataset, limit: int | None) -> Dataset:
    """The pairs of the first contexts only."""
    kept = set(list(contexts(data))[:limit])
    return data.select([i for i, context in enumerate(data["context"]) if context in kept])


def validation_loss(loaded: reload.Loaded, data: Any) -> tuple[float, int]:
    """Nats per label of the pairs, as in training, and how many were too long to count."""
    config, model = loaded.config.data, loaded.model
    length = min(config.length, dimensions_of(model).max_length)
    inserted = methods.placeholders(loaded.spec, model)
    eos = model.config.eos_token_id
    encoded = encode(data, loaded.tokenizer, eos=eos, length=length, long=config.long, **inserted)
    batches = bucketed(encoded, config.batch_size, buckets=config.buckets)
    return training.validate(training.language_model(model), loaded.params, batches)["validation_loss"], encoded.skipped


def show(result: dict[str, Any]) -> None:
    """Prints the result as a table."""
    for name, value in result.items():
        if name != "scores":
            print(f"{name:18}{value:.4f}" if isinstance(value, float) else f"{name:18}{value}")
    for part, found in result["scores"].items():
        for name, value in found.items():
            label = name if part == "all" else f"{name} ({part})"
            print(f"{label:18}{value['score']:.4f}  [{value['low']:.4f}, {value['high']:.4f}]")


if __name__ == "__main__":
    cli.run(main)
