"""Models as Hugging Face folders: config.json, model.safetensors, tokenizer.json.

`register_format` adds a family; `lora_jax/interop/hf/gpt2.py` is an example.
"""

from lora_jax.interop.hf.chat import chat_template, save_chat, special_tokens
from lora_jax.interop.hf.families import Architecture, Format, Head, read_config, register_architecture, register_format
from lora_jax.interop.hf.models import blocks, load, read, save, shapes_of, unread, untrained, without_weights
from lora_jax.interop.hf.origin import Origin, origin_of
from lora_jax.interop.hf.tokenizer import read_tokenizer

__all__ = ["Architecture", "Format", "Head", "Origin", "blocks", "chat_template", "load", "origin_of", "read"]
__all__ += ["read_config", "read_tokenizer", "register_architecture", "register_format", "save", "save_chat"]
__all__ += ["shapes_of", "special_tokens", "unread", "untrained", "without_weights"]
