"""Model families: what the rest of the library asks of a model, said once, beside the model.

A model is a Flax module with a `config`, a frozen dataclass. The config's `family` is the name of its family, Hugging
Face's `model_type`; `vocab_size`, `scan_layers`, `remat`, `dtype`, `param_dtype` and `residual` mean what they mean in
`gpt2.GPT2Config`, and so does `eos_token_id` of a model that generates. A family from outside is registered in the same
way as ours::

    register_family(Family("llama", Llama, AXES, sites, sharding_rules, dimensions, init_cache))
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh, PartitionSpec

Sites = dict[str, tuple[int, tuple[int, ...], str]]


class Dimensions(NamedTuple):
    """The size of a model."""

    depth: int  # layers
    width: int  # features between the layers
    heads: int  # attention heads of a layer
    inner: int  # features inside an MLP
    max_length: int  # tokens of the longest input
    query_block: int = 0  # queries that attention takes at a time; 0: all


class OutputHead(NamedTuple):
    """The output head of a language model, by itself: a loss computes the logits in chunks.

    Attributes:
      params: `(config) -> names` of the top-level parameters that the head reads.
      hidden: the model's method `(tokens, mask, *, labelled, ...) -> hidden states`, as `gpt2.GPT2.hidden`; what else
        a batch has (positions, segments of packed sequences) is passed too.
      logits: the model's method `(hidden states) -> logits`, float32.
    """

    params: Callable[[Any], tuple[str, ...]]
    hidden: str = "hidden"
    logits: str = "head"


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models. Every function takes the model's config first.

    Attributes:
      name: Hugging Face's `model_type`.
      model: the class; `model(config)` is a model.
      axes: glob -> axes of every parameter, in both layouts of the layers (`lora_jax.select`'s `axes`).
      sites: `(config) -> {site: (occurrences, shape without batch and length, dtype)}` of the named activations.
      sharding_rules: `(config, mesh) -> {glob: PartitionSpec}` of every parameter, the first match wins.
      dimensions: `(config) -> Dimensions`.
      init_cache: `(config, batch, length) -> cache`, as `gpt2.init_cache`'s; None: the model generates no text.
      output_head: what `training.language_model` asks for; None: the model is trained for something else.
      with_head: `(config, head, labels) -> config` with those values of its fields `head`, "classification" or
        "regression", and `labels`; None: the model does not classify.
      head_params: the top-level parameters that belong to a task's head rather than to the pretrained base.
      varies: fields of the config that may differ between two uses of one pretrained model: its head, what acts in
        training alone, what the shapes of the parameters say. How it is computed (`dtype`, ...) may too.
      classifier_inputs: what a classifier takes of a batch besides tokens and mask, as its third argument and on.
      token_embedding: glob of the token embedding, in both layouts; "" where a config has to name it.
    """

    name: str
    model: Callable[[Any], Any]
    axes: Mapping[str, str]
    sites: Callable[[Any], Sites]
    sharding_rules: Callable[[Any, Mesh], Mapping[str, PartitionSpec]]
    dimensions: Callable[[Any], Dimensions]
    init_cache: Callable[..., dict] | None = None
    output_head: OutputHead | None = None
    with_head: Callable[[Any, str, int], Any] | None = None
    head_params: tuple[str, ...] = ()
    varies: tuple[str, ...] = ()
    token_embedding: str = ""
    classifier_inputs: tuple[str, ...] = ("token_types",)


_COMPUTATION = ("scan_layers", "remat", "dtype", "param_dtype", "residual")  # fields of every config
_FAMILIES: dict[str, Family] = {}
_MODULES = ("lora_jax.models.gpt2", "lora_jax.models.encoder", "lora_jax.models.llama")  # they register their families


def register_family(family: Family) -> None:
    """Makes a family known by its name, in place of an earlier one of that name."""
    _FAMILIES[family.name] = family


def family_of(model: Any) -> Family:
    """The family of a model, of a model's config, or of that name.

    Raises:
      TypeError: the model names no family.
      ValueError: no family of that name is registered.
    """
    name = model if isinstance(model, str) else getattr(getattr(model, "config", model), "family", None)
    if not isinstance(name, str):
        ours = "a model of lora_jax.models, such as gpt2.GPT2(config), or one whose config names a registered family"
        raise TypeError(f"a {type(model).__name__} is not {ours}")
    if name not in _FAMILIES:
        for module in _MODULES:
            importlib.import_module(module)
    if name not in _FAMILIES:
        raise ValueError(f"the model family {name!r} is none of {', '.join(_FAMILIES)}: register_family makes it known")
    return _FAMILIES[name]


def dimensions_of(model: Any) -> Dimensions:
    """The size of a model, or of the model of that config."""
    return family_of(model).dimensions(getattr(model, "config", model))


def function_fields(model: Any) -> dict[str, Any]:
    """The fields of a model's config, JSON, that say which function its pretrained parameters compute."""
    family, config = family_of(model), getattr(model, "config", model)
    names = {field.name for field in dataclasses.fields(config)} - {*_COMPUTATION, *family.varies}
    fields = {"family": family.name} | {name: getattr(config, name) for name in sorted(names)}
    plain = {
        name: dataclasses.asdict(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else x
        for name, x in fields.items()
    }
    kinds = str | int | float | bool | list | tuple | dict | None
    return {name: x for name, x in plain.items() if isinstance(x, kinds)}


def new_cache(model: Any, batch: int, length: int) -> dict:
    """An empty KV cache of a model for `length` tokens a row; a ValueError where the model generates no text."""
    family = family_of(model)
    if family.init_cache is None:
        raise ValueError(f"a {family.name} generates no text")
    return family.init_cache(model.config, batch, length)
