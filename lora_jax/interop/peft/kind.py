"""What one kind of PEFT adapter (a `peft_type`) defines; reading and writing are the same code for all kinds."""

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.arrays import Tuned
from lora_jax.core.selection import Selection, select
from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.peft.config import Schema
from lora_jax.interop.peft.modules import Model, Resolved, Rules
from lora_jax.interop.peft.tensors import Tensor
from lora_jax.methods.bias_delta import BiasDelta
from lora_jax.methods.token_rows import TokenRows

# so that a method of a looped model also selects params in the scanned layout
_SCANNED = {"h/**/kernel": "sio", "h/**/{bias,scale}": "so"}


class Adaptation(NamedTuple):
    """A method of this library on a model, as `Kind.export` gets it.

    Attributes:
      spec, delta: the method's spec and the delta.
      model: the model.
      adapted: adapted leaves of the kind by path, for each module.
      shift: shifted biases by path, for each module.
      rows: embeddings with trained rows by module.
      tuned: leaves that train themselves by path.
    """

    spec: Mapping[str, Any]
    delta: Delta
    model: Model
    adapted: dict[str, dict[str, Any]]
    shift: dict[str, dict[str, BiasDelta]]
    rows: dict[str, TokenRows]
    tuned: dict[str, Tuned]


class Kind(NamedTuple):
    """One `peft_type`.

    Attributes:
      schema: of its config.
      rules: which modules it adapts.
      tensors: `(resolved) -> tensors of the adapted modules`, a list for each module.
      method: `(resolved) -> (transforms, delta)`: the transforms of the adapted modules, and the factors that are made
        from the base rather than read from the file.
      leaves: the classes of adapted arrays that it can hold.
      export: `(adaptation) -> (delta, config fields)`: the factors that `tensors` of that config will look for; raises
        a ValueError for what PEFT cannot represent.
    """

    schema: Schema
    rules: Rules
    tensors: Callable[[Resolved], list[list[Tensor]]]
    method: Callable[[Resolved], tuple[list[ParamTransform], Delta]]
    leaves: tuple[type[Any], ...]
    export: Callable[[Adaptation], tuple[Delta, dict[str, Any]]]


# --- paths --------------------------------------------------------------------------------------------------------


def selected(paths: Iterable[str], model: Model) -> Selection:
    """The selection of these paths, which may have braces, in either layout."""
    return select(*globs_of(paths, model), axes=_SCANNED)


def by_glob(values: Mapping[str, Any], model: Model) -> Any:
    """`{path: value}` as one value where all are equal, else as `{glob: value}`."""
    distinct = list(dict.fromkeys(values.values()))
    if len(distinct) == 1:
        return distinct[0]
    return {glob: v for v in distinct for glob in globs_of([path for path in values if values[path] == v], model)}


def ranked(options: Mapping[str, tuple[int, float]], model: Model) -> dict[str, Any]:
    """The arguments `selection`, `rank` and `alpha` of a method, from (rank, alpha) of each module."""
    ranks = {model.modules[name].path("weight"): rank for name, (rank, _) in options.items()}
    alphas = {model.modules[name].path("weight"): alpha for name, (_, alpha) in options.items()}
    return {"selection": selected(ranks, model), "rank": by_glob(ranks, model), "alpha": by_glob(alphas, model)}


def globs_of(paths: Iterable[str], model: Model) -> list[str]:
    """Globs that match these paths and no others: `**/attn/out/kernel` where all layers have it."""
    layers: dict[str, list[str]] = {}
    for path in paths:
        match = re.fullmatch(r"h_(\d+)/(.+)", path)
        layers.setdefault(match[2] if match else path, []).append(match[1] if match else "")
    globs = []
    for rest, numbers in layers.items():
        if numbers == [""]:
            globs.append(rest)
        elif len(numbers) == model.depth:
            globs.append(f"**/{rest}")
        else:
            which = numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}"
            globs.append(f"h_{which}/{rest}")
    return globs


# --- configs of our own methods -----------------------------------------------------------------------------------


def parts(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The specs of a chain's parts and of the chain, or the one spec."""
    for part in spec["of"] if spec["method"] == "chain" else ():
        yield from parts(part)
    yield spec


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


def shortest(names: set[str], among: Iterable[str], ends_with: Callable[[str, str], bool]) -> list[str]:
    """The shortest ends of these names that match no other name, sorted."""
    others, ends = [name for name in among if name not in names], set()
    for name in names:
        split = name.split(".")
        shorter = (".".join(split[-n:]) for n in range(1, len(split)) if not split[-n].isdigit())
        ends.add(next((end for end in shorter if not any(ends_with(other, end) for other in others)), name))
    return sorted(ends)


def targets(names: set[str], model: Model) -> list[str]:
    """The shortest `target_modules` that match these modules and no others."""
    return shortest(names, model.modules, lambda name, end: f".{name}".endswith(f".{end}"))
