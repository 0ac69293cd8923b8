"""One method, one file; each registers itself."""

from lora_jax.methods import adapter, bank, compacter, dora, ia3, lokr, lora, pissa, prefix, rows, shift, tune, vera

__all__ = [
    "adapter",
    "bank",
    "compacter",
    "dora",
    "ia3",
    "lokr",
    "lora",
    "pissa",
    "prefix",
    "rows",
    "shift",
    "tune",
    "vera",
]
