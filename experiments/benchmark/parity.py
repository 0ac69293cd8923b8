"""Our side of experiments.parity, and both by turns."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import training
from lora_jax.training import METRICS

Batch = dict[str, np.ndarray]
Figures = dict[str, list[float]]


def without_dropout(config: ConfigDict) -> dict[str, Any]:
    """What differs from the config in both runs (GPT-2: the A that query, key and value share, too)."""
    changes: dict[str, Any] = {"lora.dropout": 0.0}
    if "dropout" in config.model:
        return changes | {"model.dropout": 0.0, "model.attention_dropout": 0.0}
    fused = ("**/attn/{query,key,value}/kernel",)
    with config.unlocked():
        config.lora.shared = fused
    return changes | {"lora.select": fused}


def our_step(
    train_step: Callable[..., training.State], params: Any, state: training.State
) -> tuple[Callable[[Batch], float], Callable[[], lj.Delta]]:
    """`step(batch) -> loss`, and what gives the delta."""
    one = jax.jit(train_step, donate_argnums=0)
    params = lj.without_tuned(params, state.delta)

    def step(batch: Batch) -> float:
        nonlocal state
        zero = state._replace(metrics=jax.numpy.zeros_like(state.metrics))
        state = one(zero, params, {name: x[None] for name, x in batch.items()})
        metrics = dict(zip(METRICS, state.metrics.tolist(), strict=True))
        return metrics["loss"] / metrics["labels"]

    return step, lambda: state.delta


def by_turns(steps: dict[str, Callable[[Batch], float]], batches: list[Batch]) -> tuple[Figures, Figures]:
    """The losses of both, and the seconds of each step whose shapes both have met before."""
    losses: Figures = {name: [] for name in steps}
    seconds: Figures = {name: [] for name in steps}
    seen: set[str] = set()
    for batch in batches:
        shapes = str([x.shape for x in batch.values()])
        for name, step in steps.items():
            begin = time.perf_counter()
            losses[name].append(step(batch))
            if shapes in seen:
                seconds[name].append(time.perf_counter() - begin)
        seen.add(shapes)
    return losses, seconds


def difference(ours: lj.Delta, theirs: lj.Delta) -> float:
    """The largest difference of an entry, relative to the largest of its array."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in map(jax.device_get, pairs))
