"""Latency of one forward pass with each kind of adaptation (Hu et al. 2021, Table 1 and Figure 5).

    python -m experiments.latency
    python -m experiments.latency --size=small --settings=16x256:11,32x512:0.5 --rounds=3 --out=latency.json

GPT-2 of that size with random weights: the base, LoRA merged and unmerged (r = 4, query and value), Lin et al.'s and
Houlsby et al.'s adapters of so many million parameters (of GPT-2 medium; their bottleneck is then that of every size),
and prefix-layer tuning of 14 tokens, which makes the text that much longer. A forward gives the next token's logits.
Each round runs all of them in turn; the figures are medians over the rounds of the time relative to the base's in the
same round, with the lowest and highest. The paper's settings (batch x length : million parameters) are the default.
--out keeps its rows of other settings.
"""

import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from experiments import cli
from experiments.benchmark.forwards import forwards_of
from lora_jax.models import gpt2
from lora_jax.runs import tables

flags.DEFINE_enum("size", "medium", ["small", "medium", "large", "xl"], "Of GPT-2.")
flags.DEFINE_list("settings", ["32x512:0.5", "16x256:11", "1x128:11"], "BATCHxLENGTH:MILLIONS, of adapters.")
flags.DEFINE_integer("rounds", 10, "Rounds of each setting, after one that compiles.", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Computes in it.")
flags.declare_key_flag("out")

# The bottlenecks of the adapters of Table 1 (the paper prints their parameters alone), and their kinds.
RANKS = {"0.5": {"adapter_l": 9, "adapter_h": 5}, "11": {"adapter_l": 224, "adapter_h": 112}}


def main() -> None:
    values = flags.FLAGS
    rows = [row(setting) for setting in values.settings]
    if values.out:
        tables.add_rows(Path(values.out), rows)
    print(tables.table(rows))


def row(setting: str) -> dict[str, Any]:
    """The figures of one setting."""
    values, parts = flags.FLAGS, re.fullmatch(r"(\d+)x(\d+):(.*)", setting)
    if not parts or parts[3] not in RANKS:
        raise ValueError(f"--settings={setting}: write BATCHxLENGTH:MILLIONS, millions being one of {list(RANKS)}")
    batch, length, millions = int(parts[1]), int(parts[2]), parts[3]
    config = gpt2.GPT2Config(**vars(gpt2.SIZES[values.size]) | {"dtype": values.dtype})
    forwards = forwards_of(config, batch, length, RANKS[millions])
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for number in tqdm(range(values.rounds + 1), desc=setting, unit="round"):
        for name, forward in forwards.items():
            begin = time.perf_counter()
            jax.block_until_ready(forward())
            if number:
                seconds[name].append(time.perf_counter() - begin)
    base = seconds.pop("base")
    ratios = {name: [taken / of_base for taken, of_base in zip(seconds[name], base, strict=True)] for name in seconds}
    return {
        "label": f"GPT-2 {values.size}, batch {batch}, length {length}, adapters of {millions} M",
        "command": cli.command("latency"),
        "seed": 0,
        "rounds": values.rounds,
        "dtype": values.dtype,
        "base_seconds": statistics.median(base),
        **{f"latency_{name}": cli.spread(values) for name, values in ratios.items()},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    cli.run(main)
