"""The model's config.json and its torch original's modules, whose names the tensors of a folder and PEFT have."""

import dataclasses
from typing import Any

from acme.model import Acme, AcmeConfig

from lora_jax.interop import hf
from lora_jax.interop.folders import Recipe, check_shapes
from lora_jax.interop.hf.architectures import Stored, modules_of, stored
from lora_jax.interop.lazy import Lazy
from lora_jax.models import shapes

FIELDS = ("vocab_size", "width", "depth", "max_length", "eos_token_id")
ARCHITECTURE = hf.Architecture(
    name="acme",
    weight="words/embedding",
    embedding="words",
    backbone={"words": ("Embedding", "words"), "last": ("LayerNorm", "last")},
    layers=("blocks", {"norm": ("LayerNorm", "norm"), **{name: ("Linear", name) for name in "qkvo"}}),
    lm_head=hf.Head("body.", {"guess": ("Linear", "guess")}, "guess/kernel"),
    lora_targets=("q", "v"),
)


def config_of(fields: dict, source: str) -> AcmeConfig:
    return AcmeConfig(**{name: fields[name] for name in FIELDS})


def from_hf(fields: dict, tensors: dict[str, Lazy], source: str, **options: Any) -> tuple[Acme, dict[str, Lazy]]:
    model = Acme(config_of(fields, source))
    leaves = shapes.of_params(model)
    expected = {name: layout.shape(leaves) for name, layout in layouts(model).items()}
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected, source)
    return model, {p: x for name, layout in layouts(model).items() for p, x in layout.parameters(tensors[name]).items()}


def to_hf(model: Acme) -> tuple[dict, dict[str, Recipe]]:
    fields = {"model_type": "acme", **{name: getattr(model.config, name) for name in FIELDS}}
    return fields, {name: layout.recipe for name, layout in layouts(model).items()}


def layouts(model: Acme) -> dict[str, Stored]:
    """How each tensor of a folder holds parameters, by its name."""
    leaves = shapes.of_params(Acme(dataclasses.replace(model.config, scan_layers=False)))
    return stored(modules_of(ARCHITECTURE, leaves, "body.", ARCHITECTURE.lm_head))


hf.register_architecture(ARCHITECTURE)
hf.register_format("acme", hf.Format(config_of, from_hf, to_hf))
