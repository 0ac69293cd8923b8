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
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import lora_jax as lj
from experiments import cli, results, summaries
from lora_jax.models import gpt2
from lora_jax.runs.methods import filled

flags.DEFINE_enum("size", "medium", ["small", "medium", "large", "xl"], "Of GPT-2.")
flags.DEFINE_list("settings", ["32x512:0.5", "16x256:11", "1x128:11"], "BATCHxLENGTH:MILLIONS, of adapters.")
flags.DEFINE_integer("rounds", 10, "Rounds of each setting, after one that compiles.", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Computes in it.")
flags.declare_key_flag("out")

# The bottlenecks of the adapters of Table 1 (the paper prints their parameters alone), and their kinds.
RANKS = {"0.5": {"adapter_l": 9, "adapter_h": 5}, "11": {"adapter_l": 224, "adapter_h": 112}}
PREFIX = 14

Forward = Callable[[], jax.Array]


def main() -> None:
    values = flags.FLAGS
    rows = [row(setting) for setting in values.settings]
    if values.out:
        summaries.add_rows(Path(values.out), rows)
    print(results.table(rows))


def row(setting: str) -> dict[str, Any]:
    """The figures of one setting."""
    values = flags.FLAGS
    batch, length, millions = _parsed(setting)
    config = gpt2.GPT2Config(**vars(gpt2.SIZES[values.size]) | {"dtype": values.dtype})
    run = forwards(config, batch, length, millions)
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for number in tqdm(range(values.rounds + 1), desc=setting, unit="round"):
        for name, forward in run.items():
            begin = time.perf_counter()
            jax.block_until_ready(forward())
            if number:
                seconds[name].append(time.perf_counter() - begin)
    base = seconds.pop("base")
    ratios = {
        f"latency_{name}": cli.spread([mine / its for mine, its in zip(own, base, strict=True)])
        for name, own in seconds.items()
    }
    return {
        "label": f"GPT-2 {values.size}, batch {batch}, length {length}, adapters of {millions} M",
        "command": cli.command("latency"),
        "seed": 0,
        "rounds": values.rounds,
        "dtype": values.dtype,
        "base_seconds": statistics.median(base),
        **ratios,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
    }


def forwards(config: gpt2.GPT2Config, batch: int, length: int, millions: str) -> dict[str, Forward]:
    """A forward of each kind."""
    model = gpt2.GPT2(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    apply = jax.jit(lj.lift(model.apply))
    sites, ranks = gpt2.sites(config), RANKS[millions]
    behind = {name: sites[name] for name in ("attention_out", "mlp_out")}
    lora = lj.lora(lj.select("**/attn/{query,value}/kernel", axes=gpt2.AXES), rank=4)
    methods = {
        "lora": lora,
        "adapter_l": lj.adapter({"mlp_out": sites["mlp_out"]}, rank=ranks["adapter_l"], norm=True, activation="relu"),
        "adapter_h": lj.adapter(behind, rank=ranks["adapter_h"]),
        "prefix": lj.prefix_layer({"block_out": sites["block_out"]}, vocabulary=config.vocab_size, prefix=PREFIX),
    }
    adapted = {name: method.apply(params, filled(method, params)) for name, method in methods.items()}
    kinds = {"base": params, "lora_merged": lj.merge(adapted["lora"]), **adapted}
    text = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)
    placed = np.broadcast_to(np.arange(config.vocab_size, config.vocab_size + PREFIX, dtype=np.int32), (batch, PREFIX))

    def forward(name: str, params: Any) -> Forward:
        tokens = jnp.asarray(np.concatenate([placed, text], 1) if name == "prefix" else text)
        last = jnp.full((batch, 1), tokens.shape[1] - 1, jnp.int32)
        return lambda: apply({"params": params}, tokens, labelled=last)

    return {name: forward(name, params) for name, params in kinds.items()}


def _parsed(setting: str) -> tuple[int, int, str]:
    try:
        shape, millions = setting.split(":")
        batch, length = map(int, shape.split("x"))
        RANKS[millions]
    except (ValueError, KeyError):
        raise ValueError(
            f"--settings={setting}: write BATCHxLENGTH:MILLIONS, millions being one of {list(RANKS)}"
        ) from None
    return batch, length, millions


if __name__ == "__main__":
    cli.run(main)
