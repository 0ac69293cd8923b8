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
from experiments import cli
from lora_jax.planning import asking, search, topologies
from lora_jax.planning.asking import Layout
from lora_jax.runs import shapes, tables

flags.DEFINE_list("only", ["pods", "gpus"], "Which tables.")
flags.DEFINE_float("minutes", 20, "How long to search.", lower_bound=0)
flags.DEFINE_string("cache", None, "A JSON file that keeps answers.")
flags.declare_key_flag("out")

PODS = {"LoRA, q and v, r = 8": "lora_qv_r8", "AdapterH, r = 8": "adapter_h_r8", "full fine-tuning": "full"}
FAMILIES = ("v5e", "v5p", "v6e")
SENT_ON, SENT_AS = "v5e:16x16", Layout(1, 16, 16, True, 1)
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
        tables.add_rows(Path(values.out), rows)
    else:
        print(json.dumps(rows, indent=2))


def pod(label: str, name: str, cache: search.Cache, seconds: float) -> dict[str, Any]:
    """A row of GPT-3 175B."""
    config = gpt3.get_config(name)
    config.data.length, config.data.batch_size = 2048, 0
    workload, topology = shapes.workload(config), topologies.named(SENT_ON)
    step = asking.step(workload, SENT_AS, SENT_AS.mesh(topology))
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    answer = cache.ask(workload, topology, SENT_AS)
    row: dict[str, Any] = {
        "label": f"pods: {label}",
        "held_gb": (size(step.params) + 2 * size(step.state.delta) + size(step.state.optimizer)) / 1e9,
        "saved_mb": size(step.state.delta) / 2 / 1e6,
        "petaflops": asking.step_flops(workload, SENT_AS) / 1e15,
        "petaflops_kept": asking.step_flops(workload, SENT_AS._replace(remat=False)) / 1e15,
    }
    for axis in ("fsdp", "tensor"):
        along = [sent for sent in answer.get("collectives", ()) if axis in sent["axes"]]
        row[f"sent_{axis}"] = sum(sent["bytes"] for sent in along) / 1e9
    row["times_tensor"] = sum(sent["times"] for sent in along)
    for family in FAMILIES:
        log = lambda line: print(f"{label}: {line}", file=sys.stderr)  # noqa: E731
        best = search.smallest(workload, topologies.slices(family), seconds, cache, log)
        if best and best["fits"]:
            mesh = f"{best['data']},{best['fsdp']},{best['tensor']}"
            room = f"{best['peak'] / 2**30:.2f} of {best['limit'] / 2**30:.2f} GiB"
            row[family] = f"{best['chips']} ({mesh}; {room})"
    return row | {"command": cli.command("plan.tables"), **tables.machine("jax", "libtpu")}


def gpu(label: str, method: str, cache: search.Cache) -> dict[str, Any]:
    """A row of one GPU."""
    module, name = GPUS[label]
    config = module.get_config(name if method == "LoRA" else f"{name},full")
    config.model.dtype = "float16"
    config.model.scan_layers = True
    if method == "LoRA":
        config.model.param_dtype = "float16"
    workload, topology, batch = shapes.workload(config), topologies.named("gpu:1x16GB"), config.data.batch_size
    row: dict[str, Any] = {"label": f"gpus: {label}, {method}", "texts": f"{batch} x {config.data.length}"}
    for column, layout in (("batch", Layout(1, 1, 1, False, 1)), ("text", Layout(1, 1, 1, True, batch))):
        peak = cache.ask(workload, topology, layout)["peak"]
        row[f"peak_{column}"] = peak / 1e9
        row[f"fits_{column}"] = " and ".join(f"{size / 1e9:.0f} GB" for size in SIZES if peak <= size) or "-"
    return row | {"command": cli.command("plan.tables"), **tables.machine("jax")}


if __name__ == "__main__":
    cli.run(main)
