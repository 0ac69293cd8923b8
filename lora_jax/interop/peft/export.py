"""Methods of this library in PEFT's form: a config that adapts the same modules, and the delta of its tensors."""

from collections.abc import Mapping
from typing import Any

from lora_jax.core.arrays import Tuned, is_adapted, is_changed
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.selection import flatten
from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.peft.config import new_config
from lora_jax.interop.peft.kind import Adaptation, Model, shortest
from lora_jax.interop.peft.kinds import KINDS
from lora_jax.interop.peft.modules import model_of
from lora_jax.methods.bias_delta import BiasDelta
from lora_jax.methods.prefix import Extended
from lora_jax.methods.token_rows import TokenRows

HEADS = ("classifier", "score")
_NATIVE = "lora_jax.checkpoints.save_adapter(path, method, delta, base_id) saves it"


def export(method: ParamTransform, delta: Delta, params: Any) -> tuple[Model, dict[str, Any], Delta]:
    """The Hugging Face model, a config for it, and the delta with the keys and factors of its tensors, of a method of
    this library and its delta; a ValueError that names what PEFT cannot represent."""
    model = model_of(params, None, any(key.startswith("score/") for key in delta), "params")
    adapted, taps = untapped(method.apply(params, delta))
    if taps:
        raise ValueError(
            f"{sorted(delta)[0]} changes activations: PEFT has no form for adapters, Compacter or prefixes like those "
            f"here; {_NATIVE}"
        )
    adaptation = _by_class(Adaptation(method.spec, delta, model, {}, {}, {}, {}), adapted)
    name = _kind_name(adaptation)
    to_peft = KINDS[name].export
    if to_peft is None:
        raise ValueError(f"an adapter of {KINDS[name].name} is only written as it was read; {_NATIVE}")
    exported, fields = to_peft(adaptation)
    config = _config(name, adaptation, fields)
    for path, leaf in adaptation.tuned.items():
        exported[path] = {"value": leaf.value}
    for module, rows in adaptation.rows.items():
        exported[model.modules[module].path("weight")] = {"rows": rows.rows}
    return model, config, exported


def _by_class(adaptation: Adaptation, adapted: Any) -> Adaptation:
    """Puts the adapted leaves into the empty tables of an adaptation, by class and module."""
    module_of = {
        path: module.name
        for module in adaptation.model.modules.values()
        for which in module.parameters
        for path in module.paths(which)
    }
    for path, leaf in flatten(adapted, is_adapted)[0]:
        if not is_changed(leaf):
            continue
        if path not in module_of:
            raise ValueError(f"{path} is adapted, but is no parameter of the Hugging Face model")
        module = module_of[path]
        if isinstance(leaf, BiasDelta):
            adaptation.shift.setdefault(module, {})[path] = leaf
        elif isinstance(leaf, TokenRows):
            adaptation.rows[module] = leaf
        elif isinstance(leaf, Tuned):
            adaptation.tuned[path] = leaf
        else:
            adaptation.adapted.setdefault(module, {})[path] = leaf
    return adaptation


def _kind_name(adaptation: Adaptation) -> str:
    """The peft_type that holds all that is adapted."""
    first_path: dict[str, str] = {}  # of each kind
    for leaves in adaptation.adapted.values():
        for path, leaf in leaves.items():
            name = next((name for name, kind in KINDS.items() if type(leaf) in kind.leaves), None)
            if name is None:
                what = "a prefix's tokens" if isinstance(leaf, Extended) else type(leaf).__name__
                raise ValueError(f"{path}: PEFT has no form for {what} like that here; {_NATIVE}")
            first_path.setdefault(name, path)
    if not first_path:
        raise ValueError("PEFT's LoRA has at least one adapted weight, and this method none: save the merged model")
    if len(first_path) > 1:
        kinds = " and ".join(f"{KINDS[name].name} ({path})" for name, path in first_path.items())
        raise ValueError(f"an adapter of PEFT's is of one kind, but this method is {kinds}; {_NATIVE}")
    (name,) = first_path
    kind = KINDS[name]
    for module, leaves in adaptation.adapted.items():
        if (torch_class := adaptation.model.modules[module].torch_class) not in kind.torch_classes:
            classes, path = ", ".join(kind.torch_classes), next(iter(leaves))
            raise ValueError(f"{path} is {torch_class}'s weight, but PEFT's {kind.name} goes with {classes} only")
    return name


def _config(name: str, adaptation: Adaptation, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an adaptation: `fields` of its kind, and those of any kind."""
    kind, model, (saved, bias) = KINDS[name], adaptation.model, _saved(name, adaptation)
    rows = {module: list(leaf.indices) for module, leaf in adaptation.rows.items()}
    beside = {
        "lora_bias": ("shifts of biases", adaptation.shift),
        "trainable_token_indices": ("rows of embeddings", rows),
        "bias": ("biases, but with their weights", bias != "none"),
    }
    for field, (what, trains) in beside.items():
        if trains and field not in kind.fields:
            raise ValueError(f"PEFT trains no {what} beside {kind.name} (it has no field {field}), but beside LoRA")
    head = [module for module in saved if module in HEADS]
    others = shortest(set(saved) - set(head), [module for module in model.modules if model.below(module)], str.endswith)
    every_kind = {
        "target_modules": model.targets(set(adaptation.adapted)),
        "modules_to_save": (list(HEADS) if head else []) + others or None,
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM" if model.output else None,
    }
    some_kinds = {
        "trainable_token_indices": rows[model.embedding] if list(rows) == [model.embedding] else rows or None,
        "bias": bias,
        "fan_in_fan_out": any(model.modules[module].torch_class == "Conv1D" for module in adaptation.adapted),
    }
    some_kinds = {field: value for field, value in some_kinds.items() if field in kind.fields}
    return new_config(kind, name, **every_kind | some_kinds | dict(fields))


def _saved(kind_name: str, adaptation: Adaptation) -> tuple[list[str], str]:
    """The modules to save whole, and the field `bias`, for the tuned leaves."""
    model, tuned = adaptation.model, set(adaptation.tuned)
    biases = {m.name: set(m.paths("bias")) for m in model.modules.values() if m.bias}
    leaves = {m.name: {*m.paths("weight"), *biases.get(m.name, ())} for m in model.modules.values() if m.subtree}
    saved = [name for name, paths in leaves.items() if paths <= tuned]
    covered = set().union(*(leaves[name] for name in saved))
    rest, all_biases = tuned - covered, set().union(*biases.values())
    if not rest:
        bias = "none"
    elif rest == {path for name in adaptation.adapted for path in biases.get(name, ())}:
        bias = f"{kind_name.lower()}_only"
    elif rest == all_biases - covered:
        bias = "all"
    else:
        odd = sorted(rest - all_biases) or sorted(rest)
        raise ValueError(
            f"{odd[0]} is tuned, but PEFT trains whole modules (modules_to_save: weight and bias; GPT-2's query, key "
            "and value together), the biases of the adapted modules (bias='lora_only') or all biases (bias='all')"
        )
    heads = [name for name in HEADS if name in model.modules and {m.name for m in model.below(name)} <= set(saved)]
    inside = {module.name for name in heads for module in model.below(name)}
    return heads + [name for name in saved if name not in inside], bias
