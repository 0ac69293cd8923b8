"""Tiny models of the Llama family, as Hugging Face's transformers has them, with random weights."""

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# name -> (transformers' config class, what differs from SIZES)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, one key head": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama, no groups": ("LlamaConfig", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama, linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}}),
    "llama, dynamic": (
        "LlamaConfig",
        {"max_position_embeddings": 12, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama 3": ("LlamaConfig", {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, yarn": ("LlamaConfig", {"rope_parameters": _YARN}),
    "llama, yarn, scales": ("LlamaConfig", {"rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "llama, yarn, ramp": (
        "LlamaConfig",
        {"rope_parameters": _YARN | {"attention_factor": 1.2, "truncate": False, "beta_fast": 20, "beta_slow": 2}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "mistral, no window": ("MistralConfig", {"sliding_window": None, "head_dim": 14}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "qwen3, biases": ("Qwen3Config", {"head_dim": 8, "attention_bias": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20}),
    "gemma2, no caps": (
        "Gemma2Config",
        {"head_dim": 12, "sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 12, "sliding_window": 5, "num_hidden_layers": 7, "rope_parameters": _GEMMA3},
    ),
    "gemma3, defaults": ("Gemma3TextConfig", {"head_dim": 8, "num_hidden_layers": 6, "sliding_window": 3}),
}


def torch_model(name: str, head: str = "CausalLM", **changes: Any) -> Any:
    """A variant in torch with weights that are all far from zero, also biases and norms; `head` "" for none."""
    import torch
    import transformers

    kind, differs = VARIANTS[name]
    config = getattr(transformers, kind)(**(SIZES | differs | changes))
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").eval()
    for path, weight in model.named_parameters():
        center = 1.0 if "norm" in path and not kind.startswith("Gemma") else 0.0
        torch.nn.init.normal_(weight, mean=center, std=0.2 if weight.ndim == 1 else 0.15)
    return model
