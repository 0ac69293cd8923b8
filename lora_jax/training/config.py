"""What training reads of a config: keys, types, defaults and meaning, for every entry point."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

# The names of before 2026-11-30, which configs, command lines and config.json may still have.
RENAMED = {
    "keep": "max_to_keep",
    "optimizer.final_share": "optimizer.end_lr_ratio",
    "optimizer.warmup_share": "optimizer.warmup_ratio",
    "optimizer.b_ratio": "optimizer.loraplus_lr_ratio",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW under a schedule.

    Attributes:
      learning_rate: the peak.
      schedule: after the warm-up: "linear" or "cosine" down to `end_lr_ratio`, or "constant".
      warmup_steps: steps of linear warm-up from 0; None: `warmup_ratio` of all steps, rounded up.
      warmup_ratio: the share of all steps that warms up, where `warmup_steps` is None.
      end_lr_ratio: the rate at the last step, over the peak.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, times the rate.
      decay: globs of the delta's `path` or `path/factor` that decay; "matrices": what the method's traits name. The
        default, all that trains, is the authors'.
      clip_norm: the largest global norm of the gradient; None: no clipping.
      loraplus_lr_ratio: the rate, and with it the decay, of LoRA's B, or what the method's traits name instead, over
        that of the other factors (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    """

    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.0
    end_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: tuple[str, ...] = ("**",)
    clip_norm: float | None = None
    loraplus_lr_ratio: float = 1.0

    @classmethod
    def of(cls, config: Any) -> "OptimizerConfig":
        """The `optimizer` of a config, which may have old names; a key that there is not is a ValueError."""
        if isinstance(config, cls):
            return config
        values = with_new_names({"optimizer": config})["optimizer"]
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"optimizer has no key {unknown[0]!r}: it has {', '.join(names)}")
        return cls(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run, besides what trains and on what.

    Attributes:
      seed: of the delta's start, of dropout and of the order of the data.
      epochs: how often each example comes.
      steps: the length of the run, instead of `epochs`; the rate decays until then.
      accumulate: micro-batches that a batch is split into.
      label_smoothing: of a language model's loss in training.
      metrics: names of `register_metric`: metrics of validation besides those of the objective.
      best: the validation metric whose highest value's delta is kept in adapter/; None or "": the last delta.
      log_every: steps between two entries of the training loss.
      eval_every: steps between two validations, besides each epoch's end.
      save_every: steps between two checkpoints, besides each epoch's end.
      max_to_keep: checkpoints, the newest ones.
      optimizer: AdamW and its schedule.
    """

    seed: int = 0
    epochs: int = 1
    steps: int | None = None
    accumulate: int = 1
    label_smoothing: float = 0.0
    metrics: tuple[str, ...] = ()
    best: str | None = None
    log_every: int = 100
    eval_every: int | None = None
    save_every: int | None = 1000
    max_to_keep: int = 3
    optimizer: OptimizerConfig = OptimizerConfig()

    @classmethod
    def of(cls, config: Any) -> "TrainConfig":
        """What training reads of a config (a ConfigDict or mapping), which may have old names, and keys besides that
        others read."""
        if isinstance(config, cls):
            return config
        values = with_new_names(config)
        names = {field.name for field in dataclasses.fields(cls)} & set(values)
        read = {name: values[name] for name in names} | {"optimizer": OptimizerConfig.of(values.get("optimizer", {}))}
        return cls(**read)


def as_config_dict(config: Any) -> ConfigDict:
    """A dataclass as a ConfigDict, whose keys keep their types."""
    made, hints = ConfigDict(), typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), hints[field.name]
        if isinstance(kind, types.UnionType):  # may be None
            made[field.name] = config_dict.placeholder(typing.get_args(kind)[0])
        made[field.name] = as_config_dict(value) if dataclasses.is_dataclass(value) else value
    return made


def as_json(config: Any) -> dict[str, Any]:
    """What config.json holds of a config, a ConfigDict or a TrainConfig: JSON with new names only."""
    text = json.dumps(dataclasses.asdict(config)) if isinstance(config, TrainConfig) else config.to_json()
    return with_new_names(json.loads(text))


def with_new_names(config: Any) -> dict[str, Any]:
    """A config as a dict of new names; an old one counts more than its new one, which may be there by default."""
    values = dict(config.items())
    if isinstance(values.get("optimizer"), Mapping | ConfigDict):
        values["optimizer"] = dict(values["optimizer"].items())
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        part = values.get(group) if group else values
        if isinstance(part, dict) and name in part:
            part[new.rpartition(".")[2]] = part.pop(name)
    return values
