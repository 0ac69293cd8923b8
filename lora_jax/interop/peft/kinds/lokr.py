"""PEFT's LoKr: the factors are the same here, and so are the rules for their sizes. It adapts no Conv1D."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.core.selection import look_up
from lora_jax.core.transforms import Delta, ParamTransform, from_spec
from lora_jax.interop.hf.families import Module
from lora_jax.interop.peft.config import (
    BOOL,
    NUMBER,
    RANKED,
    RATE,
    Field,
    alpha_of,
    is_int,
    rank_and_alpha,
    with_patterns,
)
from lora_jax.interop.peft.kind import Adaptation, Kind, Resolved, Tensor
from lora_jax.methods.lokr import Kronecker, lokr

_DECOMPOSE = ("decompose_both", "decompose_factor")
_FIELDS: dict[str, Field] = {
    **RANKED,
    "alpha": Field(8, *NUMBER),
    "decompose_both": Field(False, *BOOL),
    "decompose_factor": Field(-1, lambda value: is_int(value) and (value == -1 or value >= 1), "-1 or at least 1"),
    "rank_dropout": Field(0.0, *RATE),
    "module_dropout": Field(0.0, *RATE),
    "rank_dropout_scale": Field(False, *BOOL),
    "use_effective_conv2d": Field(False, *BOOL),  # of convolutions, which these models do not have
    "init_weights": Field(True, lambda value: isinstance(value, bool) or value == "lycoris", 'a boolean or "lycoris"'),
}


def _check(fields: Mapping[str, Any], source: str) -> None:
    for name in ("rank_dropout", "module_dropout"):
        if fields[name]:
            logging.warning("%s: LoKr has no dropout here; its %s acts in PEFT's training only", source, name)


def _tensors(resolved: Resolved, module: Module, options: tuple[int, float]) -> list[Tensor]:
    path, method = module.path("weight"), _lokr(resolved, {module.name: options})
    shapes = jax.eval_shape(method.init, jax.random.key(0), {path: resolved.model.leaves[path]})[path]
    return [Tensor(f"{module.name}.lokr_{factor}", tuple(x.shape), path, factor) for factor, x in shapes.items()]


def _method(resolved: Resolved) -> tuple[list[ParamTransform], Delta]:
    return [_lokr(resolved, resolved.adapted)], Delta()


def _lokr(resolved: Resolved, options: Mapping[str, tuple[int, float]]) -> ParamTransform:
    return lokr(**resolved.model.ranked(options), **{name: resolved.fields[name] for name in _DECOMPOSE})


def _export(adaptation: Adaptation) -> tuple[Delta, dict[str, Any]]:
    specs = adaptation.specs("lokr")
    if len({tuple(part[name] for name in _DECOMPOSE) for part in specs}) > 1:
        raise ValueError(f"PEFT has one {' and one '.join(_DECOMPOSE)} for all, but parts of the chain differ in them")
    ranks = {
        path: look_up(part["rank"], path, "rank")
        for part in specs
        for path in jax.eval_shape(from_spec(dict(part)).init, jax.random.key(0), adaptation.model.leaves)
    }
    exported, options = Delta(), {}
    for name, leaves in adaptation.adapted.items():
        ((path, leaf),) = leaves.items()
        exported[path] = adaptation.delta[path]
        options[name] = (ranks[path], alpha_of(np.float32(leaf.scale), ranks[path]))
    return exported, with_patterns(options, "alpha") | {name: specs[0][name] for name in _DECOMPOSE}


LOKR = Kind(
    "LoKr",
    ("Linear",),
    _FIELDS,
    _tensors,
    _method,
    leaves=(Kronecker,),
    export=_export,
    check=_check,
    options_of=lambda fields, model, name: rank_and_alpha(fields, name, "alpha"),
)
