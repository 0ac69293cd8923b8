"""GPT-2's names, config fields and fused kernels in Hugging Face folders."""

import dataclasses
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.interop import lazy
from lora_jax.interop.folders import Recipe, check_fields, check_shapes
from lora_jax.interop.lazy import Lazy
from lora_jax.models import shapes
from lora_jax.models.gpt2 import GPT2, GPT2Config

MODEL = GPT2
IGNORED = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # causal masks, in older files

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

_TOP = {
    "wte.weight": "wte/embedding",
    "wpe.weight": "wpe/embedding",
    "ln_f.weight": "ln_f/scale",
    "ln_f.bias": "ln_f/bias",
}
_LAYER = {  # but for attn.c_attn, which holds query, key and value side by side
    "ln_1.weight": "ln_1/scale",
    "ln_1.bias": "ln_1/bias",
    "attn.c_proj.weight": "attn/out/kernel",
    "attn.c_proj.bias": "attn/out/bias",
    "ln_2.weight": "ln_2/scale",
    "ln_2.bias": "ln_2/bias",
    "mlp.c_fc.weight": "mlp/up/kernel",
    "mlp.c_fc.bias": "mlp/up/bias",
    "mlp.c_proj.weight": "mlp/down/kernel",
    "mlp.c_proj.bias": "mlp/down/bias",
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
    _check(tensors, config, source)

    flat: dict[str, Lazy] = {}
    for name, ours in _names(config).items():
        flat |= {path: tensors[name].part(k, len(ours)) for k, path in enumerate(ours)}
    stored, wte = tensors.get(_HEAD), tensors["wte.weight"]
    if not tied:
        if stored is None and config.tie:
            stored = wte  # an untied copy
        flat["lm_head/kernel"] = _new_head(config, source, head, key) if stored is None else stored.T
    elif stored is not None and not lazy.same(stored, wte):
        raise ValueError(
            f"{source}: {_HEAD} differs from wte.weight, so that the head cannot be tied; tie=False keeps both"
        )
    return GPT2(dataclasses.replace(config, tie=tied)), flat


def to_hf(model: GPT2) -> tuple[dict, dict[str, Recipe]]:
    """The fields of config.json, and how the tensors that GPT2LMHeadModel names are made of our parameters."""
    config = model.config
    tensors = {f"transformer.{name}": Recipe(ours, _side_by_side) for name, ours in _names(config).items()}
    if not config.tie:
        tensors[_HEAD] = Recipe(("lm_head/kernel",), lambda kernel: np.ascontiguousarray(kernel.T))
    fields = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "bos_token_id": config.eos_token_id,
        **{f"{place}_pdrop": 0.0 for place in ("attn", "embd", "resid")},
        **{name: getattr(config, _OUR_NAMES.get(name, name)) for name in _FIELDS},
    }
    return fields, tensors


def untrained(model: GPT2, names: set[str]) -> tuple[str, ...]:
    """Globs of what every method has to train besides the head: nothing."""
    return ()


def config_of(fields: dict, source: str) -> GPT2Config:
    """The model's shape by the fields of config.json."""
    fields = {_ALIASES.get(name, name): value for name, value in fields.items()}
    check_fields(fields, _FIXED, source)
    if not isinstance(fields.get("eos_token_id", 0), int):
        raise ValueError(f"{source}: config.json has eos_token_id={fields['eos_token_id']!r}; give it one id")
    known = {_OUR_NAMES.get(name, name): fields[name] for name in _FIELDS if name in fields}
    try:
        return GPT2Config(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: config.json: {error}") from error


def _side_by_side(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=-1) if len(parts) > 1 else np.ascontiguousarray(parts[0])


def _bare_names(tensors: dict[str, Lazy], source: str) -> dict[str, Lazy]:
    """Without the prefix of GPT2LMHeadModel."""
    bare: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("transformer.")
        if short in bare:
            raise ValueError(f"{source}: {short} is there twice, with and without transformer.")
        bare[short] = tensor
    return bare


def _check(tensors: dict[str, Lazy], config: GPT2Config, source: str) -> None:
    """A ValueError unless these are the tensors of such a model; its head may be there or not."""
    rows = tensors["wte.weight"].shape[:1] if "wte.weight" in tensors else ()
    if rows and rows[0] != config.vocab_size:
        raise ValueError(
            f"{source}: config.json says vocab_size {config.vocab_size}, but wte.weight has {rows[0]} rows"
        )
    ours = shapes.of_params(GPT2(dataclasses.replace(config, tie=True)))
    expected = {
        name: (*ours[paths[0]][:-1], sum(ours[path][-1] for path in paths)) for name, paths in _names(config).items()
    }
    if _HEAD in tensors:
        expected[_HEAD] = ours["wte/embedding"]
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected, source)


def _names(config: GPT2Config) -> dict[str, tuple[str, ...]]:
    """Their names, each with ours: what stands side by side in theirs. Without the head."""
    names: dict[str, tuple[str, ...]] = {name: (path,) for name, path in _TOP.items()}
    for i in range(config.n_layer):
        names |= {f"h.{i}.{name}": (f"h_{i}/{path}",) for name, path in _LAYER.items()}
        for name, ours in (("weight", "kernel"), ("bias", "bias")):
            names[f"h.{i}.attn.c_attn.{name}"] = tuple(
                f"h_{i}/attn/{part}/{ours}" for part in ("query", "key", "value")
            )
    return names


def _new_head(config: GPT2Config, source: str, head: str | None, key: Array | None) -> Lazy:
    if head != "lm" or key is None:
        raise ValueError(
            f"{source}: {_HEAD} is missing and config.json does not tie it to wte.weight; "
            "tie=True ties it, head='lm' with key=jax.random.key(...) makes a new one"
        )
    logging.warning("%s has no %s: a new, random head was made", source, _HEAD)
    return lazy.of(0.02 * jax.random.normal(key, (config.n_embd, config.vocab_size), jnp.float32), "a new head")
