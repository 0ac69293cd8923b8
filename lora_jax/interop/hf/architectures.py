"""The torch modules of each family of Hugging Face models, and the parameters here that hold their weights.

Names, shapes and layouts of a folder's tensors follow from them. PEFT matches the names of modules, containers and
dropouts among them, so an architecture lists all of them. A family from outside is registered in the same way as ours:

    register_architecture(Architecture("llama", "h_0/mlp/gate/kernel", ...))
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from lora_jax.interop.folders import Recipe
from lora_jax.interop.lazy import Lazy

# Module name -> (torch's class, its subtree in our parameters); both "" for a module without weights of its own. The
# parts of a fused layer are in braces: "attn/{query,key,value}".
Modules = Mapping[str, tuple[str, str]]


class Head(NamedTuple):
    """What a model with a head has besides its backbone.

    Attributes:
      prefix: what stands before the names of the backbone's modules, such as "transformer.".
      modules: those of the head.
      weight: the path of a parameter that only a model with this head has.
      hint: how to get such parameters, for the message where a file has a head that they lack.
    """

    prefix: str
    modules: Modules
    weight: str
    hint: str = ""


class Architecture(NamedTuple):
    """One family of Hugging Face models.

    Attributes:
      name: of the family, for messages.
      weight: the path of a parameter that only this family has, by which its parameters are recognized.
      embedding: the module of the token embedding.
      backbone: the modules outside the layers, but for the layers' list.
      layers: the name of the layers' list, and the modules of one layer, whose subtrees are those within `h_0`, ...
      lm_head: the language model's head, of one module; None for a family without. The parameters may lack its weight,
        which is the token embedding then.
      classifiers: the other heads.
      optional: modules of the backbone that some models lack: the path of a weight -> the modules.
      lora_targets, ia3_targets, ia3_feedforward: PEFT's defaults for target_modules (those of LoRA serve most kinds)
        and for IA3's feedforward_modules.
    """

    name: str
    weight: str
    embedding: str
    backbone: Modules
    layers: tuple[str, Modules]
    lm_head: Head | None = None
    classifiers: tuple[Head, ...] = ()
    optional: Mapping[str, Modules] = {}
    lora_targets: tuple[str, ...] = ()
    ia3_targets: tuple[str, ...] = ()
    ia3_feedforward: tuple[str, ...] = ()


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Makes a family known by its name, in place of an earlier one of that name; later ones are recognized first."""
    ARCHITECTURES.pop(architecture.name, None)
    ARCHITECTURES[architecture.name] = architecture


def containers(names: str) -> Modules:
    """Modules without weights of their own."""
    return dict.fromkeys(names.split(), ("", ""))


_WEIGHT = {"Linear": "kernel", "Conv1D": "kernel", "Embedding": "embedding"}  # a norm's is its scale


class Module(NamedTuple):
    """A module of the Hugging Face model.

    Attributes:
      name: the full name, with the prefix of a model with a head.
      torch_class: "Linear", "Conv1D", "Embedding" or "LayerNorm"; "" for a module without weights of its own.
      subtree: where its weights are in our parameters; the parts of a fused layer are in braces.
      bias: whether it has one.
    """

    name: str
    torch_class: str
    subtree: str
    bias: bool

    def path(self, which: str) -> str:
        """The path of its "weight" or "bias" in our parameters, with braces where the layer is fused."""
        return f"{self.subtree}/{'bias' if which == 'bias' else _WEIGHT.get(self.torch_class, 'scale')}"

    def paths(self, which: str) -> list[str]:
        """The paths of the parts of its "weight" or "bias", in order along the last axis."""
        return expand_braces(self.path(which))


def expand_braces(path: str) -> list[str]:
    """`h_0/attn/{query,key,value}/bias` as three paths, in that order."""
    start, _, rest = path.partition("{")
    inner, _, end = rest.partition("}")
    return [start + part + end for part in inner.split(",")]


def modules_of(
    architecture: Architecture, leaves: Collection[str], prefix: str = "", head: Head | None = None
) -> dict[str, Module]:
    """The modules of the model that has these parameters (paths in the loop layout), by name."""
    backbone = dict(architecture.backbone)
    for weight, modules in architecture.optional.items():
        backbone |= modules if weight in leaves else {}
    named: dict[str, tuple[str, str]] = {prefix.removesuffix("."): ("", "")} if prefix else {}
    named |= {prefix + name: module for name, module in backbone.items()}
    stack, layer = prefix + architecture.layers[0], architecture.layers[1]
    named[stack] = ("", "")
    for n in range(depth(leaves)):
        named[f"{stack}.{n}"] = ("", "")
        for name, (torch_class, subtree) in layer.items():
            named[f"{stack}.{n}.{name}"] = (torch_class, subtree and f"h_{n}/{subtree}")
    named |= head.modules if head else {}
    if head and head is architecture.lm_head and head.weight not in leaves:  # tied: no weight of its own
        named |= {name: (torch_class, "") for name, (torch_class, _) in head.modules.items()}
    made = {name: Module(name, torch_class, subtree, False) for name, (torch_class, subtree) in named.items()}
    return {n: m._replace(bias=bool(m.subtree) and m.paths("bias")[0] in leaves) for n, m in made.items()}


def depth(leaves: Collection[str]) -> int:
    """The number of layers of parameters in the loop layout."""
    return 1 + max((int(match[1]) for path in leaves if (match := re.match(r"h_(\d+)/", path))), default=-1)


class Stored(NamedTuple):
    """A tensor of the files: parameters side by side along the last axis, transposed where torch's Linear has them."""

    paths: tuple[str, ...]
    transposed: bool

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape, from those of the parameters."""
        first = shapes[self.paths[0]]
        shape = (*first[:-1], sum(shapes[path][-1] for path in self.paths))
        return shape[::-1] if self.transposed else shape

    def parameters(self, tensor: Lazy) -> dict[str, Lazy]:
        """The parameters in it."""
        ours = tensor.T if self.transposed else tensor
        return {path: ours.part(k, len(self.paths)) for k, path in enumerate(self.paths)}

    @property
    def recipe(self) -> Recipe:
        """How it is made of the parameters."""
        return Recipe(self.paths, self._joined)

    def _joined(self, *parts: np.ndarray) -> np.ndarray:
        joined = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return np.ascontiguousarray(joined.T if self.transposed else joined)


def stored(modules: Mapping[str, Module]) -> dict[str, Stored]:
    """The tensors of these modules by their names."""
    tensors: dict[str, Stored] = {}
    for module in modules.values():
        if module.subtree:
            tensors[f"{module.name}.weight"] = Stored(tuple(module.paths("weight")), module.torch_class == "Linear")
        if module.bias:
            tensors[f"{module.name}.bias"] = Stored(tuple(module.paths("bias")), False)
    return tensors
