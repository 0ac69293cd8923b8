"""Scores a run: one text for every distinct context of a split, BLEU over all its references.

    python -m experiments.evaluate --workdir=runs/e2e
    python -m experiments.evaluate --workdir=runs/e2e --params=base --split=valid --limit=100

Decoding is greedy. Writes evaluation/SPLIT-PARAMS/ into the workdir: predictions.jsonl (context,
prediction, references) and evaluate.json (the numbers that it prints).
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
from lora_jax.data import e2e
from lora_jax.data.batches import bucketed
from lora_jax.metrics import bleu

flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "What to score.")
flags.DEFINE_string("data", None, "The data, where they are no longer where the run's config says.")
flags.DEFINE_integer("limit", None, "Only so many contexts, the first ones.", lower_bound=1)


def main() -> None:
    values = flags.FLAGS
    loaded = reload.load()
    data = first_contexts(e2e.load(values.data or loaded.config.data.path, values.split), values.limit)
    groups = e2e.contexts(data)
    started = time.perf_counter()
    predictions = reload.complete_contexts(loaded, list(groups))
    seconds = time.perf_counter() - started
    folder = Path(values.workdir) / "evaluation" / f"{values.split}-{values.params}"
    rows = [
        {"context": context, "prediction": prediction, "references": references}
        for (context, references), prediction in zip(groups.items(), predictions, strict=True)
    ]
    checkpoints.write_atomically(folder / "predictions.jsonl", reload.json_lines(rows))
    loss, skipped = validation_loss(loaded, data)
    result = {
        "split": values.split,
        "params": values.params,
        "step": loaded.step,
        "contexts": len(groups),
        "references": len(data),
        "skipped": skipped,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bleu": bleu(predictions, list(groups.values())),
        "texts_per_second": len(groups) / seconds,
        "device": jax.devices()[0].device_kind,
    }
    content = json.dumps(result, indent=2) + "\n"
    checkpoints.write_atomically(folder / "evaluate.json", content.encode())
    for name, value in result.items():
        print(f"{name:18}{value:.4f}" if isinstance(value, float) else f"{name:18}{value}")
    print(f"written: {folder}")


def first_contexts(data: Dataset, limit: int | None) -> Dataset:
    """The pairs of the first contexts only."""
    kept = set(list(e2e.contexts(data))[:limit])
    return data.select([i for i, context in enumerate(data["context"]) if context in kept])


def validation_loss(loaded: reload.Loaded, data: Any) -> tuple[float, int]:
    """Nats per label of the pairs, as in training, and how many were too long to count."""
    config, model = loaded.config.data, loaded.model
    length = min(config.length, model.config.n_positions)
    eos = model.config.eos_token_id
    encoded = e2e.encode(data, loaded.tokenizer, eos=eos, length=length, long=config.long)
    batches = bucketed(encoded, config.batch_size, buckets=config.buckets)
    return training.validation_loss(model, loaded.params, batches), encoded.skipped


if __name__ == "__main__":
    cli.run(main)
