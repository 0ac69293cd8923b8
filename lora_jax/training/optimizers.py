"""The optimizer of a config: AdamW under a schedule, built through `freeze_base`."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

from lora_jax.core.freezing import freeze_base
from lora_jax.core.selection import matches
from lora_jax.core.transforms.registry import owners
from lora_jax.training.config import OptimizerConfig


def schedule(config: Any, steps: int, peak: Any = None) -> optax.Schedule:
    """Learning rate: linear warm-up from 0, then "linear" or "cosine" decay, or "constant".

    Args:
      config: an OptimizerConfig, or a mapping of its keys.
      steps: of the run; the rate reaches `end_lr_ratio` of the peak there.
      peak: instead of the config's `learning_rate`; it may be traced.
    """
    config = OptimizerConfig.of(config)
    peak, warmup = config.learning_rate if peak is None else peak, config.warmup_steps
    if warmup is None:
        warmup = math.ceil(steps * config.warmup_ratio)
    if warmup >= steps:
        logging.warning("warm-up takes %d steps and the run has %d: the peak rate is never reached", warmup, steps)
    rest = max(steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, peak * config.end_lr_ratio, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.end_lr_ratio),
        "constant": optax.constant_schedule(peak),
    }
    if config.schedule not in after:
        raise ValueError(f"optimizer.schedule is {config.schedule!r}, not one of {sorted(after)}")
    if warmup == 0:
        return after[config.schedule]
    warm = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([warm, after[config.schedule]], [warmup])


def optimizer(
    config: Any, rate: optax.Schedule, weight_decay: Any = None, spec: dict[str, Any] | None = None
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, clipped where asked; no state for the base.

    Args:
      config: an OptimizerConfig, or a mapping of its keys.
      rate: the schedule.
      weight_decay: instead of the config's; it may be traced.
      spec: the method's, needed for "matrices"; without it B is what is named `b`.
    """
    config = OptimizerConfig.of(config)
    globs = tuple(config.decay)
    if "matrices" in globs and spec is None:
        raise ValueError("optimizer.decay has 'matrices', which the method's traits name: give its spec")

    def decays(delta: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, _: _decays(globs, spec or {}, keys), delta)

    weight_decay = config.weight_decay if weight_decay is None else weight_decay
    adamw = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=weight_decay, mask=decays)
    parts = [adamw] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm), adamw]
    if (ratio := config.loraplus_lr_ratio) != 1:
        by_label = {"b": optax.scale(ratio), "other": optax.identity()}
        parts.append(optax.partition(by_label, lambda delta: _rates(delta, spec or {})))
    return freeze_base(optax.chain(*parts))


def _rates(delta: Any, spec: dict[str, Any]) -> Any:
    """ "b" for the factors that LoRA+ speeds up (so named in checkpoints), "other" for the rest."""

    def rate(path: str, name: str) -> str:
        return "b" if any(name in traits.fast for traits in owners(spec, path)) else "other"

    return type(delta)({path: {name: rate(path, name) for name in factors} for path, factors in delta.items()})


def _decays(globs: Sequence[str], spec: dict[str, Any], keys: tuple) -> bool:
    path, factor = (jax.tree_util.keystr(keys[:n], simple=True, separator="/") for n in (1, 2))
    if any(matches(glob, name) for glob in globs for name in (path, factor)):
        return True
    return "matrices" in globs and any(matches(glob, factor) for traits in owners(spec, path) for glob in traits.decays)
