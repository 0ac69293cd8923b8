"""PEFT's adapter_config.json: read strictly, written as PEFT writes it.

PEFT drops keys it does not know, takes the string "false" for true and NaN for a number; here each is an error. What
changes the function in a way that this library does not compute is refused by the name of its field.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.interop import peft_patterns
from lora_jax.interop.folders import inside, read_json

CONFIG = "adapter_config.json"
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
ALL_LINEAR = "all-linear"
# Modules that PEFT saves for a task without being told.
TASK_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
_INITS = ("gaussian", "eva", "orthogonal", "mica")  # these leave the base as it is
_CHANGES_BASE = re.compile(r"(pissa|olora|loftq|corda|lora_ga)", re.IGNORECASE)
_LONGEST_PATTERN = 10_000
# Of `peft_patterns.steps`: some 0.1 s and 1 s for a name of 200 characters; the longest that there are have 50.
_MOST_STEPS, _MOST_STEPS_TOGETHER = 100_000_000, 1_000_000_000


class _Field(NamedTuple):
    default: Any
    right: Callable[[Any], bool]
    what: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) < 1e30  # float32 holds its products


def _is_rank(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(right, value))


def _dict_of(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(right, value.values()))


def _or_null(*rights: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or any(right(value) for right in rights)


_BOOL = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (_or_null(_is_str), "a string or null")
_NAMES = (_or_null(_is_str, _list_of(_is_str)), "a list of strings, a string or null")
_OBJECT = (_or_null(lambda value: isinstance(value, dict)), "an object or null")
_IDS = _list_of(lambda value: _is_int(value) and value >= 0)

_FIELDS: dict[str, _Field] = {
    "task_type": _Field(None, _or_null(lambda value: value in TASKS), f"null or one of {', '.join(TASKS)}"),
    "r": _Field(8, _is_rank, "a whole number from 1"),
    "lora_alpha": _Field(8, _is_number, "a finite number"),
    "lora_dropout": _Field(0.0, lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "use_rslora": _Field(False, *_BOOL),
    "rank_pattern": _Field({}, _dict_of(_is_rank), "an object of whole numbers from 1"),
    "alpha_pattern": _Field({}, _dict_of(_is_number), "an object of finite numbers"),
    "target_modules": _Field(None, *_NAMES),
    "exclude_modules": _Field(None, *_NAMES),
    "layers_to_transform": _Field(None, _or_null(_is_int, _list_of(_is_int)), "a list of numbers, a number or null"),
    "layers_pattern": _Field(None, *_NAMES),
    "modules_to_save": _Field(None, _or_null(_list_of(_is_str)), "a list of strings or null"),
    "trainable_token_indices": _Field(None, _or_null(_IDS, _dict_of(_IDS)), "ids, an object of ids or null"),
    "bias": _Field("none", lambda value: value in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "lora_bias": _Field(False, *_BOOL),
    # These say nothing of the function: the orientation follows the kind of the module.
    "fan_in_fan_out": _Field(False, *_BOOL),
    "inference_mode": _Field(False, *_BOOL),
    "init_lora_weights": _Field(True, lambda value: isinstance(value, bool | str), "true, false or a name"),
    "peft_version": _Field(None, *_TEXT),
    "base_model_name_or_path": _Field(None, *_TEXT),
    "revision": _Field(None, *_TEXT),
    "megatron_core": _Field("megatron.core", *_TEXT),
    "auto_mapping": _Field(None, *_OBJECT),
    "loftq_config": _Field({}, *_OBJECT),
    "eva_config": _Field(None, *_OBJECT),
    "corda_config": _Field(None, *_OBJECT),
}
# Fields of variants that are not computed here, with PEFT's default.
_REFUSED: dict[str, Any] = {
    "use_dora": False,
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


def read(path: Path) -> dict[str, Any]:
    """The config as it stands in the file, checked (`complete`)."""
    found = read_json(path)
    complete(found, str(path))
    return found


def complete(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The config with PEFT's defaults for what it does not say.

    Raises:
      ValueError: a field of the wrong type or value, one that is not supported, or one that is not known and says
        something; fields that contradict each other; the adapter is of another kind than LoRA.
    """
    _check_type(found, source)
    for name, value in found.items():
        if name in _FIELDS:
            if not _FIELDS[name].right(value):
                raise ValueError(f"{source}: {name}={value!r} is not {_FIELDS[name].what}")
        elif name in _REFUSED:
            if value is not None and (value != _REFUSED[name] or type(value) is not type(_REFUSED[name])):
                raise ValueError(f"{source}: {name}={value!r} is not supported here; only {_REFUSED[name]!r} is")
        elif name != "peft_type" and value:
            raise ValueError(f"{source}: the field {name}={value!r} is not known here; it may change the adapter")
    fields = {name: field.default for name, field in _FIELDS.items()} | dict(found)
    _check_init(fields["init_lora_weights"], source)
    _check_together(fields, source)
    _check_patterns(fields, source)
    return fields


def _check_type(found: Mapping[str, Any], source: str) -> None:
    kind = found.get("peft_type")
    if kind == "LORA":
        return
    if isinstance(kind, str) and kind.upper() == "LORA":
        raise ValueError(f"{source}: peft_type {kind!r} must be written 'LORA'")
    if not isinstance(kind, str):
        raise ValueError(f"{source}: peft_type is {kind!r}: it is no adapter of PEFT's")
    raise ValueError(f"{source}: peft_type {kind!r} is not supported; only LORA is read here")


def _check_init(value: Any, source: str) -> None:
    if isinstance(value, str) and _CHANGES_BASE.match(value):
        raise ValueError(
            f"{source}: init_lora_weights={value!r} changes the base's weights on loading, which is not supported; in "
            "PEFT, save_pretrained(folder, path_initial_model_for_weight_conversion=...) makes a plain adapter of it"
        )
    if isinstance(value, str) and value.lower() not in _INITS:
        raise ValueError(f"{source}: init_lora_weights={value!r} is none of true, false, {', '.join(_INITS)}")


def _check_together(fields: Mapping[str, Any], source: str) -> None:
    if isinstance(fields["target_modules"], str):
        for name in ("layers_to_transform", "layers_pattern"):
            if fields[name] is not None:
                raise ValueError(f"{source}: {name} goes with a list of target_modules, not with a string")
    if fields["layers_pattern"] and fields["layers_to_transform"] is None:
        raise ValueError(f"{source}: layers_pattern needs layers_to_transform")
    if fields["lora_bias"] and not isinstance(fields["init_lora_weights"], bool):
        raise ValueError(f"{source}: lora_bias goes with init_lora_weights true or false only")
    if fields["lora_bias"] and fields["bias"] != "none":
        raise ValueError(
            f"{source}: lora_bias with bias={fields['bias']!r} trains two arrays for one bias: unsupported"
        )


def pattern_of(field: str, said: str) -> str:
    """The regular expression that PEFT makes of a field's string, for a module's whole name."""
    if field in ("rank_pattern", "alpha_pattern"):
        return rf"(.*\.)?({said})$"
    if field == "modules_to_save":
        return rf"(^|.*\.){said}($|\..*)"
    return rf"(?:^|.*?\.){said}\.(?P<idx>\d+)\." if field == "layers_pattern" else said


def _check_patterns(fields: Mapping[str, Any], source: str) -> None:
    """The strings that PEFT gives to `re`: each must compile, and none may run for ever, nor all together."""
    named = {name: [fields[name]] for name in ("target_modules", "exclude_modules") if _is_str(fields[name])}
    named |= {name: list(fields[name] or []) for name in ("rank_pattern", "alpha_pattern", "modules_to_save")}
    layers = fields["layers_pattern"]
    named["layers_pattern"] = [layers] if _is_str(layers) else list(layers or [])
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


def new(**said: Any) -> dict[str, Any]:
    """A config with all fields that PEFT writes: what is said, and defaults; `peft_version` is for PEFT to fill in."""
    defaults = {name: field.default for name, field in _FIELDS.items()}
    return defaults | _REFUSED | {"peft_type": "LORA", "inference_mode": True} | said
