"""One method, one file; each registers itself."""

from lora_jax.methods import (  # noqa: F401  # noqa: F401
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
