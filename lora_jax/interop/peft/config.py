"""PEFT's adapter_config.json: read strictly, written as PEFT writes it.

PEFT drops keys it does not know, takes the string "false" for true and NaN for a number; here each is an error. What
changes the function in a way that this library does not compute is refused by the name of its field. What is of one
kind of adapter alone stands in its own file (`peft_lora`, `peft_vera`, ...).
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.interop.folders import inside
from lora_jax.interop.peft import patterns as peft_patterns

CONFIG = "adapter_config.json"
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
ALL_LINEAR = "all-linear"
# Modules that PEFT saves for a task without being told.
TASK_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
_LONGEST_PATTERN = 10_000
# Of `peft_patterns.steps`: some 0.1 s and 1 s for a name of 200 characters; the longest that there are have 50.
_MOST_STEPS, _MOST_STEPS_TOGETHER = 100_000_000, 1_000_000_000
_PATTERNS = ("rank_pattern", "alpha_pattern")


class Field(NamedTuple):
    """What a field is where nothing is said, whether a value is right, and what it should be."""

    default: Any
    right: Callable[[Any], bool]
    what: str


class Schema(NamedTuple):
    """The config of one kind of adapter.

    `fields` are those that it may have; `refused` those of variants that are not computed here, with PEFT's default;
    `check` raises where fields contradict each other, or mean something that is not computed here.
    """

    fields: Mapping[str, Field]
    refused: Mapping[str, Any]
    check: Callable[[Mapping[str, Any], str], None]


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return (is_int(value) or isinstance(value, float)) and abs(value) < 1e30  # float32 holds its products


def is_rank(value: Any) -> bool:
    return is_int(value) and value >= 1


def is_rate(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def is_str(value: Any) -> bool:
    return isinstance(value, str)


def list_of(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(right, value))


def dict_of(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(right, value.values()))


def or_null(*rights: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or any(right(value) for right in rights)


BOOL = (lambda value: isinstance(value, bool), "true or false")
TEXT = (or_null(is_str), "a string or null")
NAMES = (or_null(is_str, list_of(is_str)), "a list of strings, a string or null")
OBJECT = (or_null(lambda value: isinstance(value, dict)), "an object or null")
RANK = (is_rank, "a whole number from 1")
NUMBER = (is_number, "a finite number")
RATE = (is_rate, "a number from 0 to below 1")

COMMON: dict[str, Field] = {  # of every kind
    "task_type": Field(None, or_null(lambda value: value in TASKS), f"null or one of {', '.join(TASKS)}"),
    "target_modules": Field(None, *NAMES),
    "modules_to_save": Field(None, or_null(list_of(is_str)), "a list of strings or null"),
    "inference_mode": Field(False, *BOOL),
    "peft_version": Field(None, *TEXT),
    "base_model_name_or_path": Field(None, *TEXT),
    "revision": Field(None, *TEXT),
    "auto_mapping": Field(None, *OBJECT),
}
EXCLUDE = {"exclude_modules": Field(None, *NAMES)}
LAYERS = {
    "layers_to_transform": Field(None, or_null(is_int, list_of(is_int)), "a list of numbers, a number or null"),
    "layers_pattern": Field(None, *NAMES),
}
PATTERNS = {
    "rank_pattern": Field({}, dict_of(is_rank), "an object of whole numbers from 1"),
    "alpha_pattern": Field({}, dict_of(is_number), "an object of finite numbers"),
}
# It says nothing of the function: the orientation follows the kind of the module.
FAN_IN_FAN_OUT = {"fan_in_fan_out": Field(False, *BOOL)}


def find(folder: Path) -> Path:
    """The folder's adapter_config.json.

    Raises:
      FileNotFoundError: there is no such folder, or none in it; it says where one is, a level below.
      ValueError: it is a symlink that leaves the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    path = inside(folder, CONFIG)
    if not path.is_file():
        below = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
        hint = f"; its folders {', '.join(below)} have one: name one of them" if below else ": it is no PEFT adapter"
        raise FileNotFoundError(f"{path} is missing{hint}")
    return path


def complete(found: Mapping[str, Any], schema: Schema, source: str) -> dict[str, Any]:
    """A config as it stands in its file, with PEFT's defaults for what it does not say.

    Raises:
      ValueError: a field of the wrong type or value, one that is not supported, or one that is not known and says
        something; fields that contradict each other.
    """
    for name, value in found.items():
        if name in schema.fields:
            if not schema.fields[name].right(value):
                raise ValueError(f"{source}: {name}={value!r} is not {schema.fields[name].what}")
        elif name in schema.refused:
            default = schema.refused[name]
            if value is not None and (value != default or type(value) is not type(default)):
                raise ValueError(f"{source}: {name}={value!r} is not supported here; only {default!r} is")
        elif name != "peft_type" and value:
            raise ValueError(f"{source}: the field {name}={value!r} is not known here; it may change the adapter")
    fields = {name: field.default for name, field in schema.fields.items()} | dict(found)
    schema.check(fields, source)
    _check_layers(fields, source)
    _check_patterns(fields, source)
    return fields


def _check_layers(fields: Mapping[str, Any], source: str) -> None:
    if isinstance(fields["target_modules"], str):
        for name in LAYERS:
            if fields.get(name) is not None:
                raise ValueError(f"{source}: {name} goes with a list of target_modules, not with a string")
    if fields.get("layers_pattern") and fields["layers_to_transform"] is None:
        raise ValueError(f"{source}: layers_pattern needs layers_to_transform")


def pattern_of(field: str, said: str) -> str:
    """The regular expression that PEFT makes of a field's string, for a module's whole name."""
    if field in _PATTERNS:
        return rf"(.*\.)?({said})$"
    if field == "modules_to_save":
        return rf"(^|.*\.){said}($|\..*)"
    return rf"(?:^|.*?\.){said}\.(?P<idx>\d+)\." if field == "layers_pattern" else said


def _check_patterns(fields: Mapping[str, Any], source: str) -> None:
    """The strings that PEFT gives to `re`: each must compile, and none may run for ever, nor all together."""
    whole = ("target_modules", "exclude_modules", "feedforward_modules")  # a list of names is none of patterns
    named = {name: [fields[name]] for name in whole if is_str(fields.get(name))}
    named |= {name: list(fields.get(name) or []) for name in (*_PATTERNS, "modules_to_save")}
    layers = fields.get("layers_pattern")
    named["layers_pattern"] = [layers] if is_str(layers) else list(layers or [])
    together = 0
    for name, patterns in named.items():
        for said in patterns:
            together += _steps(name, said, source)
            if together > _MOST_STEPS_TOGETHER:
                raise ValueError(f"{source}: its patterns up to {name}'s {said[:80]!r} could run for ever, together")


def _steps(field: str, said: str, source: str) -> int:
    """The most steps that a field's string takes with one name of a module."""
    try:
        if len(said) > _LONGEST_PATTERN:
            raise ValueError(f"it has {len(said)} characters, more than {_LONGEST_PATTERN}")
        with warnings.catch_warnings(action="error"):
            re.compile(pattern_of(field, said))
        if (steps := peft_patterns.steps(pattern_of(field, said))) > _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS:,} steps for one name")
        return steps
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"{source}: {field} has {said[:80]!r}, no regular expression there ({error})") from error
    except ValueError as error:
        raise ValueError(
            f"{source}: {field} has the pattern {said[:80]!r}, which could run for ever ({error}): name the modules "
            "instead"
        ) from error


def written(fields: Mapping[str, Any]) -> bytes:
    """The bytes of an adapter_config.json, as PEFT's `save_pretrained` makes them, but for lists in no order."""
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def new(schema: Schema, peft_type: str, **said: Any) -> dict[str, Any]:
    """A config with all fields that PEFT writes: what is said, and defaults; `peft_version` is for PEFT to fill in."""
    defaults = {name: field.default for name, field in schema.fields.items()}
    return defaults | dict(schema.refused) | {"peft_type": peft_type, "inference_mode": True} | said
