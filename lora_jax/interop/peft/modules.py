"""The modules of a Hugging Face model by the names that PEFT matches, and which of them an adapter's config adapts.

PEFT decides by torch's modules what an adapter holds: containers, dropouts and all. Here the same list is made from our
parameters, and the same rules are applied to it (`tests/interop/test_peft_modules.py` compares them with PEFT's own).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.core.arrays import is_adapted, is_changed
from lora_jax.core.selection import flatten
from lora_jax.interop.hf.families import ARCHITECTURES, modules_of
from lora_jax.interop.peft.config import ALL_LINEAR, TASK_HEADS, regex_of
from lora_jax.interop.peft.kind import Kind, Model, Resolved


def prefix_in(names: Iterable[str], source: str) -> str | None:
    """The prefix of the backbone's names among a file's tensors (without `base_model.model.`); None without such names,
    a ValueError where they have several prefixes."""
    tables = [modules for a in ARCHITECTURES.values() for modules in (a.backbone, a.layers[:1], *a.optional.values())]
    tops = sorted({name.partition(".")[0] for modules in tables for name in modules})
    backbone = re.compile(rf"((?:\w+\.)*?)(?:{'|'.join(map(re.escape, tops))})\.")
    prefixes = {match[1] for name in names if (match := backbone.match(name))}
    if len(prefixes) > 1:
        raise ValueError(f"{source}: its tensors' names begin with {' and '.join(sorted(map(repr, prefixes)))}")
    return prefixes.pop() if prefixes else None


def model_of(params: Any, prefix: str | None, classifies: bool, source: str) -> Model:
    """The Hugging Face model that has these parameters: those of a registered architecture, in the loop layout, perhaps
    with a head of the user's own (`score/kernel`).

    `prefix` is of `prefix_in`; None for that of the model with the head that params have. `classifies` says whether
    params with both heads are those of a classifier, not of a language model. A TypeError for adapted params, a
    ValueError for params in the scanned layout or of an unknown model, or the prefix of another model.
    """
    leaves = dict(flatten(params, is_adapted)[0])
    if adapted := [path for path, leaf in leaves.items() if is_changed(leaf)]:
        raise TypeError(f"params are the base's, but {adapted[0]} is adapted")
    if any(path.startswith("h/") for path in leaves):
        raise ValueError("params are in the scanned layout; to_loop(params), and to_loop(delta), first")
    architecture = next((a for a in reversed(ARCHITECTURES.values()) if a.fits(leaves)), None)
    if architecture is None:
        families = ", ".join(ARCHITECTURES)
        raise ValueError(f"params are of none of the families {families}: they begin with {[*leaves][:3]}")
    lm_head, head = architecture.lm_head, architecture.head_in(leaves, classifies)
    prefixes = [head.prefix] if head else ["", *(head.prefix for head in architecture.classifiers)]
    prefix = prefixes[0] if prefix is None else prefix
    if prefix not in ("", *prefixes):
        raise ValueError(f"{source}: its tensors' names begin with {prefix!r}, these params' with {prefixes[-1]!r}")
    head = head if prefix else None
    modules = modules_of(architecture, leaves, prefix, head)
    for module in modules.values():
        if module.subtree and (missing := [path for path in module.paths("weight") if path not in leaves]):
            raise ValueError(f"params lack {missing[0]}")
    tied = lm_head is not None and lm_head.weight not in leaves
    (output,) = lm_head.modules if lm_head is not None and head is lm_head else ("",)
    return Model(architecture, prefix, modules, prefix + architecture.embedding, output, tied, leaves)


def resolve(fields: Mapping[str, Any], model: Model, source: str, kind: Kind) -> Resolved:
    """The modules that a config (of `config.complete`) adapts, with which options, and those that it saves, as PEFT
    decides; a ValueError where these are none, or such as PEFT cannot adapt or save, or modules inside each other."""
    saved = [*(fields["modules_to_save"] or []), *TASK_HEADS.get(fields["task_type"], [])]
    matched = {**fields, "modules_to_save": saved, "target_modules": _targets(fields, model, kind)}
    names = [name for name in model.modules if _is_target(matched, name)]
    if not names:
        used = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
        given = ", ".join(f"{field}={matched.get(field)!r}" for field in used)
        raise ValueError(f"{source}: no module of this model is meant by {given}")
    for name in names:
        if (torch_class := model.modules[name].torch_class) not in kind.torch_classes:
            raise ValueError(
                f"{source}: target_modules means {name}, which {kind.name} cannot adapt: PEFT's {kind.name} goes with "
                f"{', '.join(kind.torch_classes)}, not with {torch_class or 'a module without weights of its own'}"
            )
    adapted = {name: kind.options_of(matched, model, name) for name in names}
    wrappers = [name for name in model.modules if any(name.endswith(entry) for entry in saved) and model.below(name)]
    for name in wrappers:
        inner = [n for n in (*wrappers, *adapted) if n.startswith(f"{name}.")] + [n for n in adapted if n == name]
        if inner:
            raise ValueError(f"{source}: modules_to_save={saved} means {name}, which has {inner[0]} in it: unsupported")
    return Resolved(kind, fields, model, source, adapted, wrappers, _tokens(fields, model, source))


def _targets(fields: Mapping[str, Any], model: Model, kind: Kind) -> list[str] | str:
    targets = fields["target_modules"]
    if targets is None:
        return list(kind.targets(model.architecture))
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return targets
    head = next((name for name in ("score", "classifier") if name in model.modules), "")
    excluded = model.output or (head if fields["task_type"] == "SEQ_CLS" else "")
    return [m.name for m in model.modules.values() if m.torch_class in ("Linear", "Conv1D") and m.name != excluded]


def _is_target(fields: Mapping[str, Any], name: str) -> bool:
    """PEFT's `check_target_module_exists`."""
    excluded, targets = fields.get("exclude_modules"), fields["target_modules"]
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends_with(name, excluded)):
        return False
    if any(re.match(regex_of("modules_to_save", entry), name) for entry in fields["modules_to_save"]):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern")
    return name in targets or (_ends_with(name, targets) and _in_layers(layers, patterns, name))


def _ends_with(name: str, entries: Iterable[str]) -> bool:
    """Whether a name ends with one of the entries, in whole components."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _in_layers(layers: int | list[int] | None, patterns: str | list[str] | None, name: str) -> bool:
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or []
    regexes = [regex_of("layers_pattern", pattern) for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    match = next((match for regex in regexes if (match := re.match(regex, name))), None)
    return match is not None and int(match["idx"]) in ([layers] if isinstance(layers, int) else layers)


def _tokens(fields: Mapping[str, Any], model: Model, source: str) -> dict[str, list[int]]:
    indices = fields.get("trainable_token_indices")
    if indices is None:
        return {}
    tokens: dict[str, list[int]] = {}
    for entry, rows in (indices if isinstance(indices, dict) else {model.embedding: indices}).items():
        modules = [module for name, module in model.modules.items() if name.endswith(entry)]
        if wrong := [module.name for module in modules if module.torch_class != "Embedding"]:
            raise ValueError(f"{source}: trainable_token_indices means {wrong[0]}, which is no embedding: unsupported")
        if not modules:
            raise ValueError(f"{source}: trainable_token_indices means {entry!r}, which this model does not have")
        tokens |= {module.name: rows for module in modules}
    for name, rows in tokens.items():
        size = model.shape(model.modules[name], "weight")[0]
        if not rows or len(set(rows)) < len(rows) or max(rows) >= size:
            raise ValueError(f"{source}: trainable_token_indices={rows} of {name}: none, one twice, or beyond {size}")
    return tokens
