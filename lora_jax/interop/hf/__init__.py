"""Models as Hugging Face folders: config.json, model.safetensors, tokenizer.json; `register_format` adds a family."""

from lora_jax.interop.hf.formats import Format, register_format
from lora_jax.interop.hf.models import load, read, save, tensor_names, unread, untrained, without_weights

__all__ = [
    "Format",
    "load",
    "read",
    "register_format",
    "save",
    "tensor_names",
    "unread",
    "untrained",
    "without_weights",
]
