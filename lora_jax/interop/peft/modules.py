"""The modules of a Hugging Face model by the names that PEFT matches, and which of them an adapter's config means.

PEFT decides by torch's modules what an adapter holds: containers, dropouts and all. Here the same list is made from our
parameters, and the same rules run over it (`tests/interop/test_peft_modules.py` compares them with PEFT's own).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax.core.arrays import is_adapted
from lora_jax.core.selection import flatten
from lora_jax.interop.peft.config import ALL_LINEAR, TASK_HEADS, pattern_of

_WEIGHT = {"Linear": "kernel", "Conv1D": "kernel", "Embedding": "embedding", "LayerNorm": "scale"}

_GPT2_LAYER = {  # kind and our name; "" for modules without weights of their own
    "ln_1": ("LayerNorm", "ln_1"),
    "attn": ("", ""),
    "attn.c_attn": ("Conv1D", "attn/{query,key,value}"),
    "attn.c_proj": ("Conv1D", "attn/out"),
    "attn.attn_dropout": ("", ""),
    "attn.resid_dropout": ("", ""),
    "ln_2": ("LayerNorm", "ln_2"),
    "mlp": ("", ""),
    "mlp.c_fc": ("Conv1D", "mlp/up"),
    "mlp.c_proj": ("Conv1D", "mlp/down"),
    "mlp.act": ("", ""),
    "mlp.dropout": ("", ""),
}
_GPT2 = {
    "wte": ("Embedding", "wte"),
    "wpe": ("Embedding", "wpe"),
    "drop": ("", ""),
    "h": ("", ""),
    "ln_f": ("LayerNorm", "ln_f"),
}
_ENCODER_LAYER = {
    "attention": ("", ""),
    "attention.self": ("", ""),
    "attention.self.query": ("Linear", "attn/query"),
    "attention.self.key": ("Linear", "attn/key"),
    "attention.self.value": ("Linear", "attn/value"),
    "attention.self.dropout": ("", ""),
    "attention.output": ("", ""),
    "attention.output.dense": ("Linear", "attn/out"),
    "attention.output.LayerNorm": ("LayerNorm", "ln_1"),
    "attention.output.dropout": ("", ""),
    "intermediate": ("", ""),
    "intermediate.dense": ("Linear", "mlp/up"),
    "intermediate.intermediate_act_fn": ("", ""),
    "output": ("", ""),
    "output.dense": ("Linear", "mlp/down"),
    "output.LayerNorm": ("LayerNorm", "ln_2"),
    "output.dropout": ("", ""),
}
_ENCODER = {
    "embeddings": ("", ""),
    "embeddings.word_embeddings": ("Embedding", "embeddings/word"),
    "embeddings.position_embeddings": ("Embedding", "embeddings/position"),
    "embeddings.token_type_embeddings": ("Embedding", "embeddings/token_type"),
    "embeddings.LayerNorm": ("LayerNorm", "embeddings/norm"),
    "embeddings.dropout": ("", ""),
    "encoder": ("", ""),
    "encoder.layer": ("", ""),
}
_POOLER = {"pooler": ("", ""), "pooler.dense": ("Linear", "pooler"), "pooler.activation": ("", "")}
_HEADS: dict[str, dict[str, tuple[str, str]]] = {
    "": {},
    "lm": {"lm_head": ("Linear", "lm_head")},
    "score": {"score": ("Linear", "score")},
    "roberta": {
        "classifier": ("", ""),
        "classifier.dense": ("Linear", "classifier/dense"),
        "classifier.dropout": ("", ""),
        "classifier.out_proj": ("Linear", "classifier/out"),
    },
    "bert": {"dropout": ("", ""), "classifier": ("Linear", "classifier")},
}


class Module(NamedTuple):
    """A module of the Hugging Face model.

    `kind` is torch's class, or "" where it holds no weight itself; `ours` our name, with braces where theirs is fused;
    `bias` whether it has one.
    """

    name: str
    kind: str
    ours: str
    bias: bool

    def path(self, which: str) -> str:
        """The path of its "weight" or "bias" in our parameters, with braces where it is fused."""
        return f"{self.ours}/{'bias' if which == 'bias' else _WEIGHT[self.kind]}"

    def paths(self, which: str) -> list[str]:
        """The paths of what stands side by side in its weight or bias."""
        return expanded(self.path(which))


def expanded(path: str) -> list[str]:
    """`h_0/attn/{query,key,value}/bias` as three paths, in that order."""
    start, _, rest = path.partition("{")
    inner, _, end = rest.partition("}")
    return [start + part + end for part in inner.split(",")]


class Model(NamedTuple):
    """A Hugging Face model as PEFT sees it.

    `prefix` stands before its backbone's names; `embedding` and `output` are the names of its token embedding and of
    the head of its language model ("" where there is none); `tied` whether our head is the embedding; `leaves` our
    parameters.
    """

    family: str
    prefix: str
    modules: dict[str, Module]
    embedding: str
    output: str
    tied: bool
    leaves: dict[str, Any]

    def shape(self, module: Module, which: str) -> tuple[int, ...]:
        """The shape of a weight or bias, with our order of axes and what is fused side by side."""
        shapes = [tuple(self.leaves[path].shape) for path in module.paths(which)]
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))

    @property
    def depth(self) -> int:
        """The number of layers."""
        return _depth(self.leaves)

    def below(self, name: str) -> list[Module]:
        """The modules with weights that are the named one or stand in it."""
        return [m for m in self.modules.values() if m.kind and (m.name == name or m.name.startswith(f"{name}."))]


_BACKBONE = re.compile(r"((?:\w+\.)*?)(?:h\.\d+|wte|wpe|ln_f|embeddings|encoder|pooler)\.")


def prefix_in(names: Iterable[str], source: str) -> str | None:
    """What stands before the backbone's names in the tensors of a file (without `base_model.model.`); None: no such."""
    prefixes = {found[1] for name in names if (found := _BACKBONE.match(name))}
    if len(prefixes) > 1:
        raise ValueError(f"{source}: its tensors' names begin with {' and '.join(sorted(map(repr, prefixes)))}")
    return prefixes.pop() if prefixes else None


def model_of(params: Any, prefix: str | None, scored: bool, source: str) -> Model:
    """The Hugging Face model that has these parameters.

    Args:
      params: of `models.gpt2` (perhaps with a head of the user's own, `score/kernel`) or `models.encoder`, looped.
      prefix: of `prefix_in`; None: that of the model with the head that params have.
      scored: whether a GPT-2 with `score/kernel` stands for a classifier rather than a language model.
      source: for messages.

    Raises:
      TypeError: adapted params. ValueError: params of the scanned layout, or of no model that is known here; the
        prefix of another model.
    """
    leaves = dict(flatten(params, is_adapted)[0])
    if wrong := [path for path, leaf in leaves.items() if is_adapted(leaf)]:
        raise TypeError(f"params are the base's, but {wrong[0]} is adapted")
    if any(path.startswith("h/") for path in leaves):
        raise ValueError("params are in the scanned layout; to_loop(params), and to_loop(delta), first")
    if "wte/embedding" in leaves:
        build, head = _gpt2, "score" if scored and "score/kernel" in leaves else "lm"
        prefixes = ["transformer."]
    elif "embeddings/word/embedding" in leaves:
        heads = {"bert": "classifier/kernel", "roberta": "classifier/out/kernel"}
        build, head = _encoder, next((name for name, path in heads.items() if path in leaves), "")
        prefixes = [f"{head}."] if head else ["", "roberta.", "bert."]
    else:
        raise ValueError(f"params are neither of models.gpt2 nor of models.encoder: they begin with {[*leaves][:3]}")
    prefix = prefixes[0] if prefix is None else prefix
    if prefix not in ("", *prefixes):
        raise ValueError(f"{source}: its tensors' names begin with {prefix!r}, these params' with {prefixes[-1]!r}")
    model = build(leaves, prefix, head if prefix else "")
    for module in model.modules.values():
        if module.ours and (lacking := [path for path in module.paths("weight") if path not in leaves]):
            raise ValueError(f"params lack {lacking[0]}")
    return model


def _gpt2(leaves: dict[str, Any], prefix: str, head: str) -> Model:
    modules = {"transformer": ("", "")} if prefix else {}
    modules |= {prefix + name: what for name, what in _GPT2.items()} | _layers(leaves, f"{prefix}h", _GPT2_LAYER)
    modules |= _HEADS[head]
    tied, output = "lm_head/kernel" not in leaves, "lm_head" if head == "lm" else ""
    if tied and output:
        modules[output] = ("Linear", "")
    return Model("gpt2", prefix, _named(modules, leaves), f"{prefix}wte", output, tied, leaves)


def _encoder(leaves: dict[str, Any], prefix: str, head: str) -> Model:
    modules = {prefix.removesuffix("."): ("", "")} if prefix else {}
    table = _ENCODER | (_POOLER if "pooler/kernel" in leaves else {})
    modules |= {prefix + name: what for name, what in table.items()}
    modules |= _layers(leaves, f"{prefix}encoder.layer", _ENCODER_LAYER) | _HEADS[head]
    word = f"{prefix}embeddings.word_embeddings"
    return Model(head or "encoder", prefix, _named(modules, leaves), word, "", False, leaves)


def _layers(leaves: Iterable[str], where: str, layer: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    modules: dict[str, tuple[str, str]] = {}
    for n in range(_depth(leaves)):
        modules[f"{where}.{n}"] = ("", "")
        modules |= {f"{where}.{n}.{name}": (kind, ours and f"h_{n}/{ours}") for name, (kind, ours) in layer.items()}
    return modules


def _depth(leaves: Iterable[str]) -> int:
    return 1 + max((int(found[1]) for path in leaves if (found := re.match(r"h_(\d+)/", path))), default=-1)


def _named(modules: Mapping[str, tuple[str, str]], leaves: Mapping[str, Any]) -> dict[str, Module]:
    made = {name: Module(name, kind, ours, False) for name, (kind, ours) in modules.items()}
    return {
        name: m._replace(bias=m.kind in ("Linear", "Conv1D", "LayerNorm") and m.paths("bias")[0] in leaves)
        for name, m in made.items()
    }


class Rules(NamedTuple):
    """Which modules one kind of adapter can have.

    `name` is the kind's; `kinds` are torch's classes; `gpt2` and `encoder` the target_modules where a config names
    none; `says` what a config says of one module: `(fields, model, its name)`.
    """

    name: str
    kinds: tuple[str, ...]
    gpt2: tuple[str, ...]
    encoder: tuple[str, ...]
    says: Callable[[Mapping[str, Any], Model, str], Any]


class Meant(NamedTuple):
    """What a config means on a model.

    `adapted`: module -> what `Rules.says` of it; `saved`: the modules that are saved whole; `tokens`: embedding -> its
    rows.
    """

    adapted: dict[str, Any]
    saved: list[str]
    tokens: dict[str, list[int]]


def resolve(fields: Mapping[str, Any], model: Model, source: str, rules: Rules) -> Meant:
    """Which modules a config adapts, and how, and which it saves, as PEFT decides.

    Args:
      fields: of `peft_config.complete`.
      source: the file, for messages.

    Raises:
      ValueError: no module is meant; one is meant that PEFT cannot adapt or save; modules within each other.
    """
    saved = [*(fields["modules_to_save"] or []), *TASK_HEADS.get(fields["task_type"], [])]
    fields = {**fields, "modules_to_save": saved, "target_modules": _targets(fields, model, rules)}
    names = [name for name in model.modules if _is_target(fields, name)]
    if not names:
        raise ValueError(
            f"{source}: no module of this model is meant by target_modules={fields['target_modules']!r}, "
            f"exclude_modules={fields.get('exclude_modules')!r}, "
            f"layers_to_transform={fields.get('layers_to_transform')!r}, modules_to_save={saved}"
        )
    for name in names:
        if (kind := model.modules[name].kind) not in rules.kinds:
            kinds = ", ".join(rules.kinds)
            raise ValueError(
                f"{source}: target_modules means {name}, which {rules.name} cannot adapt: PEFT's {rules.name} goes "
                f"with {kinds}, not with {kind or 'a module without weights of its own'}"
            )
    adapted = {name: rules.says(fields, model, name) for name in names}
    wrappers = [name for name in model.modules if any(name.endswith(entry) for entry in saved)]
    wrappers = [name for name in wrappers if model.below(name)]
    for name in wrappers:
        inner = [n for n in (*wrappers, *adapted) if n.startswith(f"{name}.")] + [n for n in adapted if n == name]
        if inner:
            raise ValueError(f"{source}: modules_to_save={saved} means {name}, which has {inner[0]} in it: unsupported")
    return Meant(adapted, wrappers, _tokens(fields, model, source))


def _targets(fields: Mapping[str, Any], model: Model, rules: Rules) -> list[str] | str:
    targets = fields["target_modules"]
    if targets is None:
        return list(rules.gpt2 if model.family == "gpt2" else rules.encoder)
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return targets
    head = next((name for name in ("score", "classifier") if name in model.modules), "")
    left_out = model.output or (head if fields["task_type"] == "SEQ_CLS" else "")
    return [m.name for m in model.modules.values() if m.kind in ("Linear", "Conv1D") and m.name != left_out]


def _is_target(fields: Mapping[str, Any], name: str) -> bool:
    """PEFT's `check_target_module_exists`."""
    excluded, targets = fields.get("exclude_modules"), fields["target_modules"]
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends(name, excluded)):
        return False
    if any(re.match(pattern_of("modules_to_save", entry), name) for entry in fields["modules_to_save"]):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return _ends(name, targets) and _in_layers(fields.get("layers_to_transform"), fields.get("layers_pattern"), name)


def _ends(name: str, entries: Iterable[str]) -> bool:
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _in_layers(layers: int | list[int] | None, patterns: str | list[str] | None, name: str) -> bool:
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or []
    found = None if patterns else re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    for pattern in patterns:
        if found := re.match(pattern_of("layers_pattern", pattern), name):
            break
    if not found:
        return False
    return int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)


def rank_and_alpha(fields: Mapping[str, Any], name: str, alpha: str) -> tuple[int, float]:
    """Those of a module: of the first pattern that matches, else of the fields `r` and `alpha`."""

    def first(patterns: Mapping[str, Any], otherwise: Any) -> Any:
        return next((v for key, v in patterns.items() if re.match(pattern_of("rank_pattern", key), name)), otherwise)

    return first(fields["rank_pattern"], fields["r"]), first(fields["alpha_pattern"], fields[alpha])


def _tokens(fields: Mapping[str, Any], model: Model, source: str) -> dict[str, list[int]]:
    said = fields.get("trainable_token_indices")
    if said is None:
        return {}
    tokens: dict[str, list[int]] = {}
    for entry, rows in (said if isinstance(said, dict) else {model.embedding: said}).items():
        found = [module for name, module in model.modules.items() if name.endswith(entry)]
        if wrong := [module.name for module in found if module.kind != "Embedding"]:
            raise ValueError(f"{source}: trainable_token_indices means {wrong[0]}, which is no embedding: unsupported")
        if not found:
            raise ValueError(f"{source}: trainable_token_indices means {entry!r}, which this model does not have")
        tokens |= {module.name: rows for module in found}
    for name, rows in tokens.items():
        table = model.shape(model.modules[name], "weight")[0]
        if not rows or len(set(rows)) < len(rows) or max(rows) >= table:
            raise ValueError(f"{source}: trainable_token_indices={rows} of {name}: none, one twice, or beyond {table}")
    return tokens
