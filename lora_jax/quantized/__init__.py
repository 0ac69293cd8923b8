"""Frozen weights in 8 and 4 bits: `quantize` puts them in a tree of params, where `lift` meets them."""

from lora_jax.quantized.arrays import Quantized, from_gguf, quantize

__all__ = ["Quantized", "from_gguf", "quantize"]
