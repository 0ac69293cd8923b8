"""PEFT's VeRA, here and there: the two projections are in the file, or it is refused.

PEFT can leave them out and draw them anew on loading, with torch's generator.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.peft.config import BOOL, COMMON, FAN_IN_FAN_OUT, LAYERS, NUMBER, RANK, RATE, Field, Schema, is_int
from lora_jax.interop.peft.kind import Family, Leaves, globs_of, parts, selected
from lora_jax.interop.peft.modules import Meant, Model, Module, Rules
from lora_jax.interop.peft.tensors import Tensor
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


def _tensors(meant: Meant, fields: Mapping[str, Any], model: Model, source: str) -> list[list[Tensor]]:
    rank, modules = fields["r"], [model.modules[name] for name in meant.adapted]
    rows, columns = (max(sizes) for sizes in zip(*(model.shape(m, "weight") for m in modules), strict=True))
    projections = [
        Tensor("base_model.vera_A", (rank, rows), _PROJECTIONS, "fixed_a"),
        Tensor("base_model.vera_B", (columns, rank), _PROJECTIONS, "fixed_b"),
    ]
    return [projections] + [
        [
            Tensor(f"{m.name}.vera_lambda_b", model.shape(m, "weight")[1:], m.path("weight"), "b"),
            Tensor(f"{m.name}.vera_lambda_d", (rank,), m.path("weight"), "d", key=_owner(m)),
        ]
        for m in modules
    ]


def _owner(module: Module) -> str:
    """Where the d of a fused layer is in the delta: `@shared/h_0/attn`; "" for other layers."""
    return f"@shared/{module.ours.rsplit('/', 1)[0]}" if "{" in module.ours else ""


def _method(meant: Meant, fields: Mapping[str, Any], model: Model) -> tuple[list[ParamTransform], Delta]:
    paths = [model.modules[name].path("weight") for name in meant.adapted]
    fused = globs_of([path for path in paths if "{" in path], model)
    return [vera(selected(paths, model), rank=fields["r"], d_initial=fields["d_initial"], fused=fused)], Delta()


def _export(leaves: Leaves, spec: Mapping[str, Any], delta: Delta, model: Model, made: Delta) -> dict[str, Any]:
    made[_PROJECTIONS] = delta[_PROJECTIONS]
    for name, found in leaves.adapted.items():
        module = model.modules[name]
        if owner := _owner(module):
            rows = [np.asarray(found[path].fixed_b).T for path in module.paths("weight") if path in found]
            whole = np.asarray(delta[_PROJECTIONS]["fixed_b"])[: model.shape(module, "weight")[1]]
            if owner not in delta or not np.array_equal(np.concatenate(rows), whole):
                glob = module.path("weight").replace(module.ours.split("/")[0], "**")
                raise ValueError(f"{next(iter(found))}: PEFT has one d for {name}: make it with fused={glob!r}")
            made[owner] = {"d": delta[owner]["d"]}
        for path, leaf in found.items():
            made[path] = {"b": leaf.b} if owner else {"b": leaf.b, "d": leaf.d}
    (said,) = (part for part in parts(spec) if part["method"] == "vera")
    return {"r": said["rank"], "d_initial": said["d_initial"]}


VERA = Family(
    schema=Schema(_FIELDS, {}, _check),
    rules=Rules(
        name="VeRA",
        kinds=("Linear", "Conv1D"),
        gpt2=("c_attn",),
        encoder=("query", "value"),
        says=lambda fields, model, name: None,
    ),
    tensors=_tensors,
    method=_method,
    leaves=(Vera,),
    export=_export,
)
