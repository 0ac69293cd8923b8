"""PEFT's IA3, here and there. A fused layer's outputs are those of its kernels, side by side; its input is theirs."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.peft.config import BOOL, COMMON, EXCLUDE, FAN_IN_FAN_OUT, NAMES, Field, Schema
from lora_jax.interop.peft.kind import Family, Leaves, globs_of, selected, targets
from lora_jax.interop.peft.modules import Meant, Model, Module, Rules
from lora_jax.interop.peft.tensors import Tensor
from lora_jax.methods.ia3 import Rescaled, ia3

_FEEDFORWARD = {"gpt2": ["mlp.c_proj"], "encoder": ["output.dense"]}  # PEFT's, where none are named
_FIELDS: dict[str, Field] = {
    **COMMON,
    **EXCLUDE,
    **FAN_IN_FAN_OUT,
    "feedforward_modules": Field(None, *NAMES),
    "init_ia3_weights": Field(True, *BOOL),
}


def _check(fields: Mapping[str, Any], source: str) -> None:
    some, of = fields["feedforward_modules"], fields["target_modules"]
    if isinstance(some, list) and isinstance(of, list) and (extra := sorted(set(some) - set(of))):
        raise ValueError(f"{source}: feedforward_modules has {extra[0]!r}, which is not in target_modules: {of}")


def _feeds(fields: Mapping[str, Any], model: Model, name: str) -> bool:
    """Whether l scales a module's input; by PEFT's rule, which knows no whole components of names."""
    said = fields["feedforward_modules"]
    if isinstance(said, str):
        return re.fullmatch(said, name) is not None
    said = _FEEDFORWARD["gpt2" if model.family == "gpt2" else "encoder"] if said is None else said
    return any(name.endswith(end) for end in said)


def _tensors(meant: Meant, fields: Mapping[str, Any], model: Model, source: str) -> list[list[Tensor]]:
    return [[_of(model.modules[name], feeds, model)] for name, feeds in meant.adapted.items()]


def _of(module: Module, feeds: bool, model: Model) -> Tensor:
    name, path, (rows, columns) = f"{module.name}.ia3_l", module.path("weight"), model.shape(module, "weight")
    if feeds:
        return Tensor(name, (1, rows), path, "l", row=True, alike="{" in path)
    key = f"@shared/{module.ours}" if module.bias else path
    return Tensor(name, (columns, 1), path, "l", key=key, row=True, turned=True)


def _method(meant: Meant, fields: Mapping[str, Any], model: Model) -> tuple[list[ParamTransform], Delta]:
    paths = {model.modules[name].path("weight"): feeds for name, feeds in meant.adapted.items()}
    feedforward = globs_of([path for path, feeds in paths.items() if feeds], model)
    return [ia3(selected(paths, model), feedforward=feedforward)], Delta()


def _export(leaves: Leaves, spec: Mapping[str, Any], delta: Delta, model: Model, made: Delta) -> dict[str, Any]:
    normal: set[str] = set()
    feeding: set[str] = set()
    for name, found in leaves.adapted.items():
        module, each = model.modules[name], _by_kernel(model.modules[name], found, model)
        feeds = any(w.inputs is not None for w in each.values())
        if feeds and len(each) < len(module.paths("weight")):
            raise ValueError(f"{next(iter(each))} is feedforward, but a part of {name}, whose parts have one input")
        (feeding if feeds else normal).add(name)
        for path, (key, _) in zip(module.paths("weight"), _of(module, feeds, model).places, strict=True):
            if path in each:
                made[key] = {"l": each[path].inputs if feeds else each[path].outputs}
            else:  # what is not adapted is scaled by 1
                made[key] = {"l": np.ones(model.leaves[path].shape[-1:], np.float32)}
    fed = targets(feeding, model)
    return {"target_modules": sorted({*targets(normal, model), *fed}), "feedforward_modules": fed}


def _by_kernel(module: Module, found: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The leaves that are kernels: their inputs are scaled, or their outputs and so their biases."""
    each = {path: found[path] for path in module.paths("weight") if path in found}
    biases = dict(zip(module.paths("weight"), module.paths("bias"), strict=True)) if module.bias else {}
    want = {biases[path] for path, w in each.items() if w.outputs is not None and path in biases} | set(each)
    kinds = {(w.inputs is None, w.outputs is None) for w in each.values()}
    if want != set(found) or kinds not in ({(True, False)}, {(False, True)}):
        raise ValueError(
            f"{', '.join(found)}: PEFT's IA3 scales the inputs of a layer, or its outputs, each with its bias"
        )
    return each


IA3 = Family(
    schema=Schema(_FIELDS, {}, _check),
    rules=Rules(
        name="IA3",
        kinds=("Linear", "Conv1D"),
        gpt2=("c_attn", "mlp.c_proj"),
        encoder=("key", "value", "output.dense"),
        says=_feeds,
    ),
    tensors=_tensors,
    method=_method,
    leaves=(Rescaled,),
    export=_export,
)
