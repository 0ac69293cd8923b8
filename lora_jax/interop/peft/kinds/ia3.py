"""PEFT's IA3. A fused layer's outputs are those of its kernels, side by side; its input is that of each kernel."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.hf.families import Module
from lora_jax.interop.peft.config import BOOL, COMMON, EXCLUDE, FAN_IN_FAN_OUT, NAMES, Field
from lora_jax.interop.peft.kind import Adaptation, Kind, Model, Resolved, Tensor
from lora_jax.methods.ia3 import Rescaled, ia3

_FIELDS: dict[str, Field] = {
    **COMMON,
    **EXCLUDE,
    **FAN_IN_FAN_OUT,
    "feedforward_modules": Field(None, *NAMES),
    "init_ia3_weights": Field(True, *BOOL),
}


def _check(fields: Mapping[str, Any], source: str) -> None:
    feedforward, names = fields["feedforward_modules"], fields["target_modules"]
    if isinstance(feedforward, list) and isinstance(names, list) and (extra := sorted(set(feedforward) - set(names))):
        raise ValueError(f"{source}: feedforward_modules has {extra[0]!r}, which is not in target_modules: {names}")


def _is_feedforward(fields: Mapping[str, Any], model: Model, name: str) -> bool:
    """Whether l scales a module's input. PEFT compares ends of names here, not whole components."""
    feedforward = fields["feedforward_modules"]
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, name) is not None
    return name.endswith(tuple(model.architecture.ia3_feedforward if feedforward is None else feedforward))


def _tensor(module: Module, feedforward: bool, model: Model) -> Tensor:
    name, path, (rows, columns) = f"{module.name}.ia3_l", module.path("weight"), model.shape(module, "weight")
    if feedforward:
        return Tensor(name, (1, rows), path, "l", leading_axis=True, replicated="{" in path)
    key = f"@shared/{module.subtree}" if module.bias else path
    return Tensor(name, (columns, 1), path, "l", key=key, leading_axis=True, transposed=True)


def _method(resolved: Resolved) -> tuple[list[ParamTransform], Delta]:
    model = resolved.model
    paths = {model.modules[name].path("weight"): feedforward for name, feedforward in resolved.adapted.items()}
    globs = model.globs(path for path, feedforward in paths.items() if feedforward)
    return [ia3(model.select(paths), feedforward=globs)], Delta()


def _export(adaptation: Adaptation) -> tuple[Delta, dict[str, Any]]:
    model, exported = adaptation.model, Delta()
    modules: dict[bool, set[str]] = {False: set(), True: set()}  # those that are not feedforward, and those that are
    for name, leaves in adaptation.adapted.items():
        module = model.modules[name]
        kernels = _kernels(module, leaves)
        feedforward = any(leaf.inputs is not None for leaf in kernels.values())
        if feedforward and len(kernels) < len(module.paths("weight")):
            raise ValueError(f"{next(iter(kernels))} is feedforward, but a part of {name}, whose parts have one input")
        modules[feedforward].add(name)
        for path, (key, _) in zip(module.paths("weight"), _tensor(module, feedforward, model).entries, strict=True):
            if path in kernels:
                exported[key] = {"l": kernels[path].inputs if feedforward else kernels[path].outputs}
            else:  # a part that is not adapted is scaled by 1
                exported[key] = {"l": np.ones(model.leaves[path].shape[-1:], np.float32)}
    inputs, outputs = model.targets(modules[True]), model.targets(modules[False])
    return exported, {"target_modules": sorted({*outputs, *inputs}), "feedforward_modules": inputs}


def _kernels(module: Module, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that are kernels: either their inputs are scaled, or their outputs and so their biases."""
    kernels = {path: leaves[path] for path in module.paths("weight") if path in leaves}
    biases = dict(zip(module.paths("weight"), module.paths("bias"), strict=True)) if module.bias else {}
    expected = {biases[path] for path, leaf in kernels.items() if leaf.outputs is not None and path in biases}
    scaled = {(leaf.inputs is not None, leaf.outputs is not None) for leaf in kernels.values()}
    if expected | set(kernels) != set(leaves) or scaled not in ({(True, False)}, {(False, True)}):
        what = "PEFT's IA3 scales the inputs of a layer, or its outputs, each with its bias"
        raise ValueError(f"{', '.join(leaves)}: {what}")
    return kernels


IA3 = Kind(
    "IA3",
    ("Linear", "Conv1D"),
    _FIELDS,
    lambda resolved, module, feedforward: [_tensor(module, feedforward, resolved.model)],
    _method,
    leaves=(Rescaled,),
    export=_export,
    check=_check,
    patterns=("feedforward_modules",),
    options_of=_is_feedforward,
    targets=lambda architecture: architecture.ia3_targets,
)
