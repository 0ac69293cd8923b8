"""The modules of a Hugging Face model by the names that PEFT matches, and which of them an adapter's config adapts.

PEFT decides by torch's modules what an adapter holds: containers, dropouts and all. Here the same list is made from our
parameters, and the same rules are applied to it (`tests/interop/test_peft_modules.py` compares them with PEFT's own).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.core.arrays import is_adapted
from lora_jax.core.selection import flatten
from lora_jax.interop.hf.architectures import ARCHITECTURES, Architecture, Module, depth, modules_of
from lora_jax.interop.peft.config import ALL_LINEAR, TASK_HEADS, regex_of


class Model(NamedTuple):
    """A Hugging Face model as PEFT sees it.

    Attributes:
      architecture: of its family.
      prefix: what stands before the names of the backbone's modules.
      modules: all of them by name.
      embedding, output: the names of the token embedding and of the language model's head ("" without one).
      tied: whether the token embedding is the head in our parameters.
      leaves: our parameters by path.
    """

    architecture: Architecture
    prefix: str
    modules: dict[str, Module]
    embedding: str
    output: str
    tied: bool
    leaves: dict[str, Any]

    def shape(self, module: Module, which: str) -> tuple[int, ...]:
        """The shape of a module's "weight" or "bias" in our order of axes, the parts of a fused layer side by side."""
        shapes = [tuple(self.leaves[path].shape) for path in module.paths(which)]
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))

    @property
    def depth(self) -> int:
        """The number of layers."""
        return depth(self.leaves)

    def below(self, name: str) -> list[Module]:
        """The modules with weights that have this name or are inside the module of this name."""
        return [m for m in self.modules.values() if m.torch_class and (m.name == name or m.name.startswith(f"{name}."))]


def prefix_in(names: Iterable[str], source: str) -> str | None:
    """The prefix of the backbone's names among a file's tensors (without `base_model.model.`); None without such names.

    Raises:
      ValueError: the names have several prefixes.
    """
    tables = [modules for a in ARCHITECTURES.values() for modules in (a.backbone, a.layers[:1], *a.optional.values())]
    tops = sorted({name.partition(".")[0] for modules in tables for name in modules})
    backbone = re.compile(rf"((?:\w+\.)*?)(?:{'|'.join(map(re.escape, tops))})\.")
    prefixes = {match[1] for name in names if (match := backbone.match(name))}
    if len(prefixes) > 1:
        raise ValueError(f"{source}: its tensors' names begin with {' and '.join(sorted(map(repr, prefixes)))}")
    return prefixes.pop() if prefixes else None


def model_of(params: Any, prefix: str | None, classifies: bool, source: str) -> Model:
    """The Hugging Face model that has these parameters.

    Args:
      params: of a registered architecture, in the loop layout, perhaps with a head of the user's own (`score/kernel`).
      prefix: of `prefix_in`; None for that of the model with the head that params have.
      classifies: whether params with both heads are those of a classifier, not of a language model.
      source: the file, for messages.

    Raises:
      TypeError: adapted params.
      ValueError: params in the scanned layout or of an unknown model; the prefix of another model.
    """
    leaves = dict(flatten(params, is_adapted)[0])
    if adapted := [path for path, leaf in leaves.items() if is_adapted(leaf)]:
        raise TypeError(f"params are the base's, but {adapted[0]} is adapted")
    if any(path.startswith("h/") for path in leaves):
        raise ValueError("params are in the scanned layout; to_loop(params), and to_loop(delta), first")
    architecture = next((a for a in reversed(ARCHITECTURES.values()) if a.weight in leaves), None)
    if architecture is None:
        families = ", ".join(ARCHITECTURES)
        raise ValueError(f"params are of none of the families {families}: they begin with {[*leaves][:3]}")
    lm_head, classifiers = architecture.lm_head, architecture.classifiers
    trained = (head for head in classifiers if head.weight in leaves and (classifies or lm_head is None))
    head = next(trained, lm_head)
    prefixes = [head.prefix] if head else ["", *(head.prefix for head in classifiers)]
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


class Rules(NamedTuple):
    """Which modules one kind of adapter can have.

    Attributes:
      name: the kind's, for messages.
      torch_classes: of the modules that it can adapt.
      options_of: `(fields, model, module's name) -> options`, what a config sets for one module, such as its rank.
      targets: `architecture -> target_modules` where a config has none.
    """

    name: str
    torch_classes: tuple[str, ...]
    options_of: Callable[[Mapping[str, Any], Model, str], Any]
    targets: Callable[[Architecture], Sequence[str]] = lambda architecture: architecture.lora_targets


class Resolved(NamedTuple):
    """A config applied to a model.

    Attributes:
      fields: of the config (`config.complete`).
      model, source: the model, and the file for messages.
      adapted: the adapted modules by name, with the options of each (`Rules.options_of`).
      saved: the modules that are trained and saved whole.
      tokens: embedding's name -> indices of its trained rows.
    """

    fields: Mapping[str, Any]
    model: Model
    source: str
    adapted: dict[str, Any]
    saved: list[str]
    tokens: dict[str, list[int]]


def resolve(fields: Mapping[str, Any], model: Model, source: str, rules: Rules) -> Resolved:
    """The modules that a config adapts, with which options, and those that it saves, as PEFT decides.

    Args:
      fields: of `config.complete`.
      source: the file, for messages.

    Raises:
      ValueError: the config matches no module, or one that PEFT cannot adapt or save, or modules inside each other.
    """
    saved = [*(fields["modules_to_save"] or []), *TASK_HEADS.get(fields["task_type"], [])]
    matched = {**fields, "modules_to_save": saved, "target_modules": _targets(fields, model, rules)}
    names = [name for name in model.modules if _is_target(matched, name)]
    if not names:
        raise ValueError(
            f"{source}: no module of this model is meant by target_modules={matched['target_modules']!r}, "
            f"exclude_modules={fields.get('exclude_modules')!r}, "
            f"layers_to_transform={fields.get('layers_to_transform')!r}, modules_to_save={saved}"
        )
    for name in names:
        if (torch_class := model.modules[name].torch_class) not in rules.torch_classes:
            raise ValueError(
                f"{source}: target_modules means {name}, which {rules.name} cannot adapt: PEFT's {rules.name} goes "
                f"with {', '.join(rules.torch_classes)}, "
                f"not with {torch_class or 'a module without weights of its own'}"
            )
    adapted = {name: rules.options_of(matched, model, name) for name in names}
    wrappers = [name for name in model.modules if any(name.endswith(entry) for entry in saved) and model.below(name)]
    for name in wrappers:
        inner = [n for n in (*wrappers, *adapted) if n.startswith(f"{name}.")] + [n for n in adapted if n == name]
        if inner:
            raise ValueError(f"{source}: modules_to_save={saved} means {name}, which has {inner[0]} in it: unsupported")
    return Resolved(fields, model, source, adapted, wrappers, _tokens(fields, model, source))


def _targets(fields: Mapping[str, Any], model: Model, rules: Rules) -> list[str] | str:
    targets = fields["target_modules"]
    if targets is None:
        return list(rules.targets(model.architecture))
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
    if name in targets:
        return True
    return _ends_with(name, targets) and _in_layers(
        fields.get("layers_to_transform"), fields.get("layers_pattern"), name
    )


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


def rank_and_alpha(fields: Mapping[str, Any], name: str, alpha: str) -> tuple[int, float]:
    """Rank and alpha of a module: of the first pattern that matches, else of the fields `r` and (named) `alpha`."""

    def first(patterns: Mapping[str, Any], default: Any) -> Any:
        return next((v for key, v in patterns.items() if re.match(regex_of("rank_pattern", key), name)), default)

    return first(fields["rank_pattern"], fields["r"]), first(fields["alpha_pattern"], fields[alpha])


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
