"""PEFT's LoRA, with the variants that its config names: rsLoRA, DoRA, PiSSA and trained shifts of biases.

GPT-2's query, key and value kernels are one layer in PEFT. Kernels with an A each become that layer with the A's side
by side and a B that is zero off its diagonal blocks (the rank is the sum; the same function, though PEFT trains the
zeros too).

A PiSSA file applies to the original weight: PEFT's loader computes its singular values again and subtracts the largest,
and so does this one, into `fixed_a` and `fixed_b`. PEFT decomposes a fused layer as one: its kernels have the same A.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.arrays import Adapted, LowRank
from lora_jax.core.selection import select
from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.hf.architectures import Module
from lora_jax.interop.peft.config import (
    BOOL,
    COMMON,
    EXCLUDE,
    FAN_IN_FAN_OUT,
    LAYERS,
    NUMBER,
    OBJECT,
    PATTERNS,
    RANK,
    RATE,
    TEXT,
    Field,
    Schema,
    dict_of,
    is_int,
    list_of,
    or_null,
)
from lora_jax.interop.peft.kind import (
    Adaptation,
    Kind,
    alpha_of,
    by_glob,
    globs_of,
    parts,
    ranked,
    selected,
    with_patterns,
)
from lora_jax.interop.peft.modules import Model, Resolved, Rules, rank_and_alpha
from lora_jax.interop.peft.tensors import Tensor
from lora_jax.methods.bias_delta import BiasDelta, bias_delta
from lora_jax.methods.dora import Dora, dora
from lora_jax.methods.lora import lora
from lora_jax.methods.pissa import Pissa, pissa

Options = Mapping[str, tuple[int, float]]  # (rank, alpha) of each adapted module

_INITS = ("gaussian", "eva", "orthogonal", "mica")  # these do not change the base
_CHANGES_BASE = re.compile(r"(pissa|olora|loftq|corda|lora_ga)", re.IGNORECASE)
_IDS = list_of(lambda value: is_int(value) and value >= 0)
_FIELDS: dict[str, Field] = {
    **COMMON,
    **EXCLUDE,
    **LAYERS,
    **PATTERNS,
    **FAN_IN_FAN_OUT,
    "r": Field(8, *RANK),
    "lora_alpha": Field(8, *NUMBER),
    "lora_dropout": Field(0.0, *RATE),
    "use_rslora": Field(False, *BOOL),
    "use_dora": Field(False, *BOOL),
    "trainable_token_indices": Field(None, or_null(_IDS, dict_of(_IDS)), "ids, an object of ids or null"),
    "bias": Field("none", lambda value: value in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "lora_bias": Field(False, *BOOL),
    "init_lora_weights": Field(True, lambda value: isinstance(value, bool | str), "true, false or a name"),
    # These do not change the function.
    "megatron_core": Field("megatron.core", *TEXT),
    "loftq_config": Field({}, *OBJECT),
    "eva_config": Field(None, *OBJECT),
    "corda_config": Field(None, *OBJECT),
}
_REFUSED: dict[str, Any] = {
    "use_qalora": False,
    "qalora_group_size": 16,
    "use_bdlora": None,
    "ensure_weight_tying": False,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "lora_ga_config": None,
    "megatron_config": None,
}


def _check(fields: Mapping[str, Any], source: str) -> None:
    init, alphas = fields["init_lora_weights"], [fields["lora_alpha"], *fields["alpha_pattern"].values()]
    if init == "pissa":
        if fields["use_dora"]:
            raise ValueError(
                f"{source}: use_dora with init_lora_weights='pissa' is DoRA of a changed base: unsupported"
            )
        if min(alphas) <= 0:
            raise ValueError(f"{source}: PiSSA divides by alpha / r, but an alpha is {min(alphas)}")
        if fields["lora_dropout"]:
            logging.warning("%s: PiSSA has no dropout here; its lora_dropout acts in PEFT's training only", source)
    elif isinstance(init, str) and _CHANGES_BASE.match(init):
        raise ValueError(
            f"{source}: init_lora_weights={init!r} changes the base's weights on loading, which is not supported; in "
            "PEFT, save_pretrained(folder, path_initial_model_for_weight_conversion=...) makes a plain adapter of it"
        )
    elif isinstance(init, str) and init.lower() not in _INITS:
        raise ValueError(f"{source}: init_lora_weights={init!r} is none of true, false, pissa, {', '.join(_INITS)}")
    if fields["lora_bias"] and not isinstance(init, bool):
        raise ValueError(f"{source}: lora_bias goes with init_lora_weights true or false only")
    if fields["use_dora"] and max(map(abs, alphas)) > 1e15:
        raise ValueError(f"{source}: an alpha is {max(alphas, key=abs)}: float32 does not hold the norms of DoRA")
    if fields["lora_bias"] and fields["use_dora"]:
        raise ValueError(f"{source}: lora_bias does not go with use_dora")
    if fields["lora_bias"] and fields["bias"] != "none":
        raise ValueError(
            f"{source}: lora_bias with bias={fields['bias']!r} trains two arrays for one bias: unsupported"
        )


def _tensors(resolved: Resolved) -> list[list[Tensor]]:
    return [_tensors_of(resolved, name, rank) for name, (rank, _) in resolved.adapted.items()]


def _tensors_of(resolved: Resolved, name: str, rank: int) -> list[Tensor]:
    module = resolved.model.modules[name]
    path, (rows, columns) = module.path("weight"), resolved.model.shape(module, "weight")
    suffixes = ("embedding_A", "embedding_B") if module.torch_class == "Embedding" else ("A.weight", "B.weight")
    pissa = _is_pissa(resolved, name)
    key = _shared(path) if "{" in path and not pissa else ""
    tensors = [
        Tensor(f"{name}.lora_{suffixes[0]}", (rank, rows), path, "a", transposed=True, key=key, replicated=pissa),
        Tensor(f"{name}.lora_{suffixes[1]}", (columns, rank), path, "b", transposed=True),
    ]
    if resolved.fields["use_dora"]:
        tensors.append(Tensor(f"{name}.lora_magnitude_vector", (columns,), path, "m"))
    if resolved.fields["lora_bias"]:
        if not module.bias:
            raise ValueError(f"{resolved.source}: lora_bias=true, but {name} has no bias that could take it")
        tensors.append(Tensor(f"{name}.lora_B.bias", (columns,), module.path("bias"), "shift"))
    return tensors


def _is_pissa(resolved: Resolved, name: str) -> bool:
    """Whether PEFT subtracts singular values from a module's weight; from an embedding's it does not."""
    torch_class = resolved.model.modules[name].torch_class
    return resolved.fields["init_lora_weights"] == "pissa" and torch_class != "Embedding"


def _shared(path: str) -> str:
    """The delta's key of the A of a fused layer: `@shared/h_0/attn` for `h_0/attn/{query,key}/kernel`, as in `lora`."""
    return "@shared/" + path.rsplit("/", 2)[0]


# --- to a method --------------------------------------------------------------------------------------------------


def _method(resolved: Resolved) -> tuple[list[ParamTransform], Delta]:
    fields, model, adapted = resolved.fields, resolved.model, resolved.adapted
    of_pissa = {name: options for name, options in adapted.items() if _is_pissa(resolved, name)}
    of_lora = {name: options for name, options in adapted.items() if name not in of_pissa}
    transforms, from_base = [], Delta()
    for options, make in ((of_pissa, _pissa), (of_lora, _lora)):
        if options:
            transform, factors = make(options, fields, model)
            transforms.append(transform)
            from_base |= factors
    if fields["lora_bias"]:
        scales = {}
        for name, (rank, alpha) in adapted.items():
            scales[model.modules[name].path("bias")] = alpha / (rank**0.5 if fields["use_rslora"] else rank)
        transforms.append(bias_delta(selected(scales, model), scale=by_glob(scales, model)))
    return transforms, from_base


def _scale_rule(fields: Mapping[str, Any]) -> str:
    return "alpha/sqrt(r)" if fields["use_rslora"] else "alpha/r"


def _lora(options: Options, fields: Mapping[str, Any], model: Model) -> tuple[ParamTransform, Delta]:
    strict = True
    for name, (rank, _) in options.items():
        if rank > (full_rank := min(model.shape(model.modules[name], "weight"))):
            strict = False
            logging.warning("the adapter of %s has rank %d, more than min(in, out) = %d", name, rank, full_rank)
    fused = [path for name in options if "{" in (path := model.modules[name].path("weight"))]
    transform = (dora if fields["use_dora"] else lora)(
        **ranked(options, model),
        scale_rule=_scale_rule(fields),
        dropout=float(fields["lora_dropout"]),
        shared=globs_of(fused, model),
        strict=strict,
    )
    if not fields["use_dora"]:
        return transform, Delta()
    initial = transform.init(jax.random.key(0), model.leaves)
    return transform, Delta({path: {"fixed_norm": f["fixed_norm"]} for path, f in initial.items() if "fixed_norm" in f})


def _pissa(options: Options, fields: Mapping[str, Any], model: Model) -> tuple[ParamTransform, Delta]:
    from_base = Delta()
    for name, (rank, alpha) in options.items():
        paths = model.modules[name].paths("weight")
        weight = jnp.concatenate([jnp.asarray(model.leaves[path]) for path in paths], -1)
        of_weight = pissa(select("*", axes="io"), rank=rank, alpha=alpha, scale_rule=_scale_rule(fields))
        initial = of_weight.init(jax.random.key(0), {name: weight})[name]
        for path, b in zip(paths, jnp.split(initial["fixed_b"], len(paths), -1), strict=True):
            from_base[path] = {"fixed_a": jnp.array(initial["fixed_a"], copy=True), "fixed_b": b}
    return pissa(**ranked(options, model), scale_rule=_scale_rule(fields)), from_base


# --- from a method ------------------------------------------------------------------------------------------------


def _export(adaptation: Adaptation) -> tuple[Delta, dict[str, Any]]:
    model, exported, options = adaptation.model, Delta(), {}
    classes = {type(leaf) for leaves in adaptation.adapted.values() for leaf in leaves.values()}
    if Dora in classes and (adaptation.shift or len(classes) > 1):
        other = "shifts of biases" if adaptation.shift else "LoRA"
        raise ValueError(f"DoRA is beside {other} here; PEFT has use_dora for all that an adapter adapts, or for none")
    rules = {part["scale_rule"] for part in parts(adaptation.spec) if "scale_rule" in part}
    rslora = rules == {"alpha/sqrt(r)"}
    for name, leaves in adaptation.adapted.items():
        module = model.modules[name]
        factors = {path: _as_lora(leaf) for path, leaf in leaves.items()}
        rank, scale = _export_factors(module, factors, adaptation.delta, exported)
        options[name] = (rank, alpha_of(scale, math.sqrt(rank) if rslora else rank))
        if adaptation.shift:
            _export_shift(module, adaptation.shift.get(name, {}), scale, model, exported)
        for path in module.paths("weight") if Dora in classes else ():
            # a part that is not adapted keeps the norm that it has
            weight = np.asarray(model.leaves[path], np.float32)
            exported[path]["m"] = leaves[path].m if path in leaves else np.linalg.norm(weight, axis=0)
    if alone := [path for name, biases in adaptation.shift.items() if name not in options for path in biases]:
        raise ValueError(f"{alone[0]} is shifted, but not adapted: PEFT's lora_bias is part of LoRA")
    return exported, with_patterns(options, "lora_alpha") | {
        "lora_dropout": _dropout(adaptation),
        "use_rslora": rslora,
        "use_dora": Dora in classes,
        "lora_bias": bool(adaptation.shift),
    }


def _as_lora(leaf: Adapted) -> Any:
    """A leaf with A, B and scale. PiSSA becomes LoRA as in PEFT: A beside A0, B over -B0."""
    if not isinstance(leaf, Pissa):
        return leaf
    a = jnp.concatenate([leaf.a, leaf.fixed_a], -1)
    b = jnp.concatenate([leaf.b, -leaf.fixed_b])
    return LowRank(base=leaf.base, a=a, b=b, scale=leaf.scale, core=leaf.core, path=leaf.path)


def _export_factors(module: Module, leaves: Mapping[str, Any], delta: Delta, exported: Delta) -> tuple[int, np.float32]:
    """Puts a module's A and B into `exported`, and returns its rank and scale."""
    paths = module.paths("weight")
    scales = {path: np.float32(leaf.scale) for path, leaf in leaves.items()}
    if len(paths) == 1:
        (path,) = paths
        exported[path] = {"a": leaves[path].a, "b": leaves[path].b}
        return leaves[path].a.shape[-1], scales[path]
    shared = _shared(paths[0])
    key_of = {path: path if "a" in delta.get(path, {}) else shared for path in leaves}  # of the A of each path
    blocks = {key_of[path]: np.asarray(leaf.a) for path, leaf in leaves.items()}
    starts = dict(zip(blocks, np.cumsum([0, *(a.shape[-1] for a in blocks.values())]), strict=False))
    exported[shared] = {"a": np.concatenate(list(blocks.values()), axis=-1)}
    rank = exported[shared]["a"].shape[-1]
    scales_differ = len(set(scales.values())) > 1  # then B is scaled, and the module's scale is 1
    like = np.asarray(next(iter(leaves.values())).b)
    for path in paths:
        b = np.zeros((rank, like.shape[-1]), np.float32 if scales_differ else like.dtype)
        if path in leaves:
            block, start = np.asarray(leaves[path].b), starts[key_of[path]]
            b[start : start + len(block)] = block.astype(b.dtype) * scales[path] if scales_differ else block
        exported[path] = {"b": b}
    return rank, np.float32(1) if scales_differ else next(iter(scales.values()))


def _export_shift(
    module: Module, biases: Mapping[str, BiasDelta], scale: np.float32, model: Model, exported: Delta
) -> None:
    """Puts the shift of a module's bias into `exported`, in units of its scale; zeros where it has none."""
    if not module.bias:
        raise ValueError(f"{module.path('weight')} has no bias: PEFT's lora_bias shifts those of all adapted modules")
    for path in module.paths("bias"):
        shift = np.zeros(model.leaves[path].shape, np.float32)
        if path in biases:
            shift, bias_scale = np.asarray(biases[path].shift), np.float32(np.asarray(biases[path].scale).flat[0])
            if bias_scale != scale:
                if scale == 0:
                    message = f"is shifted by a scale of {bias_scale}, but its kernel's is 0: PEFT has one for both"
                    raise ValueError(f"{path} {message}")
                shift = shift * (bias_scale / scale)
        exported[path] = {"shift": shift}


def _dropout(adaptation: Adaptation) -> float:
    leaves = [_as_lora(leaf) for by_path in adaptation.adapted.values() for leaf in by_path.values()]
    rates = {leaf.dropout for leaf in leaves if "v" not in leaf.core}
    if len(rates) > 1:
        raise ValueError(f"PEFT has one lora_dropout, but the adapted weights have {sorted(rates)}")
    return float(rates.pop()) if rates else 0.0


LORA = Kind(
    schema=Schema(_FIELDS, _REFUSED, _check),
    rules=Rules(
        "LoRA",
        ("Linear", "Conv1D", "Embedding"),
        lambda fields, model, name: rank_and_alpha(fields, name, "lora_alpha"),
    ),
    tensors=_tensors,
    method=_method,
    leaves=(LowRank, Dora, Pissa),
    export=_export,
)
