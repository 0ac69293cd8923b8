"""A tiny GPT-2 on random pairs, and the configs of runs that take seconds."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, config_dict

import lora_jax as lj
from lora_jax import checkpoints, runs, training
from lora_jax.data.batches import Schedule, bucketed
from lora_jax.data.pairs import Encoded
from lora_jax.models import gpt2

VOCAB = 61
QV = {"select": ("**/attn/{query,value}/kernel",), "rank": 2, "alpha": 8.0, "dropout": 0.1}


SHAPE = gpt2.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=8, n_layer=1, n_head=2, eos_token_id=0)


@functools.cache
def model_and_params(**changes: Any) -> tuple[gpt2.GPT2, Any]:
    model = gpt2.GPT2(dataclasses.replace(SHAPE, **changes))
    tokens = jnp.zeros((1, 4), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(5), tokens)["params"]


def pairs(count: int, seed: int = 0) -> Encoded:
    """Random examples of 6 to 24 tokens."""
    random = np.random.default_rng(seed)
    starts = random.integers(2, 12, count)
    sizes = starts + random.integers(4, 13, count)
    return Encoded(
        tokens=random.integers(1, VOCAB, sizes.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        starts=starts,
    )


def schedule(count: int = 20, batch_size: int = 4, buckets: int = 2, seed: int = 0) -> Schedule:
    return bucketed(pairs(count, seed), batch_size, seed, buckets=buckets)


def run_config(**changes: Any) -> ConfigDict:
    config = ConfigDict()
    config.seed, config.base, config.epochs = 3, "tiny", 2
    for name in ("steps", "eval_every", "save_every"):
        config[name] = config_dict.placeholder(int)
    config.log_every, config.keep, config.accumulate, config.label_smoothing = 2, 3, 1, 0.1
    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate, optimizer.schedule, optimizer.final_share = 1e-2, "linear", 0.0
    optimizer.warmup_steps, optimizer.b1, optimizer.b2, optimizer.eps = 2, 0.9, 0.999, 1e-6
    optimizer.weight_decay, optimizer.decay = 0.01, ("**",)
    optimizer.clip_norm = config_dict.placeholder(float)
    config.update_from_flattened_dict(changes)
    return config


def config_of(folder: Path, **changes: Any) -> ConfigDict:
    """Of a run of four steps, on what `cli.make_inputs` made."""
    config = runs.default_config("generation")
    config.base, config.data.path = str(folder / "base"), str(folder / "data")
    small = {"data.batch_size": 4, "data.buckets": 1, "optimizer.warmup_steps": 1, "optimizer.learning_rate": 0.01}
    config.update_from_flattened_dict({**small, "steps": 4, "log_every": 2, "save_every": 2, **changes})
    return config


def prepare(workdir: Path, config: ConfigDict, **changes: Any) -> training.Job:
    """A LoRA run on q,v, if nothing else is said."""
    if "params" not in changes:
        changes["model"], changes["params"] = model_and_params()
    options = {
        "method": lj.from_spec({"method": "lora", **QV}),
        "base": checkpoints.identity(changes["params"], "tiny"),
        "batches": schedule(),
        "validation": schedule(8, seed=1),
    }
    return training.prepare(config, workdir, **(options | changes))


def with_programs_of(other: training.Job, job: training.Job) -> training.Job:
    """The job with the step and the validation of another of the same method and options: nothing compiles anew."""
    return job._replace(step=other.step, validate=other.validate)


def without_times(workdir: Path) -> list[dict]:
    return [
        {name: x for name, x in entry.items() if name not in training.TIMES} for entry in training.read_metrics(workdir)
    ]


def equal_bits(a: Any, b: Any) -> bool:
    leaves = jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(leaves)
