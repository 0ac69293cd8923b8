"""One method, one file; each registers itself."""

from lora_jax.methods import (
    adapter,
    bank,
    bias_delta,
    compacter,
    dora,
    ia3,
    lokr,
    lora,
    pissa,
    prefix,
    token_rows,
    tune,
    vera,
)

__all__ = [
    "adapter",
    "bank",
    "bias_delta",
    "compacter",
    "dora",
    "ia3",
    "lokr",
    "lora",
    "pissa",
    "prefix",
    "token_rows",
    "tune",
    "vera",
]
