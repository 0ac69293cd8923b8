"""PEFT's LoRA, here and there, with the variants that its config names: rsLoRA, DoRA, PiSSA, trained shifts of biases.

GPT-2's query, key and value kernels are one layer there. Kernels with an A each become that layer with the A's side by
side and a B with zeros between (rank the sum; the same function, though PEFT trains the zeros too).

A file of PiSSA's goes with the whole weight: PEFT's loader takes the singular values out of it once more, and so does
this one, into `fixed_a` and `fixed_b`. A fused layer is decomposed as one there: its three kernels have the same A.
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
    Family,
    Leaves,
    alpha_of,
    by_glob,
    globs_of,
    parts,
    ranked,
    selected,
    with_patterns,
)
from lora_jax.interop.peft.modules import Meant, Model, Module, Rules, rank_and_alpha
from lora_jax.interop.peft.tensors import Tensor
from lora_jax.methods.dora import Dora, dora
from lora_jax.methods.lora import lora
from lora_jax.methods.pissa import Pissa, pissa
from lora_jax.methods.shift import Shift, shift

_INITS = ("gaussian", "eva", "orthogonal", "mica")  # these leave the base as it is
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
    # These say nothing of the function.
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


def _tensors(meant: Meant, fields: Mapping[str, Any], model: Model, source: str) -> list[list[Tensor]]:
    return [_of(model.modules[name], rank, fields, model, source) for name, (rank, _) in meant.adapted.items()]


def _of(module: Module, rank: int, fields: Mapping[str, Any], model: Model, source: str) -> list[Tensor]:
    path, (rows, columns) = module.path("weight"), model.shape(module, "weight")
    names = ("embedding_A", "embedding_B") if module.kind == "Embedding" else ("A.weight", "B.weight")
    decomposed = _decomposed(module, fields)
    shared = _shared(path) if "{" in path and not decomposed else ""
    a = Tensor(f"{module.name}.lora_{names[0]}", (rank, rows), path, "a", turned=True, key=shared, alike=decomposed)
    tensors = [a, Tensor(f"{module.name}.lora_{names[1]}", (columns, rank), path, "b", turned=True)]
    if fields["use_dora"]:
        tensors.append(Tensor(f"{module.name}.lora_magnitude_vector", (columns,), path, "m"))
    if fields["lora_bias"]:
        if not module.bias:
            raise ValueError(f"{source}: lora_bias=true, but {module.name} has no bias that could take it")
        tensors.append(Tensor(f"{module.name}.lora_B.bias", (columns,), module.path("bias"), "shift"))
    return tensors


def _decomposed(module: Module, fields: Mapping[str, Any]) -> bool:
    """Whether PEFT takes singular values out of its weight; an embedding's it leaves there."""
    return fields["init_lora_weights"] == "pissa" and module.kind != "Embedding"


def _shared(path: str) -> str:
    """Where `lora` has the A of the kernels of one module: `h_0/attn/{query,key}/kernel` in `@shared/h_0/attn`."""
    return "@shared/" + path.rsplit("/", 2)[0]


# --- to a method --------------------------------------------------------------------------------------------------


def _method(meant: Meant, fields: Mapping[str, Any], model: Model) -> tuple[list[ParamTransform], Delta]:
    taken = {name: said for name, said in meant.adapted.items() if _decomposed(model.modules[name], fields)}
    added = {name: said for name, said in meant.adapted.items() if name not in taken}
    methods, fixed = [], Delta()
    for part, make in ((taken, _pissa), (added, _lora)):
        if part:
            method, held = make(part, fields, model)
            methods.append(method)
            fixed |= held
    if fields["lora_bias"]:
        scales = {}
        for name, (rank, alpha) in meant.adapted.items():
            scales[model.modules[name].path("bias")] = alpha / (rank**0.5 if fields["use_rslora"] else rank)
        methods.append(shift(selected(scales, model), scale=by_glob(scales, model)))
    return methods, fixed


def _rule(fields: Mapping[str, Any]) -> str:
    return "alpha/sqrt(r)" if fields["use_rslora"] else "alpha/r"


def _lora(said: dict[str, tuple[int, float]], fields: Mapping[str, Any], model: Model) -> tuple[ParamTransform, Delta]:
    wide = False
    for name, (rank, _) in said.items():
        if rank > (most := min(model.shape(model.modules[name], "weight"))):
            wide = True
            logging.warning("the adapter of %s has rank %d, more than min(in, out) = %d", name, rank, most)
    fused = [path for name in said if "{" in (path := model.modules[name].path("weight"))]
    method = (dora if fields["use_dora"] else lora)(
        **ranked(said, model),
        scale_rule=_rule(fields),
        dropout=float(fields["lora_dropout"]),
        shared=globs_of(fused, model),
        strict=not wide,
    )
    if not fields["use_dora"]:
        return method, Delta()
    first = method.init(jax.random.key(0), model.leaves)
    return method, Delta({path: {"fixed_norm": f["fixed_norm"]} for path, f in first.items() if "fixed_norm" in f})


def _pissa(said: dict[str, tuple[int, float]], fields: Mapping[str, Any], model: Model) -> tuple[ParamTransform, Delta]:
    method, fixed = pissa(**ranked(said, model), scale_rule=_rule(fields)), Delta()
    for name, (rank, alpha) in said.items():
        paths = model.modules[name].paths("weight")
        whole = jnp.concatenate([jnp.asarray(model.leaves[path]) for path in paths], -1)
        alone = pissa(select("*", axes="io"), rank=rank, alpha=alpha, scale_rule=_rule(fields))
        first = alone.init(jax.random.key(0), {name: whole})[name]
        for path, b in zip(paths, jnp.split(first["fixed_b"], len(paths), -1), strict=True):
            fixed[path] = {"fixed_a": jnp.array(first["fixed_a"], copy=True), "fixed_b": b}
    return method, fixed


# --- from a method ------------------------------------------------------------------------------------------------


def _export(leaves: Leaves, spec: Mapping[str, Any], delta: Delta, model: Model, made: Delta) -> dict[str, Any]:
    kinds = {type(leaf) for found in leaves.adapted.values() for leaf in found.values()}
    if Dora in kinds and (leaves.shift or len(kinds) > 1):
        other = "shifts of biases" if leaves.shift else "LoRA"
        raise ValueError(f"DoRA is beside {other} here; PEFT has use_dora for all that an adapter adapts, or for none")
    rslora = {part["scale_rule"] for part in parts(spec) if "scale_rule" in part} == {"alpha/sqrt(r)"}
    said, shifts = {}, dict(leaves.shift)
    for name, found in leaves.adapted.items():
        module = model.modules[name]
        rank, scale = _lowrank(module, {path: _plain(leaf) for path, leaf in found.items()}, delta, made)
        said[name] = (rank, alpha_of(scale, math.sqrt(rank) if rslora else rank))
        if leaves.shift:
            _shift(module, shifts.pop(name, {}), scale, model, made)
        for path in module.paths("weight") if Dora in kinds else ():
            # what is not adapted keeps the norm that it has
            w = found[path].m if path in found else np.linalg.norm(np.asarray(model.leaves[path], np.float32), axis=0)
            made[path]["m"] = w
    if shifts:
        path = next(path for paths in shifts.values() for path in paths)
        raise ValueError(f"{path} is shifted, but not adapted: PEFT's lora_bias is part of LoRA")
    return with_patterns(said, "lora_alpha") | {
        "lora_dropout": _dropout(leaves),
        "use_rslora": rslora,
        "use_dora": Dora in kinds,
        "lora_bias": bool(leaves.shift),
    }


def _plain(leaf: Adapted) -> Any:
    """What has an A, a B and a scale; of PiSSA, as PEFT converts it: A over A0, B beside -B0."""
    if not isinstance(leaf, Pissa):
        return leaf
    a = jnp.concatenate([leaf.a, leaf.fixed_a], -1)
    b = jnp.concatenate([leaf.b, -leaf.fixed_b])
    return LowRank(base=leaf.base, a=a, b=b, scale=leaf.scale, core=leaf.core, path=leaf.path)


def _lowrank(module: Module, found: Mapping[str, Any], delta: Delta, made: Delta) -> tuple[int, np.float32]:
    """Puts a module's factors into `made`; its rank and scale."""
    paths = module.paths("weight")
    scales = {path: np.float32(leaf.scale) for path, leaf in found.items()}
    if len(paths) == 1:
        made[paths[0]] = {"a": found[paths[0]].a, "b": found[paths[0]].b}
        return found[paths[0]].a.shape[-1], scales[paths[0]]
    owner = _shared(paths[0])
    of = {path: path if "a" in delta.get(path, {}) else owner for path in found}  # whose A a path has
    blocks = {of[path]: np.asarray(leaf.a) for path, leaf in found.items()}
    starts = dict(zip(blocks, np.cumsum([0, *(a.shape[-1] for a in blocks.values())]), strict=False))
    rank = sum(a.shape[-1] for a in blocks.values())
    folds = len(set(scales.values())) > 1
    made[owner] = {"a": np.concatenate(list(blocks.values()), axis=-1)}
    like = np.asarray(next(iter(found.values())).b)
    for path in paths:
        b = np.zeros((rank, like.shape[-1]), np.float32 if folds else like.dtype)
        if path in found:
            part = np.asarray(found[path].b)
            start = starts[of[path]]
            b[start : start + len(part)] = part.astype(b.dtype) * scales[path] if folds else part
        made[path] = {"b": b}
    return rank, np.float32(1) if folds else next(iter(scales.values()))


def _shift(module: Module, found: Mapping[str, Shift], scale: np.float32, model: Model, made: Delta) -> None:
    """Puts the shift of a module's bias into `made`, in units of its scale; none is zero."""
    if not module.bias:
        raise ValueError(f"{module.path('weight')} has no bias: PEFT's lora_bias shifts those of all adapted modules")
    for path in module.paths("bias"):
        shift = np.zeros(model.leaves[path].shape, np.float32)
        if path in found:
            own = np.float32(np.asarray(found[path].scale).flat[0])
            if own != scale and scale == 0:
                raise ValueError(f"{path} is shifted by a scale of {own}, but its kernel's is 0: PEFT has one for both")
            shift = np.asarray(found[path].shift) if own == scale else np.asarray(found[path].shift) * (own / scale)
        made[path] = {"shift": shift}


def _dropout(leaves: Leaves) -> float:
    every: list[Any] = [_plain(leaf) for found in leaves.adapted.values() for leaf in found.values()]
    rates = {leaf.dropout for leaf in every if "v" not in leaf.core}
    if len(rates) > 1:
        raise ValueError(f"PEFT has one lora_dropout, but the adapted weights have {sorted(rates)}")
    return float(rates.pop()) if rates else 0.0


LORA = Family(
    schema=Schema(_FIELDS, _REFUSED, _check),
    rules=Rules(
        name="LoRA",
        kinds=("Linear", "Conv1D", "Embedding"),
        gpt2=("c_attn",),
        encoder=("query", "value"),
        says=lambda fields, model, name: rank_and_alpha(fields, name, "lora_alpha"),
    ),
    tensors=_tensors,
    method=_method,
    leaves=(LowRank, Dora, Pissa),
    export=_export,
)
