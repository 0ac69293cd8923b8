"""What a kind of PEFT's adapters says of itself, so that the rest of the reader and the writer is the same for all."""

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.arrays import Tuned
from lora_jax.core.selection import Selection, select
from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.peft.config import Schema
from lora_jax.interop.peft.modules import Meant, Model, Rules
from lora_jax.interop.peft.tensors import Tensor
from lora_jax.methods.rows import Rows
from lora_jax.methods.shift import Shift

# so that a method of a looped model also meets params in the scanned layout
_SCANNED = {"h/**/kernel": "sio", "h/**/{bias,scale}": "so"}


class Leaves(NamedTuple):
    """The adapted leaves of a method, by module; tuned ones by path."""

    adapted: dict[str, dict[str, Any]]
    shift: dict[str, dict[str, Shift]]
    rows: dict[str, Rows]
    tuned: dict[str, Tuned]


class Family(NamedTuple):
    """One `peft_type`.

    Attributes:
      schema, rules: of its config, and of the modules that it adapts.
      tensors: those of the adapted modules in the file, a list for each: `(meant, fields, model, source)`.
      method: `(meant, fields, model) -> (transforms, what their deltas hold of the base)`.
      leaves: the kinds of adapted arrays that it can hold.
      export: `(leaves, spec, delta, model, made) -> config fields`; it puts into `made` what `tensors` will look for,
        and raises for what PEFT has no form for.
    """

    schema: Schema
    rules: Rules
    tensors: Callable[[Meant, Mapping[str, Any], Model, str], list[list[Tensor]]]
    method: Callable[[Meant, Mapping[str, Any], Model], tuple[list[ParamTransform], Delta]]
    leaves: tuple[type[Any], ...]
    export: Callable[[Leaves, Mapping[str, Any], Delta, Model, Delta], dict[str, Any]]


# --- paths --------------------------------------------------------------------------------------------------------


def selected(paths: Iterable[str], model: Model) -> Selection:
    """The selection of these paths, which may have braces, in either layout."""
    return select(*globs_of(paths, model), axes=_SCANNED)


def by_glob(values: Mapping[str, Any], model: Model) -> Any:
    """The one value of all paths, or a mapping glob -> value."""
    distinct = list(dict.fromkeys(values.values()))
    if len(distinct) == 1:
        return distinct[0]
    return {glob: v for v in distinct for glob in globs_of([path for path in values if values[path] == v], model)}


def ranked(said: Mapping[str, tuple[int, float]], model: Model) -> dict[str, Any]:
    """What `lora`, `pissa` and `lokr` take for the rank and alpha of each module: selection, ranks, alphas."""
    ranks = {model.modules[name].path("weight"): rank for name, (rank, _) in said.items()}
    alphas = {model.modules[name].path("weight"): alpha for name, (_, alpha) in said.items()}
    return {"selection": selected(ranks, model), "rank": by_glob(ranks, model), "alpha": by_glob(alphas, model)}


def globs_of(paths: Iterable[str], model: Model) -> list[str]:
    """Globs of these paths, and of no others: `**/attn/out/kernel` where all layers have it."""
    layers: dict[str, list[str]] = {}
    for path in paths:
        found = re.fullmatch(r"h_(\d+)/(.+)", path)
        layers.setdefault(found[2] if found else path, []).append(found[1] if found else "")
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
    """The specs of a chain, or the one."""
    for part in spec["of"] if spec["method"] == "chain" else ():
        yield from parts(part)
    yield spec


def alpha_of(scale: np.float32, by: float) -> float:
    """The alpha with the fewest digits that gives this scale, divided by `by`."""
    for digits in range(1, 18):
        alpha = float(f"{float(scale) * by:.{digits}g}")
        if np.float32(alpha / by) == scale:
            break
    return int(alpha) if alpha.is_integer() else alpha


def with_patterns(said: Mapping[str, tuple[int, float]], alpha_field: str) -> dict[str, Any]:
    """The fields for (rank, alpha) of each module: those that most have, and patterns of whole names for the others."""
    rank, alpha = (collections.Counter(values).most_common(1)[0][0] for values in zip(*said.values(), strict=True))
    return {
        "r": rank,
        alpha_field: alpha,
        "rank_pattern": {name: r for name, (r, _) in said.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in said.items() if a != alpha},
    }


def shortest(names: set[str], among: Iterable[str], ends: Callable[[str, str], bool]) -> list[str]:
    """The shortest ends of these names that mean none of the others."""
    others, found = [name for name in among if name not in names], set()
    for name in names:
        split = name.split(".")
        shorter = (".".join(split[-n:]) for n in range(1, len(split)) if not split[-n].isdigit())
        found.add(next((end for end in shorter if not any(ends(other, end) for other in others)), name))
    return sorted(found)


def targets(names: set[str], model: Model) -> list[str]:
    """`target_modules` that mean these modules."""
    return shortest(names, model.modules, lambda name, end: f".{name}".endswith(f".{end}"))
