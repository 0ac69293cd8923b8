"""One method, one file; each registers itself."""

from lora_jax.methods import lora, tune

__all__ = ["lora", "tune"]
