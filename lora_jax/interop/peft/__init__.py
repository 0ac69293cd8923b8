"""PEFT's adapters, both ways: a folder of adapter_config.json and adapter_model.safetensors.

A kind of adapter (`peft_type`) from outside is registered in the same way as ours: `register_kind("NAME", Kind(...))`,
with the parts of `peft.config` and `peft.kind`; `peft/kinds/ia3.py` is an example. A model family is registered with
`hf.register_format`.
"""

from lora_jax.interop.hf.families import Architecture, Head, register_architecture
from lora_jax.interop.peft.adapters import load, save
from lora_jax.interop.peft.kind import Kind
from lora_jax.interop.peft.kinds import register_kind
from lora_jax.interop.peft.without_base import updates

__all__ = ["Architecture", "Head", "Kind", "load", "register_architecture", "register_kind", "save"]
__all__ += ["updates"]
