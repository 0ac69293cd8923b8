"""PEFT's LoKr, here and there: the factors are the same, so are the rules for their sizes. It adapts no Conv1D."""

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
from lora_jax.interop.peft.kind import Family, Leaves, alpha_of, parts, ranked, with_patterns
from lora_jax.interop.peft.modules import Meant, Model, Rules, rank_and_alpha
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


def _tensors(meant: Meant, fields: Mapping[str, Any], model: Model, source: str) -> list[list[Tensor]]:
    (method,), _ = _method(meant, fields, model)
    shapes = jax.eval_shape(method.init, jax.random.key(0), model.leaves)
    paths = {name: model.modules[name].path("weight") for name in meant.adapted}
    return [
        [Tensor(f"{name}.lokr_{factor}", tuple(x.shape), path, factor) for factor, x in shapes[path].items()]
        for name, path in paths.items()
    ]


def _method(meant: Meant, fields: Mapping[str, Any], model: Model) -> tuple[list[ParamTransform], Delta]:
    decompose = {name: fields[name] for name in _DECOMPOSE}
    return [lokr(**ranked(meant.adapted, model), **decompose)], Delta()


def _export(leaves: Leaves, spec: Mapping[str, Any], delta: Delta, model: Model, made: Delta) -> dict[str, Any]:
    found = [part for part in parts(spec) if part["method"] == "lokr"]
    if len({tuple(part[name] for name in _DECOMPOSE) for part in found}) > 1:
        raise ValueError(f"PEFT has one {' and one '.join(_DECOMPOSE)} for all, but parts of the chain differ in them")
    ranks = {
        path: look_up(part["rank"], path, "rank")
        for part in found
        for path in jax.eval_shape(from_spec(dict(part)).init, jax.random.key(0), model.leaves)
    }
    said = {}
    for name, adapted in leaves.adapted.items():
        ((path, leaf),) = adapted.items()
        made[path] = delta[path]
        said[name] = (ranks[path], alpha_of(np.float32(leaf.scale), ranks[path]))
    return with_patterns(said, "alpha") | {name: found[0][name] for name in _DECOMPOSE}


LOKR = Family(
    schema=Schema(_FIELDS, {}, _check),
    rules=Rules(
        name="LoKr",
        kinds=("Linear",),
        gpt2=("c_attn",),
        encoder=("query", "value"),
        says=lambda fields, model, name: rank_and_alpha(fields, name, "alpha"),
    ),
    tensors=_tensors,
    method=_method,
    leaves=(Kronecker,),
    export=_export,
)
