"""Models as Hugging Face folders: config.json, model.safetensors, tokenizer.json.

`register_format` and `register_architecture` add a family; `lora_jax/interop/hf/gpt2.py` is an example.
"""

from lora_jax.interop.hf.architectures import Architecture, Head, register_architecture
from lora_jax.interop.hf.formats import Format, register_format
from lora_jax.interop.hf.models import load, read, save, tensor_names, unread, untrained, without_weights

__all__ = [
    "Architecture",
    "Format",
    "Head",
    "load",
    "read",
    "register_architecture",
    "register_format",
    "save",
    "tensor_names",
    "unread",
    "untrained",
    "without_weights",
]
