"""What config.json says of a folder, compared with the folder's tensors, before anything is made of either."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from lora_jax.interop.folders import first_ten
from lora_jax.interop.hf.families import Format, HeadOptions
from lora_jax.interop.lazy import Lazy
from lora_jax.models.family import dimensions_of

_TASK = re.compile(r"(LMHeadModel|DoubleHeadsModel|For[A-Z]\w*|Model)$")  # what ends the name of an architecture


def check_sizes(format: Format, config: Any, tensors: Mapping[str, Lazy], source: str) -> None:
    """A ValueError where a size of config.json is not that of the tensors. Shapes and names of all layers are made from
    the config after that: they are no more than the file has."""
    stack = re.compile(rf"(?:^|\.){re.escape(format.architecture.layers[0])}\.(\d+)\.")
    layers = len({match[1] for name in tensors if (match := stack.search(name))})
    if (depth := dimensions_of(config).depth) != layers:
        raise ValueError(f"{source}: config.json says {format.depth} {depth}, but the tensors are of {layers} layers")
    embedding = f"{format.architecture.embedding}.weight"
    for field, (ours, tensor, axis) in {"vocab_size": ("vocab_size", embedding, 0), **format.sizes}.items():
        name = next((name for name in tensors if f".{name}".endswith(f".{tensor}")), None)
        size, shape = getattr(config, ours), tensors[name].shape if name else ()
        if axis < len(shape) and shape[axis] != size:
            what = ("rows", "columns")[axis]
            raise ValueError(f"{source}: config.json says {field} {size}, but {name} has {shape[axis]} {what}")


def without_other_head(
    format: Format, fields: Mapping[str, Any], tensors: dict[str, Lazy], source: str, options: HeadOptions
) -> dict[str, Lazy]:
    """The tensors; where config.json names a model with a head that is not read here, those without that head.

    Raises:
      ValueError: there is such a head, and no other one is asked for.
    """
    names = fields.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source}: config.json has architectures={names!r}, not a list of names")
    tasks = {name: match[1] for name in names if (match := _TASK.search(name))}
    other = [name for name, task in tasks.items() if task not in format.tasks]
    if not other or not format.tasks:
        return tensors
    if options.head is None:
        raise ValueError(
            f"{source}: config.json says {', '.join(other)}, whose head is not read here: of this family only "
            f"{', '.join(format.tasks)}. {format.other_head}"
        )
    architecture = format.architecture
    heads = [*architecture.classifiers, *([architecture.lm_head] if architecture.lm_head else [])]
    modules = [*architecture.backbone, architecture.layers[0], *(n for m in architecture.optional.values() for n in m)]
    modules += architecture.lm_head.modules if architecture.lm_head else []
    kept = {prefix + name.partition(".")[0] for name in modules for prefix in ("", *(head.prefix for head in heads))}
    used = {name: x for name, x in tensors.items() if any(name.startswith(f"{start}.") for start in kept)}
    head = first_ten([name for name in tensors if name not in used])
    logging.warning("%s is a %s: its head is not used: %s", source, ", ".join(other), head)
    return used


_HEAD = ("id2label", "label2id", "num_labels", "problem_type")
_ELSEWHERE = ("torch_dtype", "auto_map")  # the older name of "dtype"; files that are not written


def with_source(format: Format, fields: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model's config.json, and those of the model that it was made from that it says nothing of. What
    the source says of its labels stays where the head is of the same kind and size."""
    same_head = "id2label" not in fields or _head(source, fields["architectures"]) == _head(fields)
    left_out = {*_ELSEWHERE, *format.aliases, *(() if same_head else _HEAD)}
    of_source = {*format.of_source, *(_HEAD if same_head else ())}
    kept = {name: value for name, value in source.items() if name not in left_out}
    return kept | {name: value for name, value in fields.items() if name not in of_source}


def _head(fields: Mapping[str, Any], architectures: Any = None) -> tuple[Any, Any, bool]:
    """The architectures, the number of labels, and whether they are numbers."""
    names = fields.get("id2label")
    labels = len(names) if isinstance(names, dict) else fields.get("num_labels", 2)
    regression = labels == 1 or fields.get("problem_type") == "regression"
    return fields.get("architectures") or architectures, labels, regression
