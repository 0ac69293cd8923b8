"""The metadata of a GGUF file as the fields of a Hugging Face config.json."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.interop.gguf.reader import Contents

# general.architecture -> model_type
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
ROPE_FACTORS = "rope_freqs.weight"  # what llama.cpp's converter makes of Llama 3's rope parameters
_DEEP = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose queries have a scale of their own
# Keys that change the function, with the one value that is computed here.
_ONLY: dict[str, Any] = {
    "expert_count": 0,
    "attention.causal": True,
    "attention.max_alibi_bias": 0,
    "attention.clamp_kqv": 0,
    "attention.shared_kv_layers": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "embedding_scale": 1,
    "rope.scale_linear": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
}


class _Keys:
    """The metadata of the architecture, each value of the type that is asked for."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ValueError(f"{path}: general.architecture is {architecture!r}; {', '.join(ARCHITECTURES)} are read")
        self.metadata, self.path, self.architecture = metadata, path, architecture

    def has(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.metadata

    def number(self, name: str, default: float | None = None, kind: type = int) -> Any:
        """A number of the file; a ValueError where it is of another type, or missing without a default."""
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one for each layer, which are alike
        if value is None:
            raise ValueError(f"{self.path}: the metadata lacks {key}")
        if type(value) not in ((int,) if kind is int else (int, float)):
            raise ValueError(f"{self.path}: {key} is {repr(value)[:80]}, not one {kind.__name__} for all layers")
        if not 0 <= value < (2**31 if kind is int else math.inf):
            raise ValueError(f"{self.path}: {key} is {value}, which no model has")
        return kind(value)

    def only(self, name: str, value: Any) -> None:
        given = self.metadata.get(f"{self.architecture}.{name}", value)
        if isinstance(given, np.ndarray) or given != value:
            key = f"{self.architecture}.{name}"
            raise ValueError(f"{self.path}: {key} is {repr(given)[:80]}; only {value!r} is supported")


def fields_of(contents: Contents, path: Path, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The fields of a config.json that say what the metadata says.

    Args:
      contents, path: of the file.
      read: the numbers of one of its tensors.

    Raises:
      ValueError: another architecture than ARCHITECTURES; a key that is missing, of another type, at odds with the
        tensors, or that changes the function in a way that is not supported.
    """
    keys, tensors = _Keys(contents.metadata, path), contents.tensors
    for name, value in _ONLY.items():
        keys.only(name, value)
    heads = keys.number("attention.head_count")
    hidden = keys.number("embedding_length")
    size = keys.number("attention.key_length", hidden // heads if heads else 0)
    if not heads or not size:
        raise ValueError(f"{path}: {heads} heads of {size} features: no model has such")
    keys.only("attention.value_length", size)
    keys.only("rope.dimension_count", size)
    fields: dict[str, Any] = {
        "model_type": ARCHITECTURES[keys.architecture],
        "num_hidden_layers": keys.number("block_count"),
        "hidden_size": hidden,
        "intermediate_size": keys.number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": size,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", kind=float),
        "max_position_embeddings": keys.number("context_length"),
        "vocab_size": keys.number("vocab_size", len(contents.metadata.get("tokenizer.ggml.tokens", ())) or None),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        if (token := contents.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if type(token) is not int:
                raise ValueError(f"{path}: tokenizer.ggml.{key}_token_id is {repr(token)[:80]}, not an id")
            fields[f"{name}_token_id"] = token
    _check_sizes(keys, fields, contents)
    rope = _rope(keys, size, read(ROPE_FACTORS) if ROPE_FACTORS in tensors else None)
    return fields | {"rope_parameters": rope} | _of_windows(keys, fields, rope)


def _check_sizes(keys: _Keys, fields: Mapping[str, Any], contents: Contents) -> None:
    """A ValueError where the metadata says other sizes than the tensors have."""
    layers = {name.split(".")[1] for name in contents.tensors if name.startswith("blk.")}
    if keys.number("block_count") != len(layers):
        raise ValueError(
            f"{keys.path}: {keys.architecture}.block_count is {keys.number('block_count')}, but the tensors are of "
            f"{len(layers)} layers"
        )
    queries = fields["num_attention_heads"] * fields["head_dim"]
    key_rows = fields["num_key_value_heads"] * fields["head_dim"]
    for what, size, name, axis in (
        ("embedding_length", fields["hidden_size"], "token_embd.weight", 1),
        ("vocab_size, or the number of tokens,", fields["vocab_size"], "token_embd.weight", 0),
        ("feed_forward_length", fields["intermediate_size"], "blk.0.ffn_up.weight", 0),
        ("attention.head_count times the head's size", queries, "blk.0.attn_q.weight", 0),
        ("attention.head_count_kv times the head's size", key_rows, "blk.0.attn_k.weight", 0),
    ):
        shape = contents.tensors[name].shape if name in contents.tensors else ()
        if axis < len(shape) and shape[axis] != size:
            raise ValueError(f"{keys.path}: {what} is {size}, but {name} has shape {shape}")


def _rope(keys: _Keys, size: int, factors: np.ndarray | None) -> dict[str, Any]:
    """The fields of rope_parameters, for layers without a window."""
    kind = keys.metadata.get(f"{keys.architecture}.rope.scaling.type", "none")
    theta = keys.number("rope.freq_base", 1e6 if keys.architecture == "gemma3" else 1e4, float)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if factors is not None:
        if kind != "none":
            raise ValueError(f"{keys.path}: {ROPE_FACTORS} beside rope.scaling.type {kind!r} is not supported")
        return rope | _llama3(keys, size, theta, factors)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{keys.path}: rope.scaling.type is {kind!r}; only none, linear and yarn are supported")
    rope |= {"rope_type": kind, "factor": keys.number("rope.scaling.factor", kind=float)}
    if kind == "yarn":
        if keys.has("rope.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = keys.number("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if keys.has(f"rope.scaling.yarn_{name}"):
                rope[name] = keys.number(f"rope.scaling.yarn_{name}", kind=float)
    return rope


def _llama3(keys: _Keys, size: int, theta: float, factors: np.ndarray) -> dict[str, Any]:
    """Llama 3's parameters, of which the file holds what every frequency is divided by."""
    original, low, high = keys.number("rope.scaling.original_context_length", 8192), 1.0, 4.0
    factor = float(factors.max(initial=1.0))
    cycles = original * theta ** (-np.arange(0, size, 2) / size) / (2 * np.pi)
    kept = np.clip((cycles - low) / (high - low), 0, 1)
    if factors.shape != kept.shape or not np.allclose(factors, 1 / (kept + (1 - kept) / factor), rtol=1e-4):
        raise ValueError(
            f"{keys.path}: {ROPE_FACTORS} is not what Llama 3's rope parameters give (factor {factor:g}, context "
            f"{original}, low_freq_factor {low:g}, high_freq_factor {high:g}); others are not supported"
        )
    rope = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original}
    return rope | {"low_freq_factor": low, "high_freq_factor": high}


def _of_windows(keys: _Keys, fields: Mapping[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """The fields of models with windows: Mistral, which is a llama with one, and Gemma 2 and 3."""
    window = keys.number("attention.sliding_window", 4096 if keys.architecture == "gemma2" else 0)
    if not keys.architecture.startswith("gemma"):
        if window and keys.architecture == "llama":
            return {"model_type": "mistral", "sliding_window": window}
        keys.only("attention.sliding_window", 0)
        return {}
    deep = fields["num_hidden_layers"] == _DEEP[keys.architecture]
    scale = fields["hidden_size"] // fields["num_attention_heads"] if deep else fields["head_dim"]
    made: dict[str, Any] = {"sliding_window": window or None, "query_pre_attn_scalar": scale}
    pattern = keys.metadata.get(f"{keys.architecture}.attention.sliding_window_pattern", 0)
    if isinstance(pattern, np.ndarray):
        made["layer_types"] = ["sliding_attention" if local else "full_attention" for local in pattern]
    elif pattern not in (0, {"gemma2": 2, "gemma3": 6}[keys.architecture]):
        keys.only("attention.sliding_window_pattern", {"gemma2": 2, "gemma3": 6}[keys.architecture])
    caps = {"gemma2": (50.0, 30.0), "gemma3": (0.0, 0.0)}[keys.architecture]
    for name, cap in zip(("attn_logit_softcapping", "final_logit_softcapping"), caps, strict=True):
        made[name] = keys.number(name, cap, float) or None
    if keys.architecture == "gemma3":
        near = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 1e4, float)}
        made["rope_parameters"] = {"full_attention": rope, "sliding_attention": near}
    return made
