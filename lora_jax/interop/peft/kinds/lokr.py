"""PEFT's LoKr: the factors are the same here, and so are the rules for their sizes. It adapts no Conv1D."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.core.selection import look_up
from lora_jax.core.transforms import Delta, ParamTransform, from_spec
from lora_jax.interop.peft.config import (
    BOOL,
    COMMON,
    EXCLUDE,
    LAYERS,
    NUMBER,
    PATTERNS,
    RANK,
    RATE,
    Field,
    Schema,
    is_int,
)
from lora_jax.interop.peft.kind import Adaptation, Kind, alpha_of, parts, ranked, with_patterns
from lora_jax.interop.peft.modules import Resolved, Rules, rank_and_alpha
from lora_jax.interop.peft.tensors import Tensor
from lora_jax.methods.lokr import Kronecker, lokr

_DECOMPOSE = ("decompose_both", "decompose_factor")
_FIELDS: dict[str, Field] = {
    **COMMON,
    **EXCLUDE,
    **LAYERS,
    **PATTERNS,
    "r": Field(8, *RANK),
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


def _tensors(resolved: Resolved) -> list[list[Tensor]]:
    (method,), _ = _method(resolved)
    shapes = jax.eval_shape(method.init, jax.random.key(0), resolved.model.leaves)
    paths = {name: resolved.model.modules[name].path("weight") for name in resolved.adapted}
    return [
        [Tensor(f"{name}.lokr_{factor}", tuple(x.shape), path, factor) for factor, x in shapes[path].items()]
        for name, path in paths.items()
    ]


def _method(resolved: Resolved) -> tuple[list[ParamTransform], Delta]:
    decompose = {name: resolved.fields[name] for name in _DECOMPOSE}
    return [lokr(**ranked(resolved.adapted, resolved.model), **decompose)], Delta()


def _export(adaptation: Adaptation) -> tuple[Delta, dict[str, Any]]:
    specs = [part for part in parts(adaptation.spec) if part["method"] == "lokr"]
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
    schema=Schema(_FIELDS, check=_check),
    rules=Rules("LoKr", ("Linear",), lambda fields, model, name: rank_and_alpha(fields, name, "alpha")),
    tensors=_tensors,
    method=_method,
    leaves=(Kronecker,),
    export=_export,
)
