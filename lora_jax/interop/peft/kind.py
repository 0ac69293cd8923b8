"""What one kind of PEFT adapter (a `peft_type`) defines, and what its functions are given.

Reading and writing are the same code for all kinds.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.core.arrays import Tuned
from lora_jax.core.selection import Selection, select
from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop.hf.families import Architecture, Module, depth, expand_braces
from lora_jax.methods.bias_delta import BiasDelta
from lora_jax.methods.token_rows import TokenRows

# so that a method of a looped model also selects params in the scanned layout
_SCANNED = {"h/**/kernel": "sio", "h/**/{bias,scale}": "so"}


class Model(NamedTuple):
    """A Hugging Face model as PEFT sees it."""

    architecture: Architecture
    prefix: str  # what stands before the names of the backbone's modules
    modules: dict[str, Module]
    embedding: str  # the name of the token embedding
    output: str  # the name of the language model's head, "" without one
    tied: bool  # whether the token embedding is the head in our parameters
    leaves: dict[str, Any]  # our parameters by path

    def shape(self, module: Module, which: str) -> tuple[int, ...]:
        """The shape of a module's "weight" or "bias" in our order of axes, the parts of a fused layer side by side."""
        shapes = [tuple(self.leaves[path].shape) for path in module.paths(which)]
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))

    def below(self, name: str) -> list[Module]:
        """The modules with weights that have this name or are inside the module of this name."""
        return [m for m in self.modules.values() if m.torch_class and (m.name == name or m.name.startswith(f"{name}."))]

    def globs(self, paths: Iterable[str]) -> list[str]:
        """Globs that match these paths, which may have braces, and no others: `**/attn/out/kernel` of all layers."""
        layers: dict[str, list[str]] = {}
        for path in paths:
            match = re.fullmatch(r"h_(\d+)/(.+)", path)
            layers.setdefault(match[2] if match else path, []).append(match[1] if match else "")
        globs = []
        for rest, numbers in layers.items():
            if numbers == [""]:
                globs.append(rest)
            elif len(numbers) == depth(self.leaves):
                globs.append(f"**/{rest}")
            else:
                which = numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}"
                globs.append(f"h_{which}/{rest}")
        return globs

    def select(self, paths: Iterable[str]) -> Selection:
        """The selection of these paths, which may have braces, in either layout."""
        return select(*self.globs(paths), axes=_SCANNED)

    def by_glob(self, values: Mapping[str, Any]) -> Any:
        """`{path: value}` as one value where all are equal, else as `{glob: value}`."""
        distinct = list(dict.fromkeys(values.values()))
        if len(distinct) == 1:
            return distinct[0]
        return {glob: v for v in distinct for glob in self.globs(path for path in values if values[path] == v)}

    def ranked(self, options: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
        """The arguments `selection`, `rank` and `alpha` of a method, from (rank, alpha) of each module."""
        ranks = {self.modules[name].path("weight"): rank for name, (rank, _) in options.items()}
        alphas = {self.modules[name].path("weight"): alpha for name, (_, alpha) in options.items()}
        return {"selection": self.select(ranks), "rank": self.by_glob(ranks), "alpha": self.by_glob(alphas)}

    def targets(self, names: set[str]) -> list[str]:
        """The shortest `target_modules` that match these modules and no others."""
        return shortest(names, self.modules, lambda name, end: f".{name}".endswith(f".{end}"))


def shortest(names: set[str], among: Iterable[str], ends_with: Callable[[str, str], bool]) -> list[str]:
    """The shortest ends of these names that match no other name, sorted."""
    others, ends = [name for name in among if name not in names], set()
    for name in names:
        split = name.split(".")
        shorter = (".".join(split[-n:]) for n in range(1, len(split)) if not split[-n].isdigit())
        ends.add(next((end for end in shorter if not any(ends_with(other, end) for other in others)), name))
    return sorted(ends)


class Tensor(NamedTuple):
    """A tensor of the file, and the arrays of the delta that hold the same numbers."""

    name: str  # in the file, without `base_model.model.`
    shape: tuple[int, ...]  # in the file
    path: str  # of the leaf that it changes, with braces where the layer is fused
    factor: str  # its name in the delta
    transposed: bool = False  # whether the file has the axes in the other order
    copy: str = ""  # "value" for a second copy of another, "base" for weights of the base; a file may lack copies
    key: str = ""  # the delta's key where it is not `path`
    leading_axis: bool = False  # whether the file has one more axis in front, of size 1
    replicated: bool = False  # whether each part of a fused layer has all of it, not its share of the last axis

    @property
    def entries(self) -> list[tuple[str, str]]:
        """The (key, factor) of the delta's arrays, in order along the last axis."""
        return [(key, self.factor) for key in expand_braces(self.key or self.path)]


class Resolved(NamedTuple):
    """A config applied to a model."""

    kind: "Kind"
    fields: Mapping[str, Any]  # of `config.complete`
    model: Model
    source: str  # the file, for messages
    adapted: dict[str, Any]  # the adapted modules by name, with the options of each (`Kind.options_of`)
    saved: list[str]  # the modules that are trained and saved whole
    tokens: dict[str, list[int]]  # embedding's name -> indices of its trained rows


class Adaptation(NamedTuple):
    """A method of this library on a model, as `Kind.export` gets it."""

    spec: Mapping[str, Any]
    delta: Delta
    model: Model
    adapted: dict[str, dict[str, Any]]  # adapted leaves of the kind by path, for each module
    shift: dict[str, dict[str, BiasDelta]]  # shifted biases by path, for each module
    rows: dict[str, TokenRows]  # embeddings with trained rows by module
    tuned: dict[str, Tuned]  # leaves that train themselves by path

    def specs(self, method: str | None = None) -> list[Mapping[str, Any]]:
        """The method's spec, or those of a chain's parts; only those of the method of this name."""

        def parts(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
            return [p for part in spec["of"] for p in parts(part)] if spec["method"] == "chain" else [spec]

        return [spec for spec in parts(self.spec) if method in (None, spec["method"])]


class Field(NamedTuple):
    """One field of a config: its default, whether a value is valid, and what a valid value is, for messages."""

    default: Any
    is_valid: Callable[[Any], bool]
    expected: str


class Kind(NamedTuple):
    """One `peft_type`. An example is in `register_kind`."""

    name: str  # for messages
    torch_classes: tuple[str, ...]  # of the modules that it can adapt
    fields: Mapping[str, Field]  # those that its config may have, by name
    tensors: Callable[[Resolved, Module, Any], list[Tensor]]  # of one adapted module, with its options
    # The transforms of the adapted modules, and the factors that are made from the base rather than read from the file.
    method: Callable[[Resolved], tuple[list[ParamTransform], Delta]]
    leaves: tuple[type[Any], ...] = ()  # the classes of adapted arrays that it can hold
    # The factors that `tensors` of a config will look for, and that config's fields; raises a ValueError for what PEFT
    # cannot represent. None: only what was read is written.
    export: Callable[[Adaptation], tuple[Delta, dict[str, Any]]] | None = None
    refused: Mapping[str, Any] = {}  # fields of variants that are not supported, with PEFT's default: that is accepted
    # `(fields, source)`; raises where fields contradict each other, or mean something that is not supported.
    check: Callable[[Mapping[str, Any], str], None] = lambda fields, source: None
    patterns: tuple[str, ...] = ()  # fields of its own whose string is a regular expression of a module's whole name
    # `(fields, model, module's name) -> options`, what a config sets for one module, such as its rank.
    options_of: Callable[[Mapping[str, Any], Model, str], Any] = lambda fields, model, name: None
    # target_modules where a config has none
    targets: Callable[[Architecture], Sequence[str]] = lambda architecture: architecture.lora_targets
