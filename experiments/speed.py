"""Training speed of our methods among themselves (experiments.benchmark: against peers), on the same batches in turn.

    python -m experiments.speed --config=configs/e2e.py:small \\
      --config.base=FOLDER --config.data.path=FOLDER --out=docs/results/speed.json

LoRA on query and value, LoRA on all matrices, full fine-tuning, and the config's method where that is another. Every
method takes the same batches, one after the other in every round, so that what else the machine does meets all alike;
the figures are medians over the rounds. Compilation is not counted.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import e2e
from experiments import cli, train
from lora_jax import runs, training
from lora_jax.runs import tables

METHODS = {"lora": "LoRA r=4, q and v", "lora_all": "LoRA r=4, all matrices", "full": "full fine-tuning"}
flags.DEFINE_integer("rounds", 15, "Rounds; each takes --steps steps of every method.")
flags.DEFINE_integer("steps", 10, "Steps of a method in a round.")
flags.declare_key_flag("out")


def main() -> None:
    rounds, steps, config = flags.FLAGS.rounds, flags.FLAGS.steps, train.CONFIG.value
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: job(config, name, Path(folder) / name) for name in METHODS}
        if config.method not in ("lora", "tune"):
            jobs[config.method] = runs.prepare(config, Path(folder) / "own").job
        seconds, tokens = measure(jobs, rounds, steps)
    how = {"rounds": rounds, "steps": steps, "base": config.base, "jax": jax.__version__}
    how["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
    rows = []
    for name in jobs:
        relative = statistics.median(full / ours for ours, full in zip(seconds[name], seconds["full"], strict=True))
        speed = round(tokens / statistics.median(seconds[name]))
        rows.append({"label": METHODS.get(name, name), "tokens_per_second": speed, "relative_speed": relative} | how)
    if flags.FLAGS.out:
        tables.write_rows(Path(flags.FLAGS.out), rows)
    print(json.dumps({"rows": rows}, indent=2))


def job(config: ConfigDict, name: str, workdir: Path) -> training.Job:
    """A run of the method on the flags' base and data."""
    variant, config = e2e.get_config(f"small,{name}"), config.copy_and_resolve_references()
    variant.update({"base": config.base, "data": config.data, "model": config.model})
    return runs.prepare(variant, workdir).job


def measure(jobs: dict[str, training.Job], rounds: int, steps: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each method in each round, and a round's non-padding tokens; one round before them warms up."""
    states = {name: each.state for name, each in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    # The same in every round, so that no shape is new after the first; a prefix is in its method's own.
    batches = {name: each.batches(0)[:steps] for name, each in jobs.items()}
    for number in range(rounds + 1):
        for name, each in jobs.items():
            begin = time.perf_counter()
            for batch in batches[name]:
                states[name] = each.step(states[name], each.params, each.put(batch))
            jax.block_until_ready(states[name])
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds, sum(int(batch["mask"].sum()) for batch in next(iter(batches.values())))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
