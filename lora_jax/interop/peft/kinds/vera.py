"""PEFT's VeRA. Its two projections must be in the file, although PEFT can also draw them again by torch's generator."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.hf.families import Module
from lora_jax.interop.peft.config import BOOL, COMMON, FAN_IN_FAN_OUT, LAYERS, NUMBER, RANK, RATE, Field, is_int
from lora_jax.interop.peft.kind import Adaptation, Kind, Resolved, Tensor
from lora_jax.methods.vera import Vera, vera

_PROJECTIONS = "@shared/vera"
_FIELDS: dict[str, Field] = {
    **COMMON,
    **LAYERS,
    **FAN_IN_FAN_OUT,
    "r": Field(256, *RANK),
    "d_initial": Field(0.1, *NUMBER),
    "save_projection": Field(True, *BOOL),
    "projection_prng_key": Field(0, is_int, "a whole number"),
    "vera_dropout": Field(0.0, *RATE),
    "bias": Field("none", lambda value: value in ("none", "all", "vera_only"), '"none", "all" or "vera_only"'),
    "init_weights": Field(True, *BOOL),
}


def _check(fields: Mapping[str, Any], source: str) -> None:
    if not fields["save_projection"]:
        raise ValueError(
            f"{source}: save_projection=False: its A and B are in no file, but drawn by torch's generator on loading; "
            "PEFT's merge_and_unload() makes a plain model of it, which hf.load reads"
        )
    if fields["vera_dropout"]:
        logging.warning("%s: VeRA has no dropout here; its vera_dropout acts in PEFT's training only", source)


def _tensors(resolved: Resolved, module: Module, options: None) -> list[Tensor]:
    rank, path = resolved.fields["r"], module.path("weight")
    tensors, shape_of = [], resolved.model.shape
    if module.name == next(iter(resolved.adapted)):  # with the first module, what all have in common
        shapes = [shape_of(resolved.model.modules[name], "weight") for name in resolved.adapted]
        rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
        tensors = [
            Tensor("base_model.vera_A", (rank, rows), _PROJECTIONS, "fixed_a"),
            Tensor("base_model.vera_B", (columns, rank), _PROJECTIONS, "fixed_b"),
        ]
    return [
        *tensors,
        Tensor(f"{module.name}.vera_lambda_b", shape_of(module, "weight")[1:], path, "b"),
        Tensor(f"{module.name}.vera_lambda_d", (rank,), path, "d", key=module.shared),
    ]


def _method(resolved: Resolved) -> tuple[list[ParamTransform], Delta]:
    fields, model = resolved.fields, resolved.model
    modules = [model.modules[name] for name in resolved.adapted]
    fused = model.globs(module.path("weight") for module in modules if module.shared)
    selection = model.select(module.path("weight") for module in modules)
    return [vera(selection, rank=fields["r"], d_initial=fields["d_initial"], fused=fused)], Delta()


def _export(adaptation: Adaptation) -> tuple[Delta, dict[str, Any]]:
    model, delta = adaptation.model, adaptation.delta
    exported = Delta({_PROJECTIONS: delta[_PROJECTIONS]})
    for name, leaves in adaptation.adapted.items():
        module = model.modules[name]
        if shared := module.shared:
            rows = [np.asarray(leaves[path].fixed_b).T for path in module.paths("weight") if path in leaves]
            expected = np.asarray(delta[_PROJECTIONS]["fixed_b"])[: model.shape(module, "weight")[1]]
            if shared not in delta or not np.array_equal(np.concatenate(rows), expected):
                glob = module.path("weight").replace(module.subtree.split("/")[0], "**")
                raise ValueError(f"{next(iter(leaves))}: PEFT has one d for {name}: make it with fused={glob!r}")
            exported[shared] = {"d": delta[shared]["d"]}
        for path, leaf in leaves.items():
            exported[path] = {"b": leaf.b} if shared else {"b": leaf.b, "d": leaf.d}
    (spec,) = adaptation.specs("vera")
    return exported, {"r": spec["rank"], "d_initial": spec["d_initial"]}


VERA = Kind("VeRA", ("Linear", "Conv1D"), _FIELDS, _tensors, _method, leaves=(Vera,), export=_export, check=_check)
