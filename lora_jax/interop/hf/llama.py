"""Names and config fields of Llama, Mistral, Qwen 2 and 3, and Gemma 2 and 3 (text) in Hugging Face folders."""

import dataclasses
import functools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.interop import lazy
from lora_jax.interop.folders import check_shapes
from lora_jax.interop.hf import families, heads
from lora_jax.interop.hf.families import Architecture, Format, Head, Modules, containers, read_config
from lora_jax.interop.lazy import Lazy
from lora_jax.models import shapes
from lora_jax.models.llama import FAMILIES, Llama, LlamaConfig
from lora_jax.models.rotary import Rotary

_NAMES = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "inner": "intermediate_size",
    "eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tie": "tie_word_embeddings",
    "eos_token_id": "eos_token_id",
}
_GEMMA = {"query_scale": "query_pre_attn_scalar", "score_cap": "attn_logit_softcapping"}
_GEMMA |= {"logit_cap": "final_logit_softcapping", "activation": "hidden_activation"}
# What config.json need not say, where it is not our default: transformers' defaults.

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2},
    "mistral": {
        "eos_token_id": 2,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
    },
    "gemma2": {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
_DEFAULTS["qwen3"] = _DEFAULTS["qwen2"] | {"head_dim": 128}
_DEFAULTS["gemma3_text"] = _DEFAULTS["gemma2"] | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
# Fields that change the function, with the one value that this model computes.
_FIXED: dict[str, Any] = {
    "pretraining_tp": 1,
    "quantization_config": None,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
}
_SCORE = "score/kernel"
_CLASS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # how names of classes begin
_ATTENTION_BIAS = ("llama", "qwen3", "gemma2", "gemma3_text")  # whose config.json says whether attention has biases
_CLASS |= {"gemma2": "Gemma2", "gemma3_text": "Gemma3"}
# By what a family's parameters differ from another's. A Mistral's are a Llama's, which it is taken for: the names and
# PEFT's defaults are the same.
_QUERY_NORM, _POST_NORM = "h_0/attn/query_norm/scale", "h_0/ln_1_post/scale"
_ALSO: dict[str, dict[str, bool]] = {
    "qwen2": {"h_0/attn/query/bias": True, "h_0/attn/out/bias": False},
    "qwen3": {_POST_NORM: False},
    "gemma2": {_POST_NORM: True, _QUERY_NORM: False},
    "gemma3_text": {_POST_NORM: True},
}
_ROPE_FIELDS = {field.name for field in dataclasses.fields(Rotary)}
_ROPE_NEEDED: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "dynamic": ("factor",)}  # by type
_ROPE_NEEDED["yarn"] = ("factor",)
_ROPE_NEEDED["llama3"] = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def _modules(gemma: bool, qk_norm: bool) -> Modules:
    """The modules of one layer."""
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    subtrees = ("ln_1", "ln_1_post", "ln_2", "ln_2_post") if gemma else ("ln_1", "ln_2")
    attention = {"q": "query", "k": "key", "v": "value", "o": "out"}
    return {
        **containers("self_attn mlp mlp.act_fn"),
        **{f"self_attn.{name}_proj": ("Linear", f"attn/{ours}") for name, ours in attention.items()},
        **({f"self_attn.{name}_norm": ("RMSNorm", f"attn/{attention[name]}_norm") for name in "qk"} if qk_norm else {}),
        **{f"mlp.{name}_proj": ("Linear", f"mlp/{name}") for name in ("gate", "up", "down")},
        **{name: ("RMSNorm", subtree) for name, subtree in zip(norms, subtrees, strict=False)},
    }


def _architecture(family: str) -> Architecture:
    config = LlamaConfig(family, **FAMILIES[family])
    return Architecture(
        name=family,
        weight=_QUERY_NORM if config.qk_norm else "h_0/mlp/gate/kernel",
        also=_ALSO.get(family, {}),
        embedding="embed_tokens",
        backbone={
            **containers("rotary_emb"),
            "embed_tokens": ("Embedding", "wte"),
            "norm": ("RMSNorm", "ln_f"),
        },
        layers=("layers", _modules(config.post_norms, config.qk_norm)),
        lm_head=Head("model.", {"lm_head": ("Linear", "lm_head")}, "lm_head/kernel"),
        classifiers=(Head("model.", {"score": ("Linear", "score")}, _SCORE),),
        lora_targets=("q_proj", "v_proj"),
        ia3_targets=("k_proj" if family in ("llama", "mistral") else "q_proj", "v_proj", "down_proj"),
        ia3_feedforward=("down_proj",),
    )


def _from_hf(
    format: Format, fields: dict, tensors: dict[str, Lazy], source: str, options: families.HeadOptions
) -> tuple[Llama, dict[str, Lazy]]:
    """A language model, or a model with a classification head where one is asked for or in the file."""
    head, labels, tie, key, trained = options
    head, labels = (None, 0) if head == "lm" else heads.wanted(tensors, "score.weight", fields, head, labels, source)
    if head is None:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "score.weight"}
        return families.language_model(format, fields, tensors, source, options)
    config = dataclasses.replace(format.config_of(fields, source), head=head, labels=labels)
    if tie is not None:
        raise ValueError(f"{source}: tie={tie} is of a language model's head, not of one for {head}")
    leaves = shapes.of_params(Llama(config))
    tensors = families.rename(tensors, lambda name: name.removeprefix("model."), source)
    names = families.layouts(format.architecture, leaves)
    new = "score.weight" not in tensors
    expected = {name: layout.shape(leaves) for name, layout in names.items() if not (new and name == "score.weight")}
    tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected, source)
    flat: dict[str, Lazy] = {}
    for name, tensor in tensors.items():  # a head is there to be trained: it stays in float32
        flat |= names[name].split(dataclasses.replace(tensor, kept=name == "score.weight"))
    if new:
        if not trained:
            logging.warning("%s has no score.weight: made a new, random one", source)
        values = 0.02 * jax.random.normal(jax.random.key(0) if key is None else key, leaves[_SCORE], jnp.float32)
        flat[_SCORE] = lazy.of(values, "a new head")
    return Llama(config), flat


def _config_of(family: str, fields: dict, source: str) -> LlamaConfig:
    fields = _DEFAULTS[family] | fields
    given: dict[str, Any] = {**fields, "use_bidirectional_attention": bool(fields.get("use_bidirectional_attention"))}
    eos = given.get("eos_token_id")
    given["eos_token_id"] = eos[0] if isinstance(eos, list) and eos else eos  # Llama 3: of a text, and of a turn
    if type(given["eos_token_id"]) is not int:
        raise ValueError(f"{source}: config.json has eos_token_id={eos!r}; give it one id")
    windows = _windows(family, given, source)
    rope = _rope(family, given, source)
    attention = family in _ATTENTION_BIAS and given.get("attention_bias", False)
    mlp = family == "llama" and given.get("mlp_bias", False)
    bias = {(True, True): "all", (True, False): "attention", (False, True): "mlp"}.get((bool(attention), bool(mlp)))
    made = {"family": family, **FAMILIES[family], "window": given.get("sliding_window") if any(windows) else None}
    made |= {"local": windows, "rotary": rope[False], "local_rotary": rope[True] if family == "gemma3_text" else None}
    made |= {"bias": bias} if bias else {}
    names = _NAMES | (_GEMMA if family.startswith("gemma") else {})
    made = {ours: value for ours, value in made.items() if names.get(ours) not in given}
    return read_config(LlamaConfig, given | made, {name: name for name in made} | names, _FIXED, source)


def _windows(family: str, fields: dict, source: str) -> tuple[bool, ...]:
    """Which layers have the window; () where none has."""
    types, depth = fields.get("layer_types"), fields.get("num_hidden_layers", 32)
    kinds = ("full_attention", "sliding_attention")
    if types is not None and not (isinstance(types, list) and all(name in kinds for name in types)):
        raise ValueError(
            f"{source}: config.json has layer_types={repr(types)[:80]}, not a list of {' or '.join(kinds)}"
        )
    if type(depth) is not int or not 0 < depth < 2**16:
        raise ValueError(f"{source}: config.json has num_hidden_layers={repr(depth)[:80]}, not a number of layers")
    if family == "llama" or (family.startswith("qwen") and not fields.get("use_sliding_window", False)):
        return ()
    if types is not None and family != "mistral":
        return tuple(name == "sliding_attention" for name in types)
    if fields.get("sliding_window") is None:
        return ()
    if family == "mistral":
        return (True,) * depth
    if family.startswith("qwen"):
        return tuple(layer >= fields.get("max_window_layers", 28) for layer in range(depth))
    pattern = 2 if family == "gemma2" else fields.get("sliding_window_pattern", 6)
    return tuple(bool((layer + 1) % pattern) for layer in range(depth))


def _rope(family: str, fields: dict, source: str) -> dict[bool, Rotary]:
    """The rotary embedding of layers without and with a window, in the form of transformers 5 or of before."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{source}: config.json has rope parameters {repr(parameters)[:80]}, not an object")
    kinds = ("full_attention", "sliding_attention")
    by_kind = family == "gemma3_text" and any(kind in parameters for kind in kinds)
    parts = [parameters.get(kind) or {} for kind in kinds] if by_kind else [parameters, {}]
    thetas = (
        fields.get("rope_theta", 1e6 if family == "gemma3_text" else 1e4),
        fields.get("rope_local_base_freq", 1e4),
    )
    pairs = zip((False, True), thetas, parts, strict=True)
    return {local: _rotary({"rope_theta": theta, **part}, source) for local, theta, part in pairs}


def _rotary(given: dict[str, Any], source: str) -> Rotary:
    given = {"rope_type": given.get("type", "default"), **given}
    given = {name: value for name, value in given.items() if value is not None and name != "type"}
    if unknown := set(given) - _ROPE_FIELDS:
        raise ValueError(f"{source}: config.json has rope parameters {sorted(unknown)}, which are not supported")
    rotary = read_config(Rotary, given, {name: name for name in given}, {}, source)
    if missing := [name for name in _ROPE_NEEDED[rotary.rope_type] if name not in given]:
        raise ValueError(f"{source}: config.json lacks {', '.join(missing)} of rope_type {rotary.rope_type!r}")
    return rotary


def _fields_of(config: LlamaConfig) -> dict:
    gemma = config.family.startswith("gemma")
    fields = {theirs: getattr(config, ours) for ours, theirs in (_NAMES | (_GEMMA if gemma else {})).items()}
    end = "ForSequenceClassification" if config.head else "ForCausalLM"
    fields |= {
        "architectures": [_CLASS[config.family] + end],
        "model_type": config.family,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.size,
        "rope_parameters": _rope_fields(config.rotary),
        "attention_dropout": 0.0,
    }
    if config.family in _ATTENTION_BIAS:
        fields["attention_bias"] = config.bias in ("attention", "all")
    if config.family == "llama":
        fields["mlp_bias"] = config.bias in ("mlp", "all")
    if config.family != "llama":
        fields["sliding_window"] = config.window
    if config.family.startswith("qwen"):
        fields["use_sliding_window"] = any(config.local)
    if config.family not in ("llama", "mistral"):
        local = config.local or (False,) * config.layers
        fields["layer_types"] = ["sliding_attention" if which else "full_attention" for which in local]
    if config.family == "gemma3_text":
        sliding = config.rotary if config.local_rotary is None else config.local_rotary
        kinds = {"full_attention": config.rotary, "sliding_attention": sliding}
        fields["rope_parameters"] = {kind: _rope_fields(rotary) for kind, rotary in kinds.items()}
    return fields | (heads.fields_of(config.head, config.labels) if config.head else {})


def _rope_fields(rotary: Rotary) -> dict[str, Any]:
    needed = {"rope_theta", "rope_type", *_ROPE_NEEDED[rotary.rope_type]}
    values = {field.name: (getattr(rotary, field.name), field.default) for field in dataclasses.fields(rotary)}
    return {name: value for name, (value, default) in values.items() if name in needed or value != default}


for _family in dict.fromkeys(("mistral", *FAMILIES)):  # later ones are recognized first
    families.register_format(
        _family,
        Format(
            _architecture(_family),
            functools.partial(_config_of, _family),
            _fields_of,
            re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),  # in older files
            _from_hf,
            sizes={
                "hidden_size": ("hidden", "embed_tokens.weight", 1),
                "intermediate_size": ("inner", "layers.0.mlp.gate_proj.weight", 0),
            },
            of_source=("attention_dropout", "eos_token_id"),
            tasks=("ForCausalLM", "ForSequenceClassification", "Model"),
            other_head="head='lm' or 'classification', with labels=, leaves it out",
        ),
    )
