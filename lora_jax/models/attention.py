"""Scaled dot-product attention (Vaswani et al. 2017)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Sharding


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    dropped: Callable[[Array], Array] = lambda weights: weights,
    block: int = 0,
) -> Array:
    """What each place takes of the others' values, (batch, heads, n, size); scores and softmax in float32.

    Heads stand before places, as the products read them: in `jax.nn.dot_product_attention` places stand first, and XLA
    transposes operands and results on a CPU (8 x 128 places, 12 heads of 64, with gradients: 24 ms, here 14).

    Args:
      query: (batch, heads, n, size). key, value: (batch, heads, s, size).
      mask: bool, broadcasts to (batch, heads, n, s): who sees whom.
      dropped: what becomes of the weights (batch, heads, n, s).
      block: so many queries at a time: scores are (batch, heads, block, s) at most, in the backward pass too, which
        computes them again (Rabe & Staats 2021, arXiv 2112.05682). 0: all at once. `dropped` gets block by block.
    """
    n = query.shape[2]
    if not block or n <= block:
        return _attend(query, key, value, mask, dropped)
    blocks = -(-n // block)
    size = -(-n // blocks)

    def cut(x: Array) -> Array:
        """(.., n, ..) as (blocks, .., size, ..), filled up with zeros."""
        x = jnp.pad(x, [(0, blocks * size - n if axis == 2 else 0) for axis in range(4)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], blocks, size, x.shape[3]), 2, 0)

    def one(part: tuple[Array, Array | None]) -> Array:
        return _attend(part[0], key, value, mask if part[1] is None else part[1], dropped)

    own_mask = None if mask is None or mask.shape[2] == 1 else cut(mask)
    out = jnp.moveaxis(lax.map(jax.checkpoint(one), (cut(query), own_mask)), 0, 2)
    return out.reshape(*query.shape[:2], blocks * size, -1)[:, :, :n]


def _attend(query: Array, key: Array, value: Array, mask: Array | None, dropped: Callable[[Array], Array]) -> Array:
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    # without it the gradients would be products of float32 and bfloat16 (jax issue 24047)
    precision = lax.DotAlgorithmPreset.BF16_BF16_F32 if query.dtype == jnp.bfloat16 else None
    scores = jnp.einsum("bhnd,bhsd->bhns", query, key, preferred_element_type=wide, precision=precision)
    scores *= query.shape[-1] ** -0.5
    if mask is not None:  # finite, so that who sees nobody has no NaN
        scores = jnp.where(mask, scores, 0.7 * jnp.finfo(wide).min)
    weights = dropped(jax.nn.softmax(scores, axis=-1).astype(value.dtype))
    return jnp.einsum("bhns,bhsd->bhnd", weights, value)


def split_heads(x: Array, heads: int) -> Array:
    """(batch, n, width) as (batch, heads, n, width / heads)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def joined_heads(x: Array) -> Array:
    """(batch, heads, n, size) as (batch, n, heads * size)."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def placed(x: Array, sharding: Sharding | None) -> Array:
    """x, living there on a mesh; None: wherever the compiler has it."""
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)
