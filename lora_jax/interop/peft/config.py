"""PEFT's adapter_config.json: read strictly, written as PEFT writes it.

PEFT ignores unknown keys and accepts the string "false" as true and NaN as a number; here each is an error. A field
that changes the function in a way that this library does not compute is refused by name. The fields of one kind of
adapter are in its file in `kinds/`.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.interop.folders import inside
from lora_jax.interop.peft.patterns import steps

CONFIG = "adapter_config.json"
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
ALL_LINEAR = "all-linear"
# Modules that PEFT saves for a task, besides modules_to_save.
TASK_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
_LONGEST_PATTERN = 10_000
# In `patterns.steps`: some 0.1 s and 1 s for a name of 200 characters; the longest real names have 50.
_MOST_STEPS, _MOST_STEPS_TOGETHER = 100_000_000, 1_000_000_000
_PATTERNS = ("rank_pattern", "alpha_pattern")


class Field(NamedTuple):
    """One field of a config: its default, whether a value is valid, and what a valid value is, for messages."""

    default: Any
    is_valid: Callable[[Any], bool]
    expected: str


class Schema(NamedTuple):
    """The config of one kind of adapter.

    Attributes:
      fields: those that it may have, by name.
      refused: fields of variants that are not supported, with PEFT's default, the one value that is accepted.
      check: `(fields, source)`; raises where fields contradict each other, or mean something that is not supported.
      patterns: the fields of this kind alone whose string is a regular expression of a module's whole name.
    """

    fields: Mapping[str, Field]
    refused: Mapping[str, Any] = {}
    check: Callable[[Mapping[str, Any], str], None] = lambda fields, source: None
    patterns: tuple[str, ...] = ()


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number, of a size that float32 holds products of."""
    return (is_int(value) or isinstance(value, float)) and abs(value) < 1e30


def is_str(value: Any) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


def list_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check for lists of such values."""
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def dict_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check for objects of such values."""
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


def or_null(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check for null, or what passes one of the checks."""
    return lambda value: value is None or any(is_valid(value) for is_valid in checks)


BOOL = (lambda value: isinstance(value, bool), "true or false")
TEXT = (or_null(is_str), "a string or null")
NAMES = (or_null(is_str, list_of(is_str)), "a list of strings, a string or null")
OBJECT = (or_null(lambda value: isinstance(value, dict)), "an object or null")
RANK = (lambda value: is_int(value) and value >= 1, "a whole number from 1")
NUMBER = (is_number, "a finite number")
RATE = (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1")

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
    "rank_pattern": Field({}, dict_of(RANK[0]), "an object of whole numbers from 1"),
    "alpha_pattern": Field({}, dict_of(is_number), "an object of finite numbers"),
}
# Changes nothing: the order of a weight's axes follows from the module's class.
FAN_IN_FAN_OUT = {"fan_in_fan_out": Field(False, *BOOL)}


def find_config(folder: Path) -> Path:
    """The path of the folder's adapter_config.json.

    Raises:
      FileNotFoundError: there is no such folder or file; the message names subfolders that have one.
      ValueError: it is a symlink that leaves the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    path = inside(folder, CONFIG)
    if not path.is_file():
        below = sorted(config.parent.name for config in folder.glob(f"*/{CONFIG}"))
        hint = f"; its folders {', '.join(below)} have one: name one of them" if below else ": it is no PEFT adapter"
        raise FileNotFoundError(f"{path} is missing{hint}")
    return path


def complete(config: Mapping[str, Any], schema: Schema, source: str) -> dict[str, Any]:
    """The fields of a config as its file has them, with PEFT's defaults for the others.

    Raises:
      ValueError: a field of the wrong type or value, one that is not supported, an unknown one that is neither empty
        nor false, or fields that contradict each other.
    """
    for name, value in config.items():
        if name in schema.fields:
            if not schema.fields[name].is_valid(value):
                raise ValueError(f"{source}: {name}={value!r} is not {schema.fields[name].expected}")
        elif name in schema.refused:
            default = schema.refused[name]
            if value is not None and (value != default or type(value) is not type(default)):
                raise ValueError(f"{source}: {name}={value!r} is not supported here; only {default!r} is")
        elif name != "peft_type" and value:
            raise ValueError(f"{source}: the field {name}={value!r} is not known here; it may change the adapter")
    fields = {name: field.default for name, field in schema.fields.items()} | dict(config)
    schema.check(fields, source)
    _check_layers(fields, source)
    _check_patterns(fields, schema, source)
    return fields


def _check_layers(fields: Mapping[str, Any], source: str) -> None:
    if isinstance(fields["target_modules"], str):
        for name in LAYERS:
            if fields.get(name) is not None:
                raise ValueError(f"{source}: {name} goes with a list of target_modules, not with a string")
    if fields.get("layers_pattern") and fields["layers_to_transform"] is None:
        raise ValueError(f"{source}: layers_pattern needs layers_to_transform")


def regex_of(field: str, pattern: str) -> str:
    """The regular expression that PEFT makes of a field's string, for a module's whole name."""
    if field in _PATTERNS:
        return rf"(.*\.)?({pattern})$"
    if field == "modules_to_save":
        return rf"(^|.*\.){pattern}($|\..*)"
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." if field == "layers_pattern" else pattern


def _check_patterns(fields: Mapping[str, Any], schema: Schema, source: str) -> None:
    """A ValueError unless every string that PEFT gives to `re` compiles, and all together run in little time."""
    one_string = ("target_modules", "exclude_modules", *schema.patterns)  # in a list these are plain names
    patterns = {name: [fields[name]] for name in one_string if is_str(fields.get(name))}
    patterns |= {name: list(fields.get(name) or []) for name in (*_PATTERNS, "modules_to_save")}
    layers = fields.get("layers_pattern")
    patterns["layers_pattern"] = [layers] if is_str(layers) else list(layers or [])
    total = 0
    for name, strings in patterns.items():
        for pattern in strings:
            total += _count_steps(name, pattern, source)
            if total > _MOST_STEPS_TOGETHER:
                raise ValueError(f"{source}: its patterns up to {name}'s {pattern[:80]!r} could run for ever, together")


def _count_steps(field: str, pattern: str, source: str) -> int:
    """The most steps that matching a field's string with one module's name takes."""
    try:
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(f"it has {len(pattern)} characters, more than {_LONGEST_PATTERN}")
        with warnings.catch_warnings(action="error"):
            re.compile(regex_of(field, pattern))
        if (count := steps(regex_of(field, pattern))) > _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS:,} steps for one name")
        return count
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"{source}: {field} has {pattern[:80]!r}, no regular expression there ({error})") from error
    except ValueError as error:
        raise ValueError(
            f"{source}: {field} has the pattern {pattern[:80]!r}, which could run for ever ({error}): name the modules "
            "instead"
        ) from error


def to_json(config: Mapping[str, Any]) -> bytes:
    """The bytes of an adapter_config.json, as PEFT's `save_pretrained` writes them."""
    return json.dumps(config, indent=2, sort_keys=True).encode()


def new_config(schema: Schema, peft_type: str, **fields: Any) -> dict[str, Any]:
    """A config with all fields that PEFT writes, defaults where `fields` has none; `peft_version` stays null."""
    defaults = {name: field.default for name, field in schema.fields.items()}
    return defaults | dict(schema.refused) | {"peft_type": peft_type, "inference_mode": True} | fields
