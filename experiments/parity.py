"""Trains one adapter twice from the same start on the same batches, here and with torch and PEFT, and compares.

    python -m experiments.parity --config=configs/e2e.py:small --config.base=BASE --config.data.path=E2E
    python -m experiments.parity --config=configs/glue.py:base,mrpc --config.base=BERT --config.data.path=GLUE

Without dropout, and step by step by turns. PEFT adapts GPT-2's query, key and value as one matrix (c_attn), so here
they share their A too. Prints, and with --out=FILE puts into a row of that JSON file (docs/results/parity.json): the
largest relative difference of the losses; of the factors A and B after the last step, relative to the largest entry of
each; and the ratio of the times (ours to PEFT's, without the steps that meet a shape for the first time). Needs torch
and PEFT: pip install torch transformers peft.
"""

import statistics
import tempfile
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import cli, train
from experiments.benchmark.parity import by_turns, difference, our_step, without_dropout
from lora_jax import training
from lora_jax.interop import hf, peft
from lora_jax.runs import run, tables

flags.DEFINE_integer("steps", 50, "Steps of both.", lower_bound=1)
flags.declare_key_flag("config")
flags.DEFINE_string("label", None, "What the row of --out is called; otherwise by base and data.")
flags.declare_key_flag("out")


def main() -> None:
    try:
        from experiments.benchmark import torch_parity
    except ImportError as error:
        raise ValueError(f"{error}: pip install torch transformers peft") from error
    config = train.CONFIG.value
    config.update_from_flattened_dict(without_dropout(config))
    setup = run.load_setup(config)
    batches = setup.batches["train"](0)[: flags.FLAGS.steps]
    method = setup.method
    if method is None:
        raise ValueError("method 'none' trains nothing: there is nothing to compare")
    rate = training.schedule(config.optimizer, config.epochs * len(setup.batches["train"]))
    tx = training.optimizer(config.optimizer, rate, spec=method.spec)
    state = training.new_state(method, tx, setup.base.params, jax.random.key(config.seed))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(f"{folder}/base", setup.base.model, setup.base.params)
        peft.save(f"{folder}/adapter", method, state.delta, params=setup.base.params)
        ours, our_delta = our_step(training.make_step(setup.objective, method, tx, rate), setup.base.params, state)
        theirs, save = torch_parity.step(config, Path(folder), rate)
        losses, seconds = by_turns({"ours": ours, "peft": theirs}, batches)
        save(f"{folder}/trained")
        their_delta = peft.load(f"{folder}/trained", setup.base.params)[1]
    report(config, losses, seconds, difference(our_delta(), their_delta))


def report(config: ConfigDict, losses: dict, seconds: dict, factors: float) -> None:
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["peft"], strict=True)]
    pairs = list(zip(losses["ours"], losses["peft"], strict=True))
    figures = {
        "label": flags.FLAGS.label or f"{config.base}, {config.data.name}",
        "command": cli.command("parity"),
        "seed": config.seed,
        "steps_compared": len(pairs),
        "loss_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "factor_difference": factors,
        "ratio_total": sum(seconds["ours"]) / sum(seconds["peft"]),
        "ratio_median": statistics.median(ratios),
        "timed_steps": len(ratios),
        **tables.machine("jax", "torch", "peft"),
        "losses": losses,
    }
    if flags.FLAGS.out:
        tables.add_rows(Path(flags.FLAGS.out), [figures])
    for name, value in figures.items():
        if name != "losses":
            print(f"{name:18}{value}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
