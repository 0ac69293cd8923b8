"""GPT-2's names, config fields and fused kernels in Hugging Face folders."""

import re
from typing import Any

from lora_jax.interop.hf.families import Architecture, Format, Head, containers, read_config, register_format
from lora_jax.models.gpt2 import GPT2Config

_SAME_NAMES = "vocab_size n_positions n_embd n_layer n_head n_inner layer_norm_epsilon eos_token_id".split()
_NAMES = {name: name for name in _SAME_NAMES} | {"activation": "activation_function", "tie": "tie_word_embeddings"}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
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
    layers=(
        "h",
        {
            **containers("attn attn.attn_dropout attn.resid_dropout mlp mlp.act mlp.dropout"),
            "ln_1": ("LayerNorm", "ln_1"),
            "attn.c_attn": ("Conv1D", "attn/{query,key,value}"),
            "attn.c_proj": ("Conv1D", "attn/out"),
            "ln_2": ("LayerNorm", "ln_2"),
            "mlp.c_fc": ("Conv1D", "mlp/up"),
            "mlp.c_proj": ("Conv1D", "mlp/down"),
        },
    ),
    lm_head=Head("transformer.", {"lm_head": ("Linear", "lm_head")}, "lm_head/kernel"),
    classifiers=(Head("transformer.", {"score": ("Linear", "score")}, "score/kernel", _NO_SCORE),),
    lora_targets=("c_attn",),
    ia3_targets=("c_attn", "mlp.c_proj"),
    ia3_feedforward=("mlp.c_proj",),
)
_MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # causal masks, in older files


def _config_of(fields: dict, source: str) -> GPT2Config:
    fields = {_ALIASES.get(name, name): value for name, value in fields.items()}
    if not isinstance(eos := fields.get("eos_token_id", 0), int):
        raise ValueError(f"{source}: config.json has eos_token_id={eos!r}; give it one id")
    return read_config(GPT2Config, fields, _NAMES, _FIXED, source)


def _fields_of(config: GPT2Config) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "bos_token_id": config.eos_token_id,
        **{f"{place}_pdrop": 0.0 for place in ("attn", "embd", "resid")},
        **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
    }


register_format(
    "gpt2",
    Format(
        ARCHITECTURE,
        _config_of,
        _fields_of,
        _MASKS,
        sizes={
            "n_embd": ("n_embd", "wte.weight", 1),
            "n_positions": ("n_positions", "wpe.weight", 0),
            "n_inner": ("inner", "h.0.mlp.c_fc.weight", 1),
        },
        depth="n_layer",
        aliases=_ALIASES,
        of_source=("bos_token_id", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        tasks=("LMHeadModel", "Model"),
        other_head="head='lm' leaves it out",
    ),
)
