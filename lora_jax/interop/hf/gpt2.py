"""GPT-2's names, config fields and fused kernels in Hugging Face folders."""

import dataclasses
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.interop import lazy
from lora_jax.interop.folders import Recipe, check_fields, check_shapes
from lora_jax.interop.hf.architectures import (
    Architecture,
    Head,
    Stored,
    containers,
    modules_of,
    register_architecture,
    stored,
)
from lora_jax.interop.hf.formats import Format, register_format
from lora_jax.interop.lazy import Lazy
from lora_jax.models import shapes
from lora_jax.models.gpt2 import GPT2, GPT2Config

_OUR_NAMES = {"activation_function": "activation", "tie_word_embeddings": "tie"}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_FIELDS = (
    "vocab_size n_positions n_embd n_layer n_head n_inner layer_norm_epsilon "
    "activation_function eos_token_id tie_word_embeddings"
).split()
# Fields that change the function, with the one value that this model computes. Dropout rates are
# not among them (they act in training only, and the paper's GPT-2 trains without), nor is
# reorder_and_upcast_attn (attention is always summed in float32 here).
_FIXED: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}

_LAYER = {
    **containers("attn attn.attn_dropout attn.resid_dropout mlp mlp.act mlp.dropout"),
    "ln_1": ("LayerNorm", "ln_1"),
    "attn.c_attn": ("Conv1D", "attn/{query,key,value}"),
    "attn.c_proj": ("Conv1D", "attn/out"),
    "ln_2": ("LayerNorm", "ln_2"),
    "mlp.c_fc": ("Conv1D", "mlp/up"),
    "mlp.c_proj": ("Conv1D", "mlp/down"),
}
_HEAD = "lm_head.weight"


def from_hf(
    fields: dict,
    tensors: dict[str, Lazy],
    source: str,
    *,
    head: str | None,
    labels: int | None,
    tie: bool | None,
    key: Array | None,
) -> tuple[GPT2, dict[str, Lazy]]:
    """The model and `{path: parameter}` in the loop layout; the arguments are those of `hf.load`."""
    if head not in (None, "lm") or labels is not None:
        raise ValueError(f"{source}: GPT-2 has the head 'lm' only, not head={head!r}, labels={labels}")
    config = config_of(fields, source)
    tied = config.tie if tie is None else tie
    tensors = _bare_names(tensors, source)
    names = _check(tensors, config, source)
    flat: dict[str, Lazy] = {}
    for name, layout in names.items():
        flat |= layout.parameters(tensors[name])
    stored_head, wte = tensors.get(_HEAD), tensors["wte.weight"]
    if not tied:
        if stored_head is None and config.tie:
            stored_head = wte  # an untied copy
        flat["lm_head/kernel"] = _new_head(config, source, head, key) if stored_head is None else stored_head.T
    elif stored_head is not None and not lazy.same(stored_head, wte):
        raise ValueError(
            f"{source}: {_HEAD} differs from wte.weight, so that the head cannot be tied; tie=False keeps both"
        )
    return GPT2(dataclasses.replace(config, tie=tied)), flat


def to_hf(model: GPT2) -> tuple[dict, dict[str, Recipe]]:
    """The fields of config.json, and how the tensors that GPT2LMHeadModel names are made of our parameters."""
    config = model.config
    leaves = shapes.of_params(GPT2(dataclasses.replace(config, scan_layers=False)))
    tensors = {
        name: layout.recipe
        for name, layout in stored(modules_of(ARCHITECTURE, leaves, "transformer.", ARCHITECTURE.lm_head)).items()
    }
    fields = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "bos_token_id": config.eos_token_id,
        **{f"{place}_pdrop": 0.0 for place in ("attn", "embd", "resid")},
        **{name: getattr(config, _OUR_NAMES.get(name, name)) for name in _FIELDS},
    }
    return fields, tensors


def config_of(fields: dict, source: str) -> GPT2Config:
    """The model's shape by the fields of config.json."""
    fields = {_ALIASES.get(name, name): value for name, value in fields.items()}
    check_fields(fields, _FIXED, source)
    if not isinstance(fields.get("eos_token_id", 0), int):
        raise ValueError(f"{source}: config.json has eos_token_id={fields['eos_token_id']!r}; give it one id")
    values = {_OUR_NAMES.get(name, name): fields[name] for name in _FIELDS if name in fields}
    try:
        return GPT2Config(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: config.json: {error}") from error


def _bare_names(tensors: dict[str, Lazy], source: str) -> dict[str, Lazy]:
    """Without the prefix of GPT2LMHeadModel."""
    bare: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("transformer.")
        if short in bare:
            raise ValueError(f"{source}: {short} is there twice, with and without transformer.")
        bare[short] = tensor
    return bare


def _check(tensors: dict[str, Lazy], config: GPT2Config, source: str) -> dict[str, Stored]:
    """The tensors of such a model, without the head, by their bare names; a ValueError unless these are they."""
    rows = tensors["wte.weight"].shape[:1] if "wte.weight" in tensors else ()
    if rows and rows[0] != config.vocab_size:
        raise ValueError(
            f"{source}: config.json says vocab_size {config.vocab_size}, but wte.weight has {rows[0]} rows"
        )
    leaves = shapes.of_params(GPT2(dataclasses.replace(config, tie=True)))
    names = stored(modules_of(ARCHITECTURE, leaves))
    expected = {name: layout.shape(leaves) for name, layout in names.items()}
    if _HEAD in tensors:
        expected[_HEAD] = leaves["wte/embedding"]
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected, source)
    return names


def _new_head(config: GPT2Config, source: str, head: str | None, key: Array | None) -> Lazy:
    if head != "lm" or key is None:
        raise ValueError(
            f"{source}: {_HEAD} is missing and config.json does not tie it to wte.weight; "
            "tie=True ties it, head='lm' with key=jax.random.key(...) makes a new one"
        )
    logging.warning("%s has no %s: a new, random head was made", source, _HEAD)
    return lazy.of(0.02 * jax.random.normal(key, (config.n_embd, config.vocab_size), jnp.float32), "a new head")


_NO_SCORE = 'A GPT-2 has no head "score" here: give params | {"score": {"kernel": zeros (width, labels)}}'
ARCHITECTURE = Architecture(
    name="gpt2",
    weight="wte/embedding",
    embedding="wte",
    backbone={
        **containers("drop"),
        "wte": ("Embedding", "wte"),
        "wpe": ("Embedding", "wpe"),
        "ln_f": ("LayerNorm", "ln_f"),
    },
    layers=("h", _LAYER),
    lm_head=Head("transformer.", {"lm_head": ("Linear", "lm_head")}, "lm_head/kernel"),
    classifiers=(Head("transformer.", {"score": ("Linear", "score")}, "score/kernel", _NO_SCORE),),
    lora_targets=("c_attn",),
    ia3_targets=("c_attn", "mlp.c_proj"),
    ia3_feedforward=("mlp.c_proj",),
)
_MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # causal masks, in older files
register_architecture(ARCHITECTURE)
register_format("gpt2", Format(config_of, from_hf, to_hf, ignored=_MASKS))
