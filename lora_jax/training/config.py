"""What training reads of a config: keys, types, defaults and meaning, for every entry point."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict, config_dict

from lora_jax.methods.ranges import COUNT, PROBABILITY, SHARE, Range

# The names of before 2026-11-30, which configs, command lines and config.json may still have.
RENAMED = {
    "keep": "max_to_keep",
    "optimizer.final_share": "optimizer.end_lr_ratio",
    "optimizer.warmup_share": "optimizer.warmup_ratio",
    "optimizer.b_ratio": "optimizer.loraplus_lr_ratio",
}

# What ("matrices",) of `OptimizerConfig.decay` was called in config.json then.
OLD_MATRICES = [
    "**/{kernel,embedding}/{value,a,b,w1,w1_a,w1_b,w2,w2_a,w2_b,rows}",
    "@shared/**/a",
    "@*/*/{down,up,down_left,down_right,up_left,up_right,values}",
]

# What `prefix_embedding.select` was by default then; now [], the model's token embedding.
OLD_TOKEN_EMBEDDING = ["**/{wte,word}/embedding"]

OPTIMIZERS = ("adamw", "riemannian", "lora_rite", "lora_fa", "lora_muon")
SCHEDULES = ("constant", "cosine", "linear")
_FROM_0, _ABOVE_0 = Range(least=0), Range(above=0)
_STEPS = Range(least=0, whole=True, optional=True)
SEED = Range(least=0, below=2**63, whole=True)


def _check_numbers(config: Any, prefix: str = "") -> None:
    """Makes the numbers of a config's fields Python's; a ValueError names all those out of their range."""
    problems = []
    for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
        for numbers in (x for x in typing.get_args(kind) if isinstance(x, Range)):
            try:
                object.__setattr__(config, name, numbers(prefix + name, getattr(config, name)))
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The settings of an optimizer and its schedule, for `lora_jax.training.optimizer`.

    >>> config = OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.06)
    >>> config.schedule, config.weight_decay
    ('linear', 0.01)
    """

    learning_rate: Annotated[float, _FROM_0] = 2e-4  # the peak
    # "adamw", or one made for LoRA (`lora_jax.training.lora_optimizers`): "riemannian", "lora_rite", "lora_fa" or
    # "lora_muon"; what is no A or B then takes AdamW
    name: str = "adamw"
    schedule: str = "linear"  # after the warm-up: "linear" or "cosine" down to `end_lr_ratio`, or "constant"
    # steps of linear warm-up from 0; None: `warmup_ratio` of all steps, rounded up
    warmup_steps: Annotated[int | None, _STEPS] = None
    warmup_ratio: Annotated[float, SHARE] = 0.0
    end_lr_ratio: Annotated[float, SHARE] = 0.0  # the rate at the last step, over the peak
    b1: Annotated[float, PROBABILITY] = 0.9
    b2: Annotated[float, PROBABILITY] = 0.999
    eps: Annotated[float, _ABOVE_0] = 1e-8
    weight_decay: Annotated[float, _FROM_0] = 0.01  # decoupled, times the rate
    # Globs of the delta's `path` or `path/factor` that decay; "matrices": what the method's traits name. The default,
    # all that trains, is the authors'.
    decay: tuple[str, ...] = ("**",)
    # the largest global norm of the gradient, of lora_rite of the unmagnified one; None: no clipping
    clip_norm: Annotated[float | None, Range(above=0, optional=True)] = None
    # The rate, and with it the decay, of LoRA's B, or what the method's traits name instead, over that of the other
    # factors (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    loraplus_lr_ratio: Annotated[float, _ABOVE_0] = 1.0
    damping: Annotated[float, _ABOVE_0] = 1e-6  # of riemannian and lora_fa: delta, added to B B^T and A^T A

    def __post_init__(self) -> None:
        _check_numbers(self, "optimizer.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule is {self.schedule!r}, not one of {list(SCHEDULES)}")
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name is {self.name!r}, not one of {list(OPTIMIZERS)}")
        if self.loraplus_lr_ratio != 1 and self.name in ("lora_fa", "lora_muon"):
            why = "whose A does not train" if self.name == "lora_fa" else "which has one step for A and B together"
            ratio = f"optimizer.loraplus_lr_ratio={self.loraplus_lr_ratio}"
            raise ValueError(f"{ratio} does not go with optimizer.name={self.name!r}, {why}: leave it at 1")

    @classmethod
    def of(cls, config: Any) -> "OptimizerConfig":
        """The `optimizer` of a config, which may have old names; an unknown key is a ValueError."""
        if isinstance(config, cls):
            return config
        values = with_new_names({"optimizer": config})["optimizer"]
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"optimizer has no key {unknown[0]!r}: it has {', '.join(names)}")
        return cls(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training run, except its method and its data.

    >>> TrainConfig.of({"epochs": 3, "optimizer": {"learning_rate": 1e-3}}).optimizer.learning_rate
    0.001
    """

    seed: Annotated[int, SEED] = 0  # of the delta's start, of dropout and of the order of the data
    epochs: Annotated[int, COUNT] = 1  # how often each example comes
    # the length of the run, instead of `epochs`; the rate decays until then
    steps: Annotated[int | None, Range(least=1, whole=True, optional=True)] = None
    accumulate: Annotated[int, COUNT] = 1  # micro-batches that a batch is split into
    label_smoothing: Annotated[float, PROBABILITY] = 0.0  # of a language model's loss in training
    metrics: tuple[str, ...] = ()  # of `register_metric`: metrics of validation besides those of the objective
    best: str | None = None  # the validation metric whose highest value's delta is kept in adapter/; None: the last
    log_every: Annotated[int, COUNT] = 100  # steps between two entries of the training loss
    eval_every: Annotated[int | None, _STEPS] = None  # steps between validations, besides epochs' ends
    save_every: Annotated[int | None, _STEPS] = 1000  # steps between checkpoints, besides epochs' ends
    max_to_keep: Annotated[int, COUNT] = 3  # checkpoints, the newest ones
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        _check_numbers(self)

    @classmethod
    def of(cls, config: Any) -> "TrainConfig":
        """What training reads of a config, a ConfigDict or mapping that may have old names and other keys besides."""
        if isinstance(config, cls):
            return config
        values = with_new_names(config)
        names = {field.name for field in dataclasses.fields(cls)} & set(values)
        read = {name: values[name] for name in names} | {"optimizer": OptimizerConfig.of(values.get("optimizer", {}))}
        return cls(**read)


def as_config_dict(config: Any) -> ConfigDict:
    """A dataclass as a ConfigDict, whose keys keep their types."""
    result = ConfigDict()
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(kind, types.UnionType):  # may be None
            result[name] = config_dict.placeholder(typing.get_args(kind)[0])
        result[name] = as_config_dict(value) if dataclasses.is_dataclass(value) else value
    return result


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
