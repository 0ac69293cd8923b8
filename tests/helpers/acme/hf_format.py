"""The model's config.json and its torch original's modules, whose names the tensors of a folder and PEFT have."""

from acme.model import AcmeConfig

from lora_jax.interop import hf

NAMES = {name: name for name in ("vocab_size", "width", "depth", "max_length", "eos_token_id")}
ARCHITECTURE = hf.Architecture(
    name="acme",
    weight="words/embedding",
    embedding="words",
    backbone={"words": ("Embedding", "words"), "last": ("LayerNorm", "last")},
    layers=("blocks", {"norm": ("LayerNorm", "norm"), **{name: ("Linear", name) for name in "qkvo"}}),
    lm_head=hf.Head("body.", {"head": ("Linear", "head")}, "head/kernel"),
    lora_targets=("q", "v"),
)


def config_of(fields: dict, source: str) -> AcmeConfig:
    return hf.read_config(AcmeConfig, fields, NAMES, {}, source)


def fields_of(config: AcmeConfig) -> dict:
    return {"model_type": "acme", **{name: getattr(config, name) for name in NAMES}}


hf.register_format("acme", hf.Format(ARCHITECTURE, config_of, fields_of))
