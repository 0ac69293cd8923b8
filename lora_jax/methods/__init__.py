"""One method, one file; each registers itself."""

from lora_jax.methods import lora, rows, shift, tune

__all__ = ["lora", "rows", "shift", "tune"]
