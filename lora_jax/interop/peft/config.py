"""PEFT's adapter_config.json: read strictly, written as PEFT writes it.

PEFT ignores unknown keys and accepts the string "false" as true and NaN as a number; here each is an error. A field
that changes the function in a way that this library does not compute is refused by name. The fields of one kind of
adapter are in its file in `kinds/`.
"""

import collections
import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from types import NoneType
from typing import Any

import numpy as np

from lora_jax.interop.peft.kind import Field, Kind
from lora_jax.interop.peft.patterns import steps, steps_with

TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
ALL_LINEAR = "all-linear"
# Modules that PEFT saves for a task, besides modules_to_save.
_HEADS = ["classifier", "score"]
TASK_HEADS = {"SEQ_CLS": _HEADS, "TOKEN_CLS": _HEADS, "QUESTION_ANS": ["qa_outputs"]}
_LONGEST_PATTERN = 10_000
# In `patterns.steps`: some 0.1 s and 1 s for a name of 200 characters; the longest real names have 50.
_MOST_STEPS, _MOST_STEPS_TOGETHER = 100_000_000, 1_000_000_000
_PATTERNS = ("rank_pattern", "alpha_pattern")

Check = Callable[[Any], bool]


def of_type(*types: type) -> Check:
    """A check for values of JSON of these types; true and false are no numbers."""
    return lambda value: type(value) in types


def list_of(is_valid: Check) -> Check:
    """A check for lists of such values."""
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def dict_of(is_valid: Check) -> Check:
    """A check for objects of such values."""
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


def or_null(*checks: Check) -> Check:
    """A check for null, or what passes one of the checks."""
    return lambda value: value is None or any(is_valid(value) for is_valid in checks)


is_int, is_str = of_type(int), of_type(str)


def is_number(value: Any) -> bool:
    """Whether a value is a number, of a size that float32 holds products of."""
    return type(value) in (int, float) and abs(value) < 1e30


BOOL = (of_type(bool), "true or false")
TEXT = (or_null(is_str), "a string or null")
NAMES = (or_null(is_str, list_of(is_str)), "a list of strings, a string or null")
OBJECT = (of_type(dict, NoneType), "an object or null")
RANK = (lambda value: is_int(value) and value >= 1, "a whole number from 1")
NUMBER = (is_number, "a finite number")
RATE = (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1")

COMMON: dict[str, Field] = {  # of every kind
    "task_type": Field(None, or_null(lambda value: value in TASKS), f"null or one of {', '.join(TASKS)}"),
    "target_modules": Field(None, *NAMES),
    "modules_to_save": Field(None, or_null(list_of(is_str)), "a list of strings or null"),
    "inference_mode": Field(False, *BOOL),
    **dict.fromkeys(("peft_version", "base_model_name_or_path", "revision"), Field(None, *TEXT)),
    "auto_mapping": Field(None, *OBJECT),
}
EXCLUDE = {"exclude_modules": Field(None, *NAMES)}
LAYERS = {
    "layers_to_transform": Field(None, or_null(is_int, list_of(is_int)), "a list of numbers, a number or null"),
    "layers_pattern": Field(None, *NAMES),
}
RANKED = {  # of kinds whose modules have ranks, together with the kind's own field for alpha
    **COMMON,
    **EXCLUDE,
    **LAYERS,
    "r": Field(8, *RANK),
    "rank_pattern": Field({}, dict_of(RANK[0]), "an object of whole numbers from 1"),
    "alpha_pattern": Field({}, dict_of(is_number), "an object of finite numbers"),
}
# Changes nothing: the order of a weight's axes follows from the module's class.
FAN_IN_FAN_OUT = {"fan_in_fan_out": Field(False, *BOOL)}


def complete(config: Mapping[str, Any], kind: Kind, source: str, names: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a config as its file has them, with PEFT's defaults for the others; a ValueError for a field of the
    wrong type or value, one that is not supported, an unknown one that is neither empty nor false, or fields that
    contradict each other. Patterns that would be slow with some name are counted with the `names` of the modules."""
    for name, value in config.items():
        if name in kind.fields:
            if not kind.fields[name].is_valid(value):
                raise ValueError(f"{source}: {name}={value!r} is not {kind.fields[name].expected}")
        elif name in kind.refused:
            default = kind.refused[name]
            if value is not None and (value != default or type(value) is not type(default)):
                raise ValueError(f"{source}: {name}={value!r} is not supported here; only {default!r} is")
        elif name != "peft_type" and value:
            raise ValueError(f"{source}: the field {name}={value!r} is not known here; it may change the adapter")
    fields = {name: field.default for name, field in kind.fields.items()} | dict(config)
    kind.check(fields, source)
    if isinstance(fields["target_modules"], str):
        for name in LAYERS:
            if fields.get(name) is not None:
                raise ValueError(f"{source}: {name} goes with a list of target_modules, not with a string")
    if fields.get("layers_pattern") and fields["layers_to_transform"] is None:
        raise ValueError(f"{source}: layers_pattern needs layers_to_transform")
    _check_patterns(fields, kind, source, names)
    return fields


def regex_of(field: str, pattern: str) -> str:
    """The regular expression that PEFT makes of a field's string, for a module's whole name."""
    if field in _PATTERNS:
        return rf"(.*\.)?({pattern})$"
    if field == "modules_to_save":
        return rf"(^|.*\.){pattern}($|\..*)"
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." if field == "layers_pattern" else pattern


def _check_patterns(fields: Mapping[str, Any], kind: Kind, source: str, names: Collection[str]) -> None:
    """A ValueError unless every string that PEFT gives to `re` compiles, and all together run in little time."""
    one_string = ("target_modules", "exclude_modules", *kind.patterns)  # in a list these are plain names
    patterns = [(name, fields[name]) for name in one_string if is_str(fields.get(name))]
    patterns += [(name, pattern) for name in (*_PATTERNS, "modules_to_save") for pattern in fields.get(name) or []]
    layers = fields.get("layers_pattern")
    patterns += [("layers_pattern", pattern) for pattern in ([layers] if is_str(layers) else layers or [])]
    total = 0.0
    for name, pattern in patterns:
        total += _count_steps(name, pattern, source, names)
        if total > _MOST_STEPS_TOGETHER:
            raise ValueError(f"{source}: its patterns up to {name}'s {pattern[:80]!r} could run for ever, together")


def _count_steps(field: str, pattern: str, source: str, names: Collection[str]) -> float:
    """The most steps that matching a field's string with one module's name takes; of one that is slow with some name,
    those with all these names, if there are any."""
    try:
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(f"it has {len(pattern)} characters, more than {_LONGEST_PATTERN}")
        with warnings.catch_warnings(action="error"):
            re.compile(regex_of(field, pattern))
        try:
            if (count := steps(regex_of(field, pattern))) > _MOST_STEPS:
                raise ValueError(f"more than {_MOST_STEPS:,} steps for one name")
            return count
        except ValueError:
            if not names:
                raise
        return _with_names(regex_of(field, pattern), names)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"{source}: {field} has {pattern[:80]!r}, no regular expression there ({error})") from error
    except ValueError as error:
        what = f"{field} has the pattern {pattern[:80]!r}, which could run for ever"
        raise ValueError(f"{source}: {what} ({error}): name the modules instead") from error


def _with_names(regex: str, names: Collection[str]) -> float:
    """The most steps that matching with all names takes; a ValueError where they are too many."""
    if (count := steps_with(regex, names, _MOST_STEPS)) > _MOST_STEPS:
        raise ValueError(f"more than {_MOST_STEPS:,} steps for the names of the modules")
    return count


def rank_and_alpha(fields: Mapping[str, Any], name: str, alpha: str) -> tuple[int, float]:
    """Rank and alpha of a module: of the first pattern that matches, else of the fields `r` and (named) `alpha`."""

    def first(patterns: Mapping[str, Any], default: Any) -> Any:
        return next((v for key, v in patterns.items() if re.match(regex_of("rank_pattern", key), name)), default)

    return first(fields["rank_pattern"], fields["r"]), first(fields["alpha_pattern"], fields[alpha])


def to_json(config: Mapping[str, Any]) -> bytes:
    """The bytes of an adapter_config.json, as PEFT's `save_pretrained` writes them."""
    return json.dumps(config, indent=2, sort_keys=True).encode()


def new_config(kind: Kind, peft_type: str, **fields: Any) -> dict[str, Any]:
    """A config with all fields that PEFT writes, defaults where `fields` has none; `peft_version` stays null."""
    defaults = {name: field.default for name, field in kind.fields.items()}
    return defaults | dict(kind.refused) | {"peft_type": peft_type, "inference_mode": True} | fields


def alpha_of(scale: np.float32, divisor: float) -> float:
    """The alpha with the fewest digits whose float32 quotient by `divisor` is this scale."""
    for digits in range(1, 18):
        alpha = float(f"{float(scale) * divisor:.{digits}g}")
        if np.float32(alpha / divisor) == scale:
            break
    return int(alpha) if alpha.is_integer() else alpha


def with_patterns(options: Mapping[str, tuple[int, float]], alpha_field: str) -> dict[str, Any]:
    """The config fields for (rank, alpha) of each module: the most frequent values, and patterns for the others."""
    rank, alpha = (collections.Counter(values).most_common(1)[0][0] for values in zip(*options.values(), strict=True))
    return {
        "r": rank,
        alpha_field: alpha,
        "rank_pattern": {name: r for name, (r, _) in options.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in options.items() if a != alpha},
    }
