"""The optimizer of a config, under its schedule, built through `freeze_base`."""

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import optax

from lora_jax.core.freezing import freeze_base, partition
from lora_jax.core.globs import matches, matches_any, plainest
from lora_jax.core.selection import nearest
from lora_jax.core.transforms import ParamTransform, Spec, Traits, traits_of
from lora_jax.training import lora_optimizers
from lora_jax.training.config import OLD_MATRICES, OptimizerConfig


def schedule(config: Any, steps: int, peak: Any = None) -> optax.Schedule:
    """Learning rate of an OptimizerConfig, or a mapping of its keys, in a run of so many steps: linear warm-up from 0,
    then "linear" or "cosine" decay, or "constant". `peak`, which may be traced, replaces `learning_rate`.

    >>> rate = schedule({"learning_rate": 0.5, "warmup_steps": 10}, steps=110)
    >>> [float(rate(step)) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.25, 0.5, 0.25, 0.0]
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
    decay = after[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def check_decay(config: Any, delta: Any) -> None:
    """A ValueError where a glob of `decay`, "matrices" apart, matches nothing that trains of a delta, of which shapes
    suffice."""
    globs = list(OptimizerConfig.of(config).decay)
    keys = [keys for keys, _ in jax.tree.leaves_with_path(partition(delta)[0])]
    names = {jax.tree_util.keystr(part[:n], simple=True, separator="/") for part in keys for n in (1, 2)}
    for glob in globs if globs != OLD_MATRICES else []:
        if glob != "matrices" and not any(matches(glob, name) for name in names):
            raise ValueError(f"optimizer.decay={glob!r} matches nothing that trains{nearest(plainest(glob), names)}")


def optimizer(
    config: Any, rate: optax.Schedule, weight_decay: Any = None, spec: dict[str, Any] | None = None
) -> optax.GradientTransformation:
    """That of an OptimizerConfig, or of a mapping of its keys; no state for the base.

    Args:
      weight_decay: instead of the config's; it may be traced.
      spec: the method's, needed for "matrices"; without it B is what is named `b`, and of shapes alone those made for
        LoRA cannot always tell which axes are stacked.

    >>> tx = optimizer({"learning_rate": 0.5, "clip_norm": 1.0}, schedule({"learning_rate": 0.5}, steps=100))
    """
    config = OptimizerConfig.of(config)
    globs = tuple(config.decay)
    if "matrices" in globs and spec is None:
        raise ValueError("optimizer.decay has 'matrices', which the method's traits name: give its spec")

    def decays(keys: tuple, _: Any) -> bool:
        path, factor = (jax.tree_util.keystr(keys[:n], simple=True, separator="/") for n in (1, 2))
        if matches_any(globs, path) or matches_any(globs, factor):
            return True
        names = [glob for traits in _owners(spec or {}, path) for glob in traits.decays] if "matrices" in globs else []
        return matches_any(names, factor)

    def rates(delta: Any) -> Any:  # "b": what LoRA+ speeds up (so named in checkpoints)
        def label(path: str, name: str) -> str:
            return "b" if any(name in traits.fast for traits in _owners(spec or {}, path)) else "other"

        return type(delta)({path: {name: label(path, name) for name in factors} for path, factors in delta.items()})

    weight_decay = config.weight_decay if weight_decay is None else weight_decay
    mask = partial(jax.tree_util.tree_map_with_path, decays)
    options = {"b1": config.b1, "b2": config.b2, "eps": config.eps, "weight_decay": weight_decay, "mask": mask}
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    match config.name:
        case "adamw":
            parts = [*clip, optax.adamw(rate, **options)]
        case "riemannian":
            parts = [*clip, lora_optimizers.riemannian(rate, **options, damping=config.damping, spec=spec)]
        case "lora_rite":
            parts = [lora_optimizers.lora_rite(rate, **options, clip_norm=config.clip_norm, spec=spec)]
        case "lora_fa":
            fa = {"damping": config.damping, "clip_norm": config.clip_norm, "spec": spec}
            parts = [lora_optimizers.lora_fa(rate, **options, **fa)]
        case "lora_muon":
            parts = [*clip, lora_optimizers.lora_muon(rate, **options, spec=spec)]
    if (ratio := config.loraplus_lr_ratio) != 1:
        by_label = {"b": optax.scale(ratio), "other": optax.identity()}
        parts.append(optax.partition(by_label, rates))
    return freeze_base(optax.chain(*parts))


def trained(config: Any, method: ParamTransform) -> ParamTransform:
    """The method as a step differentiates it: without gradients of what the optimizer of an OptimizerConfig leaves."""
    return lora_optimizers.still_a(method) if OptimizerConfig.of(config).name == "lora_fa" else method


def _owners(spec: Mapping[str, Any], path: str) -> list[Traits]:
    """The traits of the part of a chain that has this path in its delta; for `@shared/...`, which does not tell it, of
    every part."""

    def owns(part: Spec) -> bool:
        if path.startswith("@"):
            return path.endswith(f"/{part.get('method')}")
        selected, excluded = (matches_any(part.get(key) or (), path) for key in ("select", "exclude"))
        return selected and not excluded

    parts = traits_of(spec)
    owning = [traits for part, traits in parts if owns(part)]
    return owning if len(parts) > 1 and owning else [traits for _, traits in parts]
