"""LayerNorm (Ba et al. 2016)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.extras import extra

with extra("train"):
    from flax import linen as nn
    from jaxtyping import Float


class Norm(nn.LayerNorm):
    """LayerNorm, computed in float32, for any dtype."""

    dtype: Any = jnp.float32
    use_fast_variance: bool = False  # E[x^2] - E[x]^2 would lose digits: some features of GPT-2 are far from zero

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:  # type: ignore[override]
        with jax.numpy_dtype_promotion("standard"):  # of scale and bias that are kept in 16 bits
            return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x in 32 bits at least, for sums of numbers that are kept in 16."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
