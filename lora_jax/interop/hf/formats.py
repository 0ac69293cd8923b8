"""How model families are read and written: `register_format` makes a `model_type` of config.json known.

The interop file of a family registers its `Format` and its `Architecture`; `interop/hf/gpt2.py` is an example.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.interop.folders import Recipe
from lora_jax.interop.lazy import Lazy


@dataclasses.dataclass(frozen=True)
class Format:
    """The files of one family.

    Attributes:
      config_of: `(fields of config.json, source) -> config`.
      from_hf: `(fields, tensors, source, *, head, labels, tie, key) -> (model, {path: Lazy})` in the loop layout, with
        the arguments of `hf.load`.
      to_hf: `(model) -> (fields of config.json, {tensor: Recipe})`.
      ignored: names of tensors that are no parameters.
      head_needs: `(config) -> {end of a tensor's name: glob}` of what the config's head needs of the pretrained model,
        and files may lack.
    """

    config_of: Callable[[dict, str], Any]
    from_hf: Callable[..., tuple[Any, dict[str, Lazy]]]
    to_hf: Callable[[Any], tuple[dict, dict[str, Recipe]]]
    ignored: re.Pattern = re.compile(r"(?!)")
    head_needs: Callable[[Any], Mapping[str, str]] = lambda config: {}


_FORMATS: dict[str, Format] = {}


def register_format(model_type: str, format: Format) -> None:
    """Makes a `model_type`, which is the name of a family too, readable and writable, in place of an earlier one."""
    _FORMATS[model_type] = format


def format_of(model_type: Any, source: str) -> Format:
    """The format of a `model_type`; a ValueError where there is none."""
    if not isinstance(model_type, str) or model_type not in _FORMATS:
        raise ValueError(f"{source}: model_type {model_type!r} is none of {', '.join(sorted(_FORMATS))}")
    return _FORMATS[model_type]
