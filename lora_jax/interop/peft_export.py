"""Our methods in PEFT's form: the config that means the same modules, and the delta with one A for each of them.

GPT-2's query, key and value kernels are one layer there. Kernels with an A each become that layer with the A's side by
side and a B with zeros between (rank the sum; the same function, though PEFT trains the zeros too).
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.arrays import Adapted, LowRank, Tuned, is_adapted
from lora_jax.interop import peft_config
from lora_jax.interop.peft_modules import Model, Module, model_of
from lora_jax.methods.rows import Rows
from lora_jax.methods.shift import Shift
from lora_jax.selection import flatten
from lora_jax.transforms import Delta, ParamTransform

HEADS = ("classifier", "score")


class Export(NamedTuple):
    """A Hugging Face model, an adapter's config for it, and the delta as `peft_tensors` places it."""

    model: Model
    config: dict[str, Any]
    delta: Delta


class _Leaves(NamedTuple):
    """The adapted leaves of a method, by kind and module; tuned paths as they are."""

    lowrank: dict[str, dict[str, LowRank]]
    shift: dict[str, dict[str, Shift]]
    rows: dict[str, Rows]
    tuned: dict[str, Tuned]


def export(method: ParamTransform, delta: Delta, params: Any) -> Export:
    """A method of this library, and its delta, as an adapter of PEFT's.

    Raises:
      ValueError: what PEFT has no form for, by its name.
    """
    model = model_of(params, None, any(key.startswith("score/") for key in delta), "params")
    leaves = _sorted(method.apply(params, delta), model)
    if not leaves.lowrank:
        raise ValueError("PEFT's LoRA has at least one adapted weight, and this method none: save the merged model")
    rslora = {spec.get("scale_rule") for spec in _specs(method.spec) if spec["method"] == "lora"} == {"alpha/sqrt(r)"}
    made, said, shifts = Delta(), {}, bool(leaves.shift)
    for name, found in leaves.lowrank.items():
        rank, scale = _lowrank(model.modules[name], found, delta, made)
        said[name] = (rank, _alpha(scale, rank, rslora))
        if shifts:
            _shift(model.modules[name], leaves.shift.pop(name, {}), scale, model, made)
    if leaves.shift:
        raise ValueError(f"{_first(leaves.shift)} is shifted, but not adapted: PEFT's lora_bias is part of LoRA")
    for path, leaf in leaves.tuned.items():
        made[path] = {"value": leaf.value}
    for name, rows in leaves.rows.items():
        made[model.modules[name].path("weight")] = {"rows": rows.rows}
    return Export(model, _config(leaves, said, rslora, shifts, model), made)


def _sorted(adapted: Any, model: Model) -> _Leaves:
    where = {
        path: module
        for module in model.modules.values()
        if module.ours
        for which in ("weight", "bias")[: 1 + module.bias]
        for path in module.paths(which)
    }
    leaves = _Leaves({}, {}, {}, {})
    for path, leaf in flatten(adapted, is_adapted)[0]:
        if not is_adapted(leaf):
            continue
        if path not in where:
            raise ValueError(f"{path} is adapted, but is no parameter of the Hugging Face model")
        module = where[path].name
        if isinstance(leaf, LowRank):
            leaves.lowrank.setdefault(module, {})[path] = leaf
        elif isinstance(leaf, Shift):
            leaves.shift.setdefault(module, {})[path] = leaf
        elif isinstance(leaf, Rows):
            leaves.rows[module] = leaf
        elif isinstance(leaf, Tuned):
            leaves.tuned[path] = leaf
        else:
            raise ValueError(f"{path}: PEFT's LoRA has no form for {type(leaf).__name__}")
    return leaves


def _specs(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for part in spec["of"] if spec["method"] == "chain" else ():
        yield from _specs(part)
    yield spec


def _first(found: Mapping[str, Mapping[str, Adapted]]) -> str:
    return next(path for paths in found.values() for path in paths)


def _lowrank(module: Module, found: Mapping[str, LowRank], delta: Delta, made: Delta) -> tuple[int, np.float32]:
    """Puts a module's factors into `made`; its rank and scale."""
    paths = module.paths("weight")
    scales = {path: np.float32(leaf.scale) for path, leaf in found.items()}
    if len(paths) == 1:
        made[paths[0]] = {"a": found[paths[0]].a, "b": found[paths[0]].b}
        return found[paths[0]].a.shape[-1], scales[paths[0]]
    owner = "@shared/" + "/".join(paths[0].split("/")[:-2])
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


def _alpha(scale: np.float32, rank: int, rslora: bool) -> float:
    """The alpha with the fewest digits that gives this scale."""
    by = math.sqrt(rank) if rslora else rank
    for digits in range(1, 18):
        alpha = float(f"{float(scale) * by:.{digits}g}")
        if np.float32(alpha / by) == scale:
            break
    return int(alpha) if alpha.is_integer() else alpha


def _config(
    leaves: _Leaves, said: Mapping[str, tuple[int, float]], rslora: bool, lora_bias: bool, model: Model
) -> dict[str, Any]:
    rank = _most_common(rank for rank, _ in said.values())
    alpha = _most_common(alpha for _, alpha in said.values())
    saved, bias = _saved(leaves, model)
    head = [name for name in saved if name in HEADS]
    others = _short(set(saved) - set(head), [name for name in model.modules if model.below(name)], str.endswith)
    task = "SEQ_CLS" if head else "CAUSAL_LM" if model.output else None
    return peft_config.new(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=_dropout(leaves),
        use_rslora=rslora,
        rank_pattern={name: r for name, (r, _) in said.items() if r != rank},
        alpha_pattern={name: a for name, (_, a) in said.items() if a != alpha},
        target_modules=_short(set(said), model.modules, lambda name, end: f".{name}".endswith(f".{end}")),
        modules_to_save=(list(HEADS) if head else []) + others or None,
        trainable_token_indices=_tokens(leaves, model),
        bias=bias,
        lora_bias=lora_bias,
        task_type=task,
        fan_in_fan_out=any(model.modules[name].kind == "Conv1D" for name in said),
    )


def _most_common(values: Iterable[Any]) -> Any:
    return collections.Counter(values).most_common(1)[0][0]


def _dropout(leaves: _Leaves) -> float:
    rates = {leaf.dropout for found in leaves.lowrank.values() for leaf in found.values() if "v" not in leaf.core}
    if len(rates) > 1:
        raise ValueError(f"PEFT has one lora_dropout, but the adapted weights have {sorted(rates)}")
    return float(rates.pop()) if rates else 0.0


def _tokens(leaves: _Leaves, model: Model) -> Any:
    said = {name: list(rows.indices) for name, rows in leaves.rows.items()}
    return said[model.embedding] if list(said) == [model.embedding] else said or None


def _saved(leaves: _Leaves, model: Model) -> tuple[list[str], str]:
    """The modules to save whole, and `bias`, for the tuned leaves."""
    tuned = set(leaves.tuned)
    biases = {m.name: set(m.paths("bias")) for m in model.modules.values() if m.bias}
    whole = [
        module.name
        for module in model.modules.values()
        if module.ours and tuned >= set(module.paths("weight")) | biases.get(module.name, set())
    ]
    covered = {path for name in whole for path in {*model.modules[name].paths("weight"), *biases.get(name, ())}}
    rest, every = tuned - covered, set().union(*biases.values())
    if not rest:
        bias = "none"
    elif rest == {path for name in leaves.lowrank for path in biases.get(name, ())}:
        bias = "lora_only"
    elif rest == every - covered:
        bias = "all"
    else:
        odd = sorted(rest - every) or sorted(rest)
        raise ValueError(
            f"{odd[0]} is tuned, but PEFT trains whole modules (modules_to_save: weight and bias; GPT-2's query, key "
            "and value together), the biases of the adapted modules (bias='lora_only') or all biases (bias='all')"
        )
    head = [name for name in HEADS if name in model.modules and {m.name for m in model.below(name)} <= set(whole)]
    inside = {module.name for name in head for module in model.below(name)}
    return head + [name for name in whole if name not in inside], bias


def _short(names: set[str], among: Iterable[str], ends: Callable[[str, str], bool]) -> list[str]:
    """The shortest ends of these names that mean none of the others."""
    others, found = [name for name in among if name not in names], set()
    for name in names:
        parts = name.split(".")
        shorter = (".".join(parts[-n:]) for n in range(1, len(parts)) if not parts[-n].isdigit())
        found.add(next((end for end in shorter if not any(ends(other, end) for other in others)), name))
    return sorted(found)
