"""Predicts the labels of a split of GLUE with a trained run: scores them, or writes what GLUE's server takes.

    python -m experiments.predict --workdir=runs/mrpc/seed_0
    python -m experiments.predict --workdir=runs/mnli/seed_0 --split=valid_mismatched
    python -m experiments.predict --workdir=runs/mrpc/seed_0 --split=test

Takes the delta of the best epoch. Writes into the workdir predictions/SPLIT-PARAMS/: of a split with labels
predictions.tsv (index, prediction, label) and predict.json (the metrics that it prints), of a test split the file for
the server (MRPC.tsv, ...).
"""

import json

from absl import flags

from experiments import cli, reload
from lora_jax import runs

flags.declare_key_flag("code")
flags.declare_key_flag("split")
flags.declare_key_flag("data")
flags.declare_key_flag("workdir")
flags.declare_key_flag("base")
flags.declare_key_flag("params")
flags.mark_flag_as_required("workdir")


def main() -> None:
    values = flags.FLAGS
    split, command = values.split or "valid", cli.command("predict")
    _, result = runs.predict(reload.load(), split=split, data=values.data, command=command)
    if "file" in result:
        print(f"written: {result['file']}, {result['examples']} predictions")
    else:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    cli.run(main)
