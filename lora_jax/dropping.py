"""Dropout (Srivastava et al. 2014) from 16 random bits an entry."""

import jax
import jax.numpy as jnp
from jax import Array, lax


def drop(key: Array, x: Array, rate: float) -> Array:
    """x, each entry zero with probability `rate` (0 <= rate < 1) and the others scaled so that the mean stays.

    `jax.random.bernoulli` draws 32 bits an entry, and on a CPU takes as long for the input of a 768 x 3072 kernel as
    the product with it; two entries a word take a quarter of that. The rate is a multiple of 2^-16, the nearest, and
    the scale is that of the rounded one.
    """
    kept = min(max(round((1.0 - rate) * 2**16), 1), 2**16)
    *rows, width = x.shape or (1,)
    words = jax.random.bits(key, (*rows, -(-width // 2)), jnp.uint32)  # along the last axis: x may be sharded
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(*rows, 2 * words.shape[-1])[..., :width].reshape(x.shape)
    return jnp.where(bits.astype(jnp.int32) < kept, x * (2**16 / kept), jnp.zeros_like(x))
