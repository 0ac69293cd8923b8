"""Dropout (Srivastava et al. 2014) from 16 random bits an entry."""

import jax
import jax.numpy as jnp
from jax import Array, lax


def drop(key: Array, x: Array, rate: float) -> Array:
    """x, each entry zero with probability `rate` (0 <= rate < 1) and the others scaled so that the mean stays.

    `jax.random.bernoulli` draws 32 bits an entry, and on a CPU takes as long for the input of a 768 x 3072 kernel as
    the product with it; two entries a word take a quarter of that. The rate is a multiple of 2^-16, the nearest, and
    the scale is that of the rounded one. Each row along the first axis draws with a key of its own, so that of texts
    (rows, length, width) the first tokens have the same draws however far they are padded.
    """
    kept = min(max(round((1.0 - rate) * 2**16), 1), 2**16)
    first, *rows, width = (1,) * (2 - x.ndim) + x.shape
    shape = (*rows, -(-width // 2))  # two entries a word along the last axis: x may be sharded
    words = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(jax.random.split(key, first))
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(first, *rows, -1)[..., :width].reshape(x.shape)
    return jnp.where(bits.astype(jnp.int32) < kept, x * (2**16 / kept), jnp.zeros_like(x))
