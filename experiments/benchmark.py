"""Training speed of the methods of configs/e2e.py, on the same batches in turn.

    python -m experiments.benchmark --config=configs/e2e.py:small --workdir=runs/benchmark \\
      --config.base=FOLDER --config.data.path=FOLDER --out=docs/results/speed.json

Every method takes the same batches, one after the other in every round, so that what else the machine does meets all
alike; the figures are medians over the rounds. Compilation is not counted.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import e2e
from experiments import cli, train
from lora_jax import checkpoints, training

METHODS = ("lora", "lora_all", "full")
flags.DEFINE_integer("rounds", 15, "Rounds; each takes --steps steps of every method.")
flags.DEFINE_integer("steps", 10, "Steps of a method in a round.")
flags.DEFINE_string("out", None, "A JSON file for the figures.")


def main() -> None:
    rounds, steps = flags.FLAGS.rounds, flags.FLAGS.steps
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: job(train.CONFIG.value, name, Path(folder) / name) for name in METHODS}
        seconds, tokens = measure(jobs, rounds, steps)
    speeds = {name: statistics.median(n / t for n, t in zip(tokens, seconds[name], strict=True)) for name in jobs}
    ratios = {
        name: statistics.median(full / own for own, full in zip(seconds[name], seconds["full"], strict=True))
        for name in jobs
    }
    figures = {
        "tokens_per_second": {name: round(speed) for name, speed in speeds.items()},
        "speed_relative_to_full": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "rounds": rounds,
        "steps": steps,
        "base": train.CONFIG.value.base,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    content = json.dumps(figures, indent=2) + "\n"
    if flags.FLAGS.out:
        checkpoints.write_atomically(flags.FLAGS.out, content.encode())
    print(content, end="")


def job(config: ConfigDict, name: str, workdir: Path) -> training.Job:
    """A run of the method on the flags' base and data."""
    variant = e2e.get_config(f"small,{name}")
    variant.update({"base": config.base, "data": config.data, "model": config.model})
    return train.ready(variant, workdir)[0]


def measure(jobs: dict[str, training.Job], rounds: int, steps: int) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds of each method in each round, and the rounds' real tokens; the first round warms up."""
    states = {name: each.state for name, each in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    tokens = []
    order = next(iter(jobs.values())).batches(0)
    for number in range(rounds + 1):
        batches = [order[i] for i in range(steps)]  # the same in every round: no shape is new after the first
        tokens.append(sum(int(batch["mask"].sum()) for batch in batches))
        for name, each in jobs.items():
            begin = time.perf_counter()
            for batch in batches:
                states[name] = each.step(states[name], each.params, each.put(batch))
            jax.block_until_ready(states[name])
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds, tokens[1:]


if __name__ == "__main__":
    cli.run(main)
