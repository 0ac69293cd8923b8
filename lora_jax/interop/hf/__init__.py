"""Models as Hugging Face folders: config.json, model.safetensors, tokenizer.json.

`register_format` adds a family; `lora_jax/interop/hf/gpt2.py` is an example.
"""

from lora_jax.interop.hf.families import Architecture, Format, Head, read_config, register_architecture, register_format
from lora_jax.interop.hf.models import load, read, save, unread, untrained, without_weights
from lora_jax.interop.hf.tokenizer import read_tokenizer

__all__ = ["Architecture", "Format", "Head", "load", "read", "read_config", "read_tokenizer", "register_architecture"]
__all__ += ["register_format", "save", "unread", "untrained", "without_weights"]
