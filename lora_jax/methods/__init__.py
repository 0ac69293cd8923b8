"""One method, one file; each registers itself."""

from lora_jax.methods import adapter, compacter, dora, ia3, lokr, lora, pissa, prefix, rows, shift, tune, vera

__all__ = ["adapter", "compacter", "dora", "ia3", "lokr", "lora", "pissa", "prefix", "rows", "shift", "tune", "vera"]
