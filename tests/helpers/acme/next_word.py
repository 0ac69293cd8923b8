"""Lines of words, each learnt from its second word on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

import lora_jax as lj
from lora_jax import runs, training
from lora_jax.data.batches import Schedule, bucketed
from lora_jax.data.encoded import Encoded


def load(path: str | Path, split: str) -> list[str]:
    return Path(path, f"{split}.words").read_text().splitlines()


def batches(examples: list[str], config: Any, base: Any, spec: Mapping[str, Any]) -> Schedule:
    lines = [base.tokenizer.encode(line).ids for line in examples]
    offsets = np.cumsum([0, *map(len, lines)])
    encoded = Encoded(np.concatenate(lines).astype(np.int32), offsets, np.ones(len(lines), np.int64))
    return bucketed(encoded, config.data.batch_size, config.seed, buckets=config.data.buckets)


def objective(config: Any, model: Any) -> training.Objective:
    apply = lj.lift(model.apply)

    def forward(params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
        logits = apply({"params": params}, batch["tokens"], batch["mask"])
        return jnp.take_along_axis(logits, batch["labelled"][..., None], axis=1)

    def loss(params: Any, batch: dict[str, Array], key: Array | None = None) -> tuple[Array, Array]:
        return training.cross_entropy(forward(params, batch), batch["labels"], batch["weights"])

    def validation(params: Any, batch: dict[str, Array], with_outputs: bool = False) -> tuple[Array, Array, Any]:
        logits = forward(params, batch)
        total, count = training.cross_entropy(logits, batch["labels"], batch["weights"])
        return total, count, logits if with_outputs else None

    return training.Objective(forward, loss, validation)


runs.register_task("next_word", runs.Task(load, batches, objective))
