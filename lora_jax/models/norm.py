"""LayerNorm (Ba et al. 2016)."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class Norm(nn.LayerNorm):
    """LayerNorm, computed in float32, for any dtype."""

    use_fast_variance: bool = False  # E[x^2] - E[x]^2 would lose digits: some features of GPT-2 are far from zero

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)
