"""The README's tables of what fits where: slow, an hour and more of compiling on two cores.

    python -m experiments.plan.tables --out=docs/results/plan.json --cache=plan_cache.json

GPT-3 175B (`pods`, which want libtpu): LoRA, AdapterH and full fine-tuning of Table 12, on texts of 2,048 tokens: what
training holds in all (weights, gradients and Adam's moments), what a checkpoint takes in 16 bits, the FLOPs of a step
of 16 texts, what each device sends in it on 256 v5e (fsdp 16 x tensor 16), and the smallest slices of v5e, v5p and v6e
that fit it with a text for each part of fsdp, each searched for --minutes: chips (data, fsdp, tensor; peak of each).

GPUs (`gpus`): GPT-2 and RoBERTa in float16, with LoRA and fine-tuned, a batch at once and a text at a time, by the
bytes of the program compiled for a CPU.

--only=pods or gpus; rows of the other kind stay in --out.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from configs import e2e, glue, gpt3
from experiments import cli, summaries
from experiments.plan import ask, search
from experiments.plan.ask import Choice
from lora_jax.planning import topologies

flags.DEFINE_list("only", ["pods", "gpus"], "Which tables.")
flags.declare_key_flag("out")
flags.declare_key_flag("cache")
flags.declare_key_flag("minutes")

PODS = {"LoRA, q and v, r = 8": "lora_qv_r8", "AdapterH, r = 8": "adapter_h_r8", "full fine-tuning": "full"}
FAMILIES = ("v5e", "v5p", "v6e")
SENT_ON, SENT_AS = "v5e:16x16", Choice(1, 16, 16, True, 1)
GPUS = {
    "GPT-2 small": (e2e, "small"),
    "GPT-2 medium": (e2e, "medium"),
    "GPT-2 large": (e2e, "large"),
    "RoBERTa-base": (glue, "base,mrpc"),
    "RoBERTa-large": (glue, "large,mrpc"),
}
SIZES = (11e9, 16e9)


def main() -> None:
    values = flags.FLAGS
    topologies.prepare([])
    cache = search.Cache(Path(values.cache) if values.cache else None)
    rows: list[dict[str, Any]] = []
    if "pods" in values.only:
        rows += [pod(label, name, cache, 60 * values.minutes) for label, name in PODS.items()]
    if "gpus" in values.only:
        rows += [gpu(label, method, cache) for label in GPUS for method in ("LoRA", "full fine-tuning")]
    if values.out:
        summaries.add_rows(Path(values.out), rows)
    else:
        print(json.dumps(rows, indent=2))


def pod(label: str, name: str, cache: search.Cache, seconds: float) -> dict[str, Any]:
    """A row of GPT-3 175B."""
    config = gpt3.get_config(name)
    config.data.length, config.data.batch_size = 2048, 0
    one = ask.step(config, SENT_AS, SENT_AS.mesh(topologies.named(SENT_ON)))
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    sent = cache.ask(config, topologies.named(SENT_ON), SENT_AS)
    row: dict[str, Any] = {
        "label": f"pods: {label}",
        "held_gb": (size(one.params) + 2 * size(one.state.delta) + size(one.state.optimizer)) / 1e9,
        "saved_mb": size(one.state.delta) / 2 / 1e6,
        "petaflops": ask.products(config, SENT_AS) / 1e15,
        "petaflops_kept": ask.products(config, SENT_AS._replace(remat=False)) / 1e15,
    }
    along = {axis: [e for e in sent.get("collectives", ()) if axis in e["axes"]] for axis in ("fsdp", "tensor")}
    row |= {f"sent_{axis}": sum(each["bytes"] for each in found) / 1e9 for axis, found in along.items()}
    row["times_tensor"] = sum(each["times"] for each in along["tensor"])
    for family in FAMILIES:
        said = lambda line: print(f"{label}: {line}", file=sys.stderr)  # noqa: E731
        found = search.smallest(config, topologies.slices(family), seconds, cache, said)
        if found and found["fits"]:
            mesh = f"{found['data']},{found['fsdp']},{found['tensor']}"
            room = f"{found['peak'] / 2**30:.2f} of {found['limit'] / 2**30:.2f} GiB"
            row[family] = f"{found['chips']} ({mesh}; {room})"
    return row | {"command": _command(), **summaries.machine("jax", "libtpu")}


def gpu(label: str, method: str, cache: search.Cache) -> dict[str, Any]:
    """A row of one GPU."""
    module, name = GPUS[label]
    config = module.get_config(name if method == "LoRA" else f"{name},full")
    config.model.dtype = "float16"
    config.model.scan_layers = True
    if method == "LoRA":
        config.model.param_dtype = "float16"
    here = topologies.named("gpu:1x16GB")
    batch = config.data.batch_size
    row: dict[str, Any] = {"label": f"gpus: {label}, {method}", "texts": f"{batch} x {config.data.length}"}
    for column, choice in (("batch", Choice(1, 1, 1, False, 1)), ("text", Choice(1, 1, 1, True, batch))):
        found = cache.ask(config, here, choice)
        row[f"peak_{column}"] = found["peak"] / 1e9
        row[f"fits_{column}"] = " and ".join(f"{size / 1e9:.0f} GB" for size in SIZES if found["peak"] <= size) or "-"
    return row | {"command": _command(), **summaries.machine("jax")}


def _command() -> str:
    return cli.command("plan.tables")


if __name__ == "__main__":
    cli.run(main)
