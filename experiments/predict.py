"""Predicts the labels of a split of GLUE with a trained run: scores them, or writes what GLUE's server takes.

    python -m experiments.predict --workdir=runs/mrpc/seed_0
    python -m experiments.predict --workdir=runs/mnli/seed_0 --split=valid_mismatched
    python -m experiments.predict --workdir=runs/mrpc/seed_0 --split=test

Takes the delta of the best epoch. Writes into the workdir predictions/SPLIT-PARAMS/: of a split with labels
predictions.tsv (index, prediction, label) and predict.json (the metrics that it prints), of a test split the file for
the server (MRPC.tsv, ...).
"""

import json
from pathlib import Path

import jax
import numpy as np
from absl import flags
from datasets import Dataset
from tqdm import tqdm

from experiments import cli, reload
from lora_jax import checkpoints, training
from lora_jax.data import glue
from lora_jax.data.batches import in_order
from lora_jax.metrics.glue import glue as metrics
from lora_jax.runs import tasks as setups

flags.declare_key_flag("split")
flags.declare_key_flag("data")
flags.declare_key_flag("workdir")
flags.declare_key_flag("base")
flags.declare_key_flag("params")
flags.mark_flag_as_required("workdir")


def main() -> None:
    values = flags.FLAGS
    split = values.split or "valid"  # of MNLI also valid_mismatched and test_mismatched
    loaded = reload.load(classifies=True)
    name = loaded.config.data.name
    examples = glue.load(name, values.data or loaded.config.data.path, split)
    predicted = setups.predictions(name, outputs(loaded, examples))
    folder = Path(values.workdir) / "predictions" / f"{split}-{values.params}"
    if "label" not in examples.column_names:
        file, text = glue.submission(name, split, examples, predicted)
        checkpoints.write_atomically(folder / file, text.encode())
        print(f"written: {folder / file}, {len(examples)} predictions")
        return
    rows = zip(examples["index"], predicted.tolist(), examples["label"], strict=True)
    text = "".join("\t".join(map(str, row)) + "\n" for row in [("index", "prediction", "label"), *rows])
    checkpoints.write_atomically(folder / "predictions.tsv", text.encode())
    result = {
        "command": cli.command("predict"),
        "task": name,
        "split": split,
        "params": values.params,
        "step": loaded.step,
        "examples": len(examples),
        **metrics(name, predicted, np.asarray(examples["label"])),
    }
    content = json.dumps(result, indent=2) + "\n"
    checkpoints.write_atomically(folder / "predict.json", content.encode())
    print(content, end="")


def outputs(loaded: reload.Loaded, examples: Dataset) -> np.ndarray:
    """The model's outputs (N, labels), in the order of the examples."""
    epoch = setups.texts(loaded.config, loaded, examples, loaded.spec)(0)
    forward = jax.jit(training.classifier(loaded.model).forward)
    found = [forward(loaded.params, batch) for batch in tqdm(epoch, unit="batch", desc="predict")]
    return in_order(epoch, jax.device_get(found))


if __name__ == "__main__":
    cli.run(main)
