"""Our methods in PEFT's form: the config that means the same modules, and the delta as its tensors are made of it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_jax.core.arrays import Tuned, is_adapted
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.selection import flatten
from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.peft import config as peft_config
from lora_jax.interop.peft.kind import Leaves, shortest, targets
from lora_jax.interop.peft.kinds import FAMILIES
from lora_jax.interop.peft.modules import Model, model_of
from lora_jax.methods.prefix import Extended
from lora_jax.methods.rows import Rows
from lora_jax.methods.shift import Shift

HEADS = ("classifier", "score")
_NATIVE = "lora_jax.checkpoints.save_adapter(path, method, delta, base_id) saves it"


class Export(NamedTuple):
    """A Hugging Face model, an adapter's config for it, and the delta as `peft_tensors` places it."""

    model: Model
    config: dict[str, Any]
    delta: Delta


def export(method: ParamTransform, delta: Delta, params: Any) -> Export:
    """A method of this library, and its delta, as an adapter of PEFT's.

    Raises:
      ValueError: what PEFT has no form for, by its name.
    """
    model = model_of(params, None, any(key.startswith("score/") for key in delta), "params")
    adapted, taps = untapped(method.apply(params, delta))
    if taps:
        raise ValueError(
            f"{sorted(delta)[0]} changes activations: PEFT has no form for adapters, Compacter or prefixes like those "
            f"here; {_NATIVE}"
        )
    leaves, made = _sorted(adapted, model), Delta()
    kind = _kind(leaves, model)
    config = _config(kind, leaves, FAMILIES[kind].export(leaves, method.spec, delta, model, made), model)
    for path, leaf in leaves.tuned.items():
        made[path] = {"value": leaf.value}
    for name, rows in leaves.rows.items():
        made[model.modules[name].path("weight")] = {"rows": rows.rows}
    return Export(model, config, made)


def _sorted(adapted: Any, model: Model) -> Leaves:
    where = {
        path: module
        for module in model.modules.values()
        if module.ours
        for which in ("weight", "bias")[: 1 + module.bias]
        for path in module.paths(which)
    }
    leaves = Leaves({}, {}, {}, {})
    for path, leaf in flatten(adapted, is_adapted)[0]:
        if not is_adapted(leaf):
            continue
        if path not in where:
            raise ValueError(f"{path} is adapted, but is no parameter of the Hugging Face model")
        module = where[path].name
        if isinstance(leaf, Shift):
            leaves.shift.setdefault(module, {})[path] = leaf
        elif isinstance(leaf, Rows):
            leaves.rows[module] = leaf
        elif isinstance(leaf, Tuned):
            leaves.tuned[path] = leaf
        else:
            leaves.adapted.setdefault(module, {})[path] = leaf
    return leaves


def _kind(leaves: Leaves, model: Model) -> str:
    """The peft_type that holds all that is adapted."""
    kinds: dict[str, str] = {}
    for found in leaves.adapted.values():
        for path, leaf in found.items():
            kind = next((name for name, family in FAMILIES.items() if type(leaf) in family.leaves), None)
            if kind is None:
                what = "a prefix's tokens" if isinstance(leaf, Extended) else type(leaf).__name__
                raise ValueError(f"{path}: PEFT has no form for {what} like that here; {_NATIVE}")
            kinds.setdefault(kind, path)
    if not kinds:
        raise ValueError("PEFT's LoRA has at least one adapted weight, and this method none: save the merged model")
    if len(kinds) > 1:
        said = " and ".join(f"{FAMILIES[kind].rules.name} ({path})" for kind, path in kinds.items())
        raise ValueError(f"an adapter of PEFT's is of one kind, but this method is {said}; {_NATIVE}")
    (kind,) = kinds
    rules = FAMILIES[kind].rules
    for name, found in leaves.adapted.items():
        if (there := model.modules[name].kind) not in rules.kinds:
            only = ", ".join(rules.kinds)
            raise ValueError(f"{next(iter(found))} is {there}'s weight, but PEFT's {rules.name} goes with {only} only")
    return kind


def _check_beside(kind: str, leaves: Leaves, bias: str) -> None:
    """A ValueError for what may train beside PEFT's LoRA, but not beside this kind."""
    rules, fields = FAMILIES[kind].rules, FAMILIES[kind].schema.fields
    beside = {
        "lora_bias": ("shifts of biases", leaves.shift),
        "trainable_token_indices": ("rows of embeddings", leaves.rows),
        "bias": ("biases, but with their weights", bias != "none"),
    }
    for field, (what, there) in beside.items():
        if there and field not in fields:
            raise ValueError(f"PEFT trains no {what} beside {rules.name} (it has no field {field}), but beside LoRA")


def _config(kind: str, leaves: Leaves, said: Mapping[str, Any], model: Model) -> dict[str, Any]:
    schema, saved, bias = FAMILIES[kind].schema, *_saved(kind, leaves, model)
    _check_beside(kind, leaves, bias)
    head = [name for name in saved if name in HEADS]
    others = shortest(set(saved) - set(head), [name for name in model.modules if model.below(name)], str.endswith)
    common = {
        "target_modules": targets(set(leaves.adapted), model),
        "modules_to_save": (list(HEADS) if head else []) + others or None,
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM" if model.output else None,
    }
    some = {
        "trainable_token_indices": _tokens(leaves, model),
        "bias": bias,
        "fan_in_fan_out": any(model.modules[name].kind == "Conv1D" for name in leaves.adapted),
    }
    fields = common | {name: value for name, value in some.items() if name in schema.fields} | dict(said)
    return peft_config.new(schema, kind, **fields)


def _tokens(leaves: Leaves, model: Model) -> Any:
    said = {name: list(rows.indices) for name, rows in leaves.rows.items()}
    return said[model.embedding] if list(said) == [model.embedding] else said or None


def _saved(kind: str, leaves: Leaves, model: Model) -> tuple[list[str], str]:
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
    elif rest == {path for name in leaves.adapted for path in biases.get(name, ())}:
        bias = f"{kind.lower()}_only"
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
