"""GGUF files of tiny models and tokenizers, written with gguf's own writer as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, str]]) -> Path:
    """A file of these keys, and of these tensors as they lie in it: values, or bytes of a quantized type."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_torch(model: Any, kind: str = "F32") -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, str]]]:
    """Metadata and tensors of a model of transformers; matrices are of the kind, vectors F32."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = as_converted(config, name, weight.numpy())
        to = kind if values.ndim == 2 else "F32"
        tensors[names.get_name(name, (".weight", ".bias"))] = (quantized(values, to), to)
    if config.rope_parameters.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = (rope_factors(config), "F32")
    return metadata_of(config), tensors


def as_converted(config: Any, name: str, values: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter stores of Hugging Face's tensor."""
    if config.model_type in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        pairs = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    return values


def rope_factors(config: Any) -> np.ndarray:
    """What every frequency of Llama 3 is divided by, as the converter computes it."""
    rope = config.rope_parameters
    low_wave = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high_wave = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, config.head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / config.head_dim)
        if wave < high_wave:
            factors.append(1.0)
        elif wave > low_wave:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def metadata_of(config: Any) -> dict[str, Any]:
    """The keys that the converter writes of a config."""
    name = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    by_kind = config.model_type == "gemma3_text"
    rope = config.rope_parameters["full_attention"] if by_kind else config.rope_parameters
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": size,
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if (original := rope.get("original_max_position_embeddings")) not in (None, 8192):
        keys["rope.scaling.original_context_length"] = original
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, field, None)) is not None:
            keys[field] = cap
    if config.model_type in ("mistral", "gemma2", "gemma3_text") and config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    metadata = {"general.architecture": name, **{f"{name}.{key}": value for key, value in keys.items()}}
    return metadata | {"tokenizer.ggml.eos_token_id": config.eos_token_id}


def quantized(values: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of values in a type, or the values; random blocks of a type that gguf cannot make of values."""
    if kind in ("F32", "F16"):
        return values.astype(np.float32 if kind == "F32" else np.float16)
    if kind not in ("Q4_K", "Q5_K", "Q6_K"):
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (values.size // per_block, block_bytes), np.uint8)
    scales = generator.uniform(1e-4, 2e-3, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":  # its one scale stands at the end
        blocks[:, -2:] = scales[:, :2]
    else:
        blocks[:, :4] = scales
    return blocks.reshape(len(values), -1)
