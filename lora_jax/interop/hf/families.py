"""What is said of a family of Hugging Face models in one place: its torch modules, the parameters here that hold their
weights, and its config.json. `register_format` makes a family known; `interop/hf/gpt2.py` is an example.

Names, shapes and layouts of a folder's tensors follow from the modules. PEFT matches the names of modules, containers
and dropouts among them, so an architecture lists all of them.
"""

import dataclasses
import logging
import re
import typing
from collections.abc import Callable, Collection, Mapping
from types import NoneType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.interop import lazy
from lora_jax.interop.folders import check_shapes
from lora_jax.interop.lazy import Lazy
from lora_jax.models import shapes
from lora_jax.models.family import family_of

# Module name -> (torch's class, its subtree in our parameters); both "" for a module without weights of its own. The
# parts of a fused layer are in braces: "attn/{query,key,value}".
Modules = Mapping[str, tuple[str, str]]


class Head(NamedTuple):
    """What a model with a head has besides its backbone. An example is in `hf.register_format`."""

    prefix: str  # what stands before the names of the backbone's modules, such as "transformer."
    modules: Modules  # those of the head
    weight: str  # the path of a parameter that only a model with this head has
    hint: str = ""  # how to get such parameters, for the message where a file has a head that they lack


class Architecture(NamedTuple):
    """One family of Hugging Face models. An example is in `hf.register_architecture`."""

    name: str  # of the family, for messages
    weight: str  # the path of a parameter that only this family has, by which its parameters are recognized
    embedding: str  # the module of the token embedding
    backbone: Modules  # outside the layers, but for the layers' list
    layers: tuple[str, Modules]  # the name of their list, and the modules of one, whose subtrees are within `h_0`, ...
    # The language model's head, of one module. The parameters may lack its weight: it is the token embedding then.
    lm_head: Head | None = None
    classifiers: tuple[Head, ...] = ()  # the other heads
    optional: Mapping[str, Modules] = {}  # of the backbone, which some models lack: the path of a weight -> the modules
    lora_targets: tuple[str, ...] = ()  # PEFT's default for target_modules, of most kinds
    ia3_targets: tuple[str, ...] = ()  # that of IA3
    ia3_feedforward: tuple[str, ...] = ()  # that for feedforward_modules
    # Where another family has `weight` too: paths of parameters that this one has (True) or lacks (False).
    also: Mapping[str, bool] = {}

    def fits(self, leaves: Collection[str]) -> bool:
        """Whether parameters (paths in the loop layout) are of this family."""
        return self.weight in leaves and all((path in leaves) is has for path, has in self.also.items())

    def head_in(self, leaves: Collection[str], classifies: bool = True) -> Head | None:
        """The head that these parameters (paths) have; a classifier's before a language model's if `classifies`."""
        classifiers = self.classifiers if classifies or self.lm_head is None else ()
        return next((head for head in classifiers if head.weight in leaves), self.lm_head)


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Makes a family known by its name, in place of an earlier one of that name; later ones are recognized first.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax.interop import hf, peft
    >>> layer = {"fc": ("Linear", "fc")}  # torch's `layers.0.fc` is `h_0/fc` here
    >>> toy = hf.Architecture("toy", "emb/embedding", "emb", {"emb": ("Embedding", "emb")}, ("layers", layer))
    >>> hf.register_architecture(toy)
    >>> params = {"emb": {"embedding": jnp.ones((5, 4))}, "h_0": {"fc": {"kernel": jnp.ones((4, 4))}}}
    >>> method = lj.lora(lj.select("**/fc/kernel"), rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     peft.save(folder, method, method.init(jax.random.key(0), params), params=params)
    ...     print(peft.load(folder, params)[1])
    Delta: 1 paths, 16 numbers
      h_0/fc/kernel: a float32(4, 2), b float32(2, 4)
    """
    ARCHITECTURES.pop(architecture.name, None)
    ARCHITECTURES[architecture.name] = architecture


def containers(names: str) -> Modules:
    """Modules without weights of their own."""
    return dict.fromkeys(names.split(), ("", ""))


_WEIGHT = {"Linear": "kernel", "Conv1D": "kernel", "Embedding": "embedding"}  # a norm's is its scale


class Module(NamedTuple):
    """A module of the Hugging Face model."""

    name: str  # with the prefix of a model with a head
    torch_class: str  # "Linear", "Conv1D", "Embedding" or "LayerNorm"; "" for a module without weights of its own
    subtree: str  # where its weights are in our parameters; the parts of a fused layer are in braces
    bias: bool  # whether it has one

    def path(self, which: str) -> str:
        """The path of its "weight" or "bias" in our parameters, with braces where the layer is fused."""
        return f"{self.subtree}/{'bias' if which == 'bias' else _WEIGHT.get(self.torch_class, 'scale')}"

    def paths(self, which: str) -> list[str]:
        """The paths of the parts of its "weight" or "bias", in order along the last axis."""
        return expand_braces(self.path(which))

    def stored(self, which: str) -> "Stored":
        """How the files hold its "weight" or "bias"."""
        return Stored(tuple(self.paths(which)), transposed=which == "weight" and self.torch_class == "Linear")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Which of "weight" and "bias" it has."""
        return ("weight", "bias")[: bool(self.subtree) + self.bias]

    @property
    def shared(self) -> str:
        """The delta's key of what the parts of a fused layer share, such as `@shared/h_0/attn`; "" of other layers."""
        return f"@shared/{self.subtree.rsplit('/', 1)[0]}" if "{" in self.subtree else ""


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

    def split(self, tensor: Lazy) -> dict[str, Lazy]:
        """The parameters in it."""
        ours = tensor.T if self.transposed else tensor
        return {path: ours.part(k, len(self.paths)) for k, path in enumerate(self.paths)}

    def join(self, *parts: np.ndarray) -> np.ndarray:
        """The tensor of the parameters at `paths`."""
        joined = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return np.ascontiguousarray(joined.T if self.transposed else joined)


def layouts(architecture: Architecture, leaves: Collection[str], *, prefixed: bool = False) -> dict[str, Stored]:
    """The tensors of the model that has these parameters, by their names in its files, or those without prefix."""
    head = architecture.head_in(leaves)
    modules = modules_of(architecture, leaves, head.prefix if head and prefixed else "", head).values()
    return {f"{module.name}.{which}": module.stored(which) for module in modules for which in module.parameters}


_JSON = {bool, int, float, str, NoneType}  # the types whose values config.json can hold as they are


def read_config(
    cls: Callable[..., Any], fields: Mapping[str, Any], names: Mapping[str, str], only: Mapping[str, Any], source: str
) -> Any:
    """A model's config, a dataclass, from the fields of config.json, whose `names` are given by ours; those absent have
    defaults. A ValueError where a field of `only` has another value than the supported one, one is of another type than
    the dataclass says (true is no number, a string no size), or the config refuses a value.

    An example is in `hf.register_format`.
    """
    for name, value in only.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{source}: config.json has {name}={fields[name]!r}; only {value!r} is supported")
    given = {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}
    types_of = typing.get_type_hints(cls)
    for ours, value in given.items():
        kinds = typing.get_args(types_of[ours]) or (types_of[ours],)  # several where it may be None
        if _JSON.issuperset(kinds) and type(value) not in ((*kinds, int) if float in kinds else kinds):
            expected = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{source}: config.json has {names[ours]}={repr(value)[:80]}, not a {expected}")
        if type(value) is int and abs(value) >= 2**31:
            raise ValueError(f"{source}: config.json has {names[ours]}={repr(value)[:80]}, too large for any model")
    try:
        kinds_of = {ours: typing.get_args(types_of[ours]) or (types_of[ours],) for ours in given}
        floats = {x: float(value) for x, value in given.items() if float in kinds_of[x] and type(value) is int}
        return cls(**(given | floats))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{source}: config.json: {error}") from error


def rename(tensors: Mapping[str, Lazy], short: Callable[[str], str], source: str) -> dict[str, Lazy]:
    """The tensors by shorter names; a ValueError where two get the same."""
    renamed: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        if short(name) in renamed:
            raise ValueError(f"{source}: {short(name)} is there twice, under two names")
        renamed[short(name)] = tensor
    return renamed


class HeadOptions(NamedTuple):
    """The arguments of `hf.load` that say which head is wanted."""

    head: str | None = None
    labels: int | None = None
    tie: bool | None = None
    key: Array | None = None
    trained: bool = False  # a trained head replaces a new one, which no warning then names


def language_model(
    format: "Format", fields: dict, tensors: dict[str, Lazy], source: str, options: HeadOptions
) -> tuple[Any, dict[str, Lazy]]:
    """`Format.from_hf` of a language model. Its head is its token embedding if `config.tie`, where there is that."""
    head, labels, tie, key, _ = options
    config, architecture, lm_head = format.config_of(fields, source), format.architecture, format.architecture.lm_head
    assert lm_head is not None, f"{architecture.name} is no language model"
    if head not in (None, "lm") or labels is not None:
        raise ValueError(f"{source}: {architecture.name} has the head 'lm' only, not head={head!r}, labels={labels}")
    file_ties = getattr(config, "tie", False)
    tied = file_ties if tie is None else tie
    model = family_of(config).model(config if tied == file_ties else dataclasses.replace(config, tie=tied))
    leaves = shapes.of_params(model)
    tensors = rename(tensors, lambda name: name.removeprefix(lm_head.prefix), source)
    embedding, output = f"{architecture.embedding}.weight", f"{next(iter(lm_head.modules))}.weight"
    names = {name: layout for name, layout in layouts(architecture, leaves).items() if name != output}
    expected = {name: layout.shape(leaves) for name, layout in names.items()}
    expected |= {output: expected[embedding]} if output in tensors else {}
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected, source)
    flat = {path: part for name, layout in names.items() for path, part in layout.split(tensors[name]).items()}
    if tied:
        if output in tensors and not lazy.same(tensors[output], tensors[embedding]):
            raise ValueError(
                f"{source}: {output} differs from {embedding}, so that the head cannot be tied; tie=False keeps both"
            )
    elif output in tensors or file_ties:
        flat[lm_head.weight] = tensors.get(output, tensors[embedding]).T
    elif head == "lm" and key is not None:
        logging.warning("%s has no %s: a new, random head was made", source, output)
        new = 0.02 * jax.random.normal(key, leaves[lm_head.weight], jnp.float32)
        flat[lm_head.weight] = lazy.of(new, "a new head")
    else:
        raise ValueError(
            f"{source}: {output} is missing and config.json does not tie it to {embedding}; "
            "tie=True ties it, head='lm' with key=jax.random.key(...) makes a new one"
        )
    return model, flat


@dataclasses.dataclass(frozen=True)
class Format:
    """The files of one family. An example is in `hf.register_format`."""

    architecture: Architecture
    config_of: Callable[[dict, str], Any]  # `(fields of config.json, source) -> config`, by `read_config`
    fields_of: Callable[[Any], dict]  # `(config) -> fields of config.json`
    ignored: re.Pattern = re.compile(r"(?!)")  # names of tensors that are no parameters
    # `(format, fields, tensors, source, options) -> (model, {path: Lazy})` in the loop layout
    from_hf: Callable[..., tuple[Any, dict[str, Lazy]]] = language_model
    # `(config) -> {end of a tensor's name: glob}` of what its head needs of the pretrained model, and files may lack
    head_needs: Callable[[Any], Mapping[str, str]] = lambda config: {}
    # What sizes in config.json must agree with: field -> (attribute of the config, tensor, axis); the depth's field.
    sizes: Mapping[str, tuple[str, str, int]] = dataclasses.field(default_factory=dict)
    depth: str = "num_hidden_layers"
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other names of fields -> the fields
    of_source: Collection[str] = ()  # fields of `fields_of` that a model's source, if it is known, says better
    # The ends of the architectures' names that are read, () for all; and what to do about another one.
    tasks: Collection[str] = ()
    other_head: str = ""


_FORMATS: dict[str, Format] = {}


def register_format(model_type: str, format: Format) -> None:
    """Makes a `model_type`, which is the name of a family too, readable and writable, in place of an earlier one.

    >>> import tempfile, pathlib
    >>> from lora_jax.interop import hf
    >>> from lora_jax.models import gpt2
    >>> names = {"n_embd": "width", "n_layer": "depth", "n_head": "heads"}  # ours: those in config.json
    >>> def config_of(fields, source):
    ...     return hf.read_config(gpt2.GPT2Config, fields, names, {"activation": "gelu"}, source)
    >>> def fields_of(config):
    ...     return {"model_type": "toy", **{theirs: getattr(config, ours) for ours, theirs in names.items()}}
    >>> layer = {"attn.qkv": ("Linear", "attn/{query,key,value}"), "attn.out": ("Linear", "attn/out")}
    >>> layer |= {"up": ("Linear", "mlp/up"), "down": ("Linear", "mlp/down")}
    >>> layer |= {"norm_1": ("LayerNorm", "ln_1"), "norm_2": ("LayerNorm", "ln_2")}
    >>> backbone = {"tokens": ("Embedding", "wte"), "places": ("Embedding", "wpe"), "norm": ("LayerNorm", "ln_f")}
    >>> head = hf.Head("model.", {"lm_head": ("Linear", "lm_head")}, "lm_head/kernel")
    >>> toy = hf.Architecture("toy", "wte/embedding", "tokens", backbone, ("layers", layer), head)
    >>> hf.register_format("toy", hf.Format(toy, config_of, fields_of))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "config.json").write_text('{"model_type": "toy", "width": 64, "heads": 4}')
    ...     hf.without_weights(folder).config.n_embd
    64
    """
    register_architecture(format.architecture)
    _FORMATS[model_type] = format


def format_of(model_type: Any, source: str) -> Format:
    """The format of a `model_type`; a ValueError where there is none."""
    if not isinstance(model_type, str) or model_type not in _FORMATS:
        raise ValueError(f"{source}: model_type {model_type!r} is none of {', '.join(sorted(_FORMATS))}")
    return _FORMATS[model_type]
