"""PEFT's adapters, both ways: a folder of adapter_config.json and adapter_model.safetensors."""

from lora_jax.interop.peft.adapters import load, save

__all__ = ["load", "save"]
