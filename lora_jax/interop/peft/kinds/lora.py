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
from lora_jax.interop.hf.families import Module
from lora_jax.interop.peft import config
from lora_jax.interop.peft.config import BOOL, FAN_IN_FAN_OUT, NUMBER, OBJECT, RANKED, RATE, TEXT, Field
from lora_jax.interop.peft.kind import Adaptation, Kind, Model, Resolved, Tensor
from lora_jax.methods.bias_delta import BiasDelta, bias_delta
from lora_jax.methods.dora import Dora, dora
from lora_jax.methods.lora import lora
from lora_jax.methods.pissa import Pissa, pissa

Options = Mapping[str, tuple[int, float]]  # (rank, alpha) of each adapted module

_INITS = ("gaussian", "eva", "orthogonal", "mica")  # these do not change the base
_CHANGES_BASE = re.compile(r"(pissa|olora|loftq|corda|lora_ga)", re.IGNORECASE)
_IDS = config.list_of(lambda value: config.is_int(value) and value >= 0)
_FIELDS: dict[str, Field] = {
    **RANKED,
    **FAN_IN_FAN_OUT,
    "lora_alpha": Field(8, *NUMBER),
    "lora_dropout": Field(0.0, *RATE),
    "use_rslora": Field(False, *BOOL),
    "use_dora": Field(False, *BOOL),
    "trainable_token_indices": Field(None, config.or_null(_IDS, config.dict_of(_IDS)), "ids, an object of ids or null"),
    "bias": Field("none", lambda value: value in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "lora_bias": Field(False, *BOOL),
    "init_lora_weights": Field(True, lambda value: isinstance(value, bool | str), "true, false or a name"),
    # These do not change the function.
    "megatron_core": Field("megatron.core", *TEXT),
    "loftq_config": Field({}, *OBJECT),
    "eva_config": Field(None, *OBJECT),
    "corda_config": Field(None, *OBJECT),
}
_NULL = "use_bdlora target_parameters layer_replication alora_invocation_tokens arrow_config velora_config kasa_config "
_NULL += "monteclora_config lora_ga_config megatron_config"
_REFUSED = dict.fromkeys(_NULL.split()) | {"use_qalora": False, "qalora_group_size": 16, "ensure_weight_tying": False}


def _check(fields: Mapping[str, Any], source: str) -> None:
    init, bias, shifts, norms = (fields[name] for name in ("init_lora_weights", "bias", "lora_bias", "use_dora"))
    alphas = [fields["lora_alpha"], *fields["alpha_pattern"].values()]
    largest, least, named = max(alphas, key=abs), min(alphas), f"init_lora_weights={init!r}"
    pissa, other = init == "pissa", isinstance(init, str) and init != "pissa"
    changes_base = other and _CHANGES_BASE.match(init)
    unknown = other and not changes_base and init.lower() not in _INITS
    plain = (
        "changes the base's weights on loading, which is not supported; in PEFT, save_pretrained(folder, "
        "path_initial_model_for_weight_conversion=...) makes a plain adapter of it"
    )
    refused = [
        (pissa and norms, "use_dora with init_lora_weights='pissa' is DoRA of a changed base: unsupported"),
        (pissa and least <= 0, f"PiSSA divides by alpha / r, but an alpha is {least}"),
        (changes_base, f"{named} {plain}"),
        (unknown, f"{named} is none of true, false, pissa, {', '.join(_INITS)}"),
        (shifts and not isinstance(init, bool), "lora_bias goes with init_lora_weights true or false only"),
        (norms and abs(largest) > 1e15, f"an alpha is {largest}: float32 does not hold the norms of DoRA"),
        (shifts and norms, "lora_bias does not go with use_dora"),
        (shifts and bias != "none", f"lora_bias with bias={bias!r} trains two arrays for one bias: unsupported"),
    ]
    for is_refused, why in refused:
        if is_refused:
            raise ValueError(f"{source}: {why}")
    if pissa and fields["lora_dropout"]:
        logging.warning("%s: PiSSA has no dropout here; its lora_dropout acts in PEFT's training only", source)


def _is_pissa(resolved: Resolved, module: Module) -> bool:
    """Whether PEFT subtracts singular values from a module's weight; from an embedding's it does not."""
    return resolved.fields["init_lora_weights"] == "pissa" and module.torch_class != "Embedding"


def _tensors(resolved: Resolved, module: Module, options: tuple[int, float]) -> list[Tensor]:
    name, path, rank = module.name, module.path("weight"), options[0]
    rows, columns = resolved.model.shape(module, "weight")
    a, b = ("embedding_A", "embedding_B") if module.torch_class == "Embedding" else ("A.weight", "B.weight")
    pissa = _is_pissa(resolved, module)
    key = "" if pissa else module.shared
    tensors = [
        Tensor(f"{name}.lora_{a}", (rank, rows), path, "a", transposed=True, key=key, replicated=pissa),
        Tensor(f"{name}.lora_{b}", (columns, rank), path, "b", transposed=True),
    ]
    if resolved.fields["use_dora"]:
        tensors.append(Tensor(f"{name}.lora_magnitude_vector", (columns,), path, "m"))
    if resolved.fields["lora_bias"]:
        if not module.bias:
            raise ValueError(f"{resolved.source}: lora_bias=true, but {name} has no bias that could take it")
        tensors.append(Tensor(f"{name}.lora_B.bias", (columns,), module.path("bias"), "shift"))
    return tensors


def _method(resolved: Resolved) -> tuple[list[ParamTransform], Delta]:
    fields, model, modules = resolved.fields, resolved.model, resolved.model.modules
    of_pissa = {name: opts for name, opts in resolved.adapted.items() if _is_pissa(resolved, modules[name])}
    of_lora = {name: opts for name, opts in resolved.adapted.items() if name not in of_pissa}
    rule = "alpha/sqrt(r)" if fields["use_rslora"] else "alpha/r"
    transforms, from_base = [], Delta()
    if of_pissa:
        transforms.append(pissa(**model.ranked(of_pissa), scale_rule=rule))
        from_base |= _pissa_factors(of_pissa, rule, model)
    if of_lora:
        transforms.append(_lora(of_lora, rule, fields, model))
        if fields["use_dora"]:
            initial = transforms[-1].init(jax.random.key(0), model.leaves)
            norms = {path: factors["fixed_norm"] for path, factors in initial.items() if "fixed_norm" in factors}
            from_base |= Delta({path: {"fixed_norm": norm} for path, norm in norms.items()})
    if fields["lora_bias"]:
        scales = {}
        for name, (rank, alpha) in resolved.adapted.items():
            scales[modules[name].path("bias")] = alpha / (rank**0.5 if fields["use_rslora"] else rank)
        transforms.append(bias_delta(model.select(scales), scale=model.by_glob(scales)))
    return transforms, from_base


def _lora(options: Options, rule: str, fields: Mapping[str, Any], model: Model) -> ParamTransform:
    strict = True
    for name, (rank, _) in options.items():
        if rank > (full_rank := min(model.shape(model.modules[name], "weight"))):
            strict = False
            logging.warning("the adapter of %s has rank %d, more than min(in, out) = %d", name, rank, full_rank)
    method, dropout = dora if fields["use_dora"] else lora, float(fields["lora_dropout"])
    fused = model.globs(model.modules[name].path("weight") for name in options if model.modules[name].shared)
    return method(**model.ranked(options), scale_rule=rule, dropout=dropout, shared=fused, strict=strict)


def _pissa_factors(options: Options, rule: str, model: Model) -> Delta:
    factors = Delta()
    for name, (rank, alpha) in options.items():
        paths = model.modules[name].paths("weight")
        weight = jnp.concatenate([jnp.asarray(model.leaves[path]) for path in paths], -1)
        of_weight = pissa(select("*", axes="io"), rank=rank, alpha=alpha, scale_rule=rule)
        initial = of_weight.init(jax.random.key(0), {name: weight})[name]
        for path, b in zip(paths, jnp.split(initial["fixed_b"], len(paths), -1), strict=True):
            factors[path] = {"fixed_a": jnp.array(initial["fixed_a"], copy=True), "fixed_b": b}
    return factors


def _export(adaptation: Adaptation) -> tuple[Delta, dict[str, Any]]:
    model, exported, options, rates = adaptation.model, Delta(), {}, set()
    classes = {type(leaf) for leaves in adaptation.adapted.values() for leaf in leaves.values()}
    if Dora in classes and (adaptation.shift or len(classes) > 1):
        other = "shifts of biases" if adaptation.shift else "LoRA"
        raise ValueError(f"DoRA is beside {other} here; PEFT has use_dora for all that an adapter adapts, or for none")
    rslora = {spec["scale_rule"] for spec in adaptation.specs() if "scale_rule" in spec} == {"alpha/sqrt(r)"}
    for name, leaves in adaptation.adapted.items():
        module = model.modules[name]
        factors = {path: _as_lora(leaf) for path, leaf in leaves.items()}
        rates |= {leaf.dropout for leaf in factors.values() if "v" not in leaf.core}
        rank, scale = _export_factors(module, factors, adaptation.delta, exported)
        options[name] = (rank, config.alpha_of(scale, math.sqrt(rank) if rslora else rank))
        if adaptation.shift:
            _export_shift(module, adaptation.shift.get(name, {}), scale, model, exported)
        for path in module.paths("weight") if Dora in classes else ():
            # a part that is not adapted keeps the norm that it has
            weight = np.asarray(model.leaves[path], np.float32)
            exported[path]["m"] = leaves[path].m if path in leaves else np.linalg.norm(weight, axis=0)
    if alone := [path for name, biases in adaptation.shift.items() if name not in options for path in biases]:
        raise ValueError(f"{alone[0]} is shifted, but not adapted: PEFT's lora_bias is part of LoRA")
    if len(rates) > 1:
        raise ValueError(f"PEFT has one lora_dropout, but the adapted weights have {sorted(rates)}")
    return exported, config.with_patterns(options, "lora_alpha") | {
        "lora_dropout": float(max(rates, default=0.0)),
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
    shared = module.shared
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
            if scale == 0 != bias_scale:
                raise ValueError(f"{path} has the scale {bias_scale}, but its kernel's is 0: PEFT has one for both")
            if bias_scale != scale:
                shift = shift * (bias_scale / scale)
        exported[path] = {"shift": shift}


LORA = Kind(
    "LoRA",
    ("Linear", "Conv1D", "Embedding"),
    _FIELDS,
    _tensors,
    _method,
    leaves=(LowRank, Dora, Pissa),
    export=_export,
    refused=_REFUSED,
    check=_check,
    options_of=lambda fields, model, name: config.rank_and_alpha(fields, name, "lora_alpha"),
)
