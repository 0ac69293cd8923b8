"""The documentation's tables of what fits where: slow, an hour and more of compiling on two cores.

    python -m experiments.plan.tables --out=docs/results/plan.json --cache=plan_cache.json

GPT-3 175B (`pods`, which want libtpu): LoRA, AdapterH and full fine-tuning of Table 12, on texts of 2,048 tokens: what
training holds in all (weights, gradients and Adam's moments), what a checkpoint takes in 16 bits, the FLOPs of a step
of 16 texts, what each device sends in it on 256 v5e (fsdp 16 x tensor 16), and the smallest slices of v5e, v5p and v6e
that fit it with a text for each part of fsdp, each searched for --minutes: chips (data, fsdp, tensor; peak of each).

GPUs (`gpus`): GPT-2 and RoBERTa in float16, with LoRA and fine-tuned, a batch at once and a text at a time, by the
bytes of the program compiled for a CPU.

Llama 3 8B and 70B (`llamas`, which want libtpu): LoRA r = 16 on all matrices (configs/llama.py), with the base in
bfloat16, and with its matrices in nf4: what training holds, the FLOPs of a step of one text of 2,048 tokens, and the
smallest slices:

    python -m experiments.plan.tables --only=llamas --out=docs/results/plan_llama.json --cache=plan_cache.json

--only=pods, gpus or llamas; rows of the other kinds stay in --out.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from configs import e2e, glue, gpt3, llama
from experiments import cli
from lora_jax.distributed import sharding
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
LLAMAS = {"8B": "8b", "70B": "70b"}
BASES = {"bfloat16": None, "nf4": "4"}
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
    if "llamas" in values.only:
        rows += [of_llama(size, base, cache, 60 * values.minutes) for size in LLAMAS for base in BASES]
    if values.out:
        tables.add_rows(Path(values.out), rows)
    else:
        print(json.dumps(rows, indent=2))


def pod(label: str, name: str, cache: search.Cache, seconds: float) -> dict[str, Any]:
    """A row of GPT-3 175B."""
    config = gpt3.get_config(name)
    config.data.length, config.data.batch_size = 2048, 0
    workload = shapes.workload(config)
    answer = cache.ask(workload, topologies.named(SENT_ON), SENT_AS)
    row = {"label": f"pods: {label}", **_held(workload, SENT_AS)}
    row["petaflops_kept"] = asking.step_flops(workload, SENT_AS._replace(remat=False)) / 1e15
    for axis in ("fsdp", "tensor"):
        along = [sent for sent in answer.get("collectives", ()) if axis in sent["axes"]]
        row[f"sent_{axis}"] = sum(sent["bytes"] for sent in along) / 1e9
    row["times_tensor"] = sum(sent["times"] for sent in along)
    return row | _smallest(label, workload, cache, seconds) | _made_by()


def of_llama(size: str, base: str, cache: search.Cache, seconds: float) -> dict[str, Any]:
    """A row of Llama 3 with its base in a type."""
    config, label = llama.get_config(LLAMAS[size]), f"Llama 3 {size}, {base}"
    config.model.base_bits = BASES[base]
    workload = shapes.workload(config)
    row = {"label": f"llamas: {label}", **_held(workload, Layout(1, 1, 1, True, 1))}
    return row | _smallest(label, workload, cache, seconds) | _made_by()


def _held(workload: asking.Workload, layout: Layout) -> dict[str, float]:
    """What training holds in all, what a checkpoint takes in 16 bits, and the FLOPs of a step."""
    step = asking.step(workload, layout._replace(data=1, fsdp=1, tensor=1), sharding.make_mesh({}))
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    return {
        "held_gb": (size(step.params) + 2 * size(step.state.delta) + size(step.state.optimizer)) / 1e9,
        "saved_mb": size(step.state.delta) / 2 / 1e6,
        "petaflops": asking.step_flops(workload, layout) / 1e15,
    }


def _smallest(label: str, workload: asking.Workload, cache: search.Cache, seconds: float) -> dict[str, str]:
    """The smallest slice of each family that a step fits: chips (data, fsdp, tensor; peak of each)."""
    slices = {}
    for family in FAMILIES:
        log = lambda line: print(f"{label}: {line}", file=sys.stderr)  # noqa: E731
        best = search.smallest(workload, topologies.slices(family), seconds, cache, log)
        if best and best["fits"]:
            mesh = f"{best['data']},{best['fsdp']},{best['tensor']}"
            room = f"{best['peak'] / 2**30:.2f} of {best['limit'] / 2**30:.2f} GiB"
            slices[family] = f"{best['chips']} ({mesh}; {room})"
    return slices


def _made_by() -> dict[str, Any]:
    return {"command": cli.command("plan.tables"), **tables.machine("jax", "libtpu")}


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
