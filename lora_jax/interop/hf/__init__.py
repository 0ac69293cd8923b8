"""Models as Hugging Face folders: config.json, model.safetensors, tokenizer.json."""

from lora_jax.interop.hf.models import FAMILIES, load, read, save, tensor_names, unread, untrained, without_weights

__all__ = ["FAMILIES", "load", "read", "save", "tensor_names", "unread", "untrained", "without_weights"]
