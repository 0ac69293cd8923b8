"""Scaled dot-product attention (Vaswani et al. 2017)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.extras import extra

with extra("train"):
    from jaxtyping import Bool, Float

Queries = Float[Array, "batch heads length size"]
Keys = Float[Array, "batch key_heads slots size"]
Mask = Bool[Array, "#batch #heads #length #slots"]
Drop = Callable[[Array], Array]


def attend(
    query: Queries,
    key: Keys,
    value: Keys,
    mask: Mask | None = None,
    drop: Drop | None = None,
    block: int = 0,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Queries:
    """Scaled dot-product attention, with scores and softmax in float32.

    Heads come before positions, as the products read them: in `jax.nn.dot_product_attention` positions come first, and
    XLA transposes operands and results on a CPU (8 x 128 positions, 12 heads of 64, with gradients: 24 ms, here 14).

    Args:
      query, key, value: (batch, heads, length, size), and of keys and values (batch, key heads, slots, size): each of
        their heads serves heads / key heads of the queries' in a row (Ainslie et al. 2023, arXiv 2305.13245).
      mask: bool, broadcasts to (batch, heads, length, slots): the slots that each query attends to.
      drop: dropout of the weights (batch, heads, length, slots).
      block: the number of queries at a time: scores are (batch, heads, block, slots) at most, in the backward pass too,
        which computes them again (Rabe & Staats 2021, arXiv 2112.05682). 0: all at once. `drop` is called for each
        block.
      scale: of the scores; None: 1 / sqrt(size).
      softcap: the scores become softcap * tanh(scores / softcap) (Gemma 2).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    length = query.shape[2]
    if not block or length <= block:
        return _attend(query, key, value, mask, drop, scale, softcap)
    blocks = -(-length // block)
    size = -(-length // blocks)

    def split(x: Array) -> Array:
        """(.., length, ..) as (blocks, .., size, ..), padded with zeros."""
        x = jnp.pad(x, [(0, blocks * size - length if axis == 2 else 0) for axis in range(4)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], blocks, size, x.shape[3]), 2, 0)

    def attend_block(args: tuple[Array, Array | None]) -> Array:
        part_of_mask = mask if args[1] is None else args[1]
        return _attend(args[0], key, value, part_of_mask, drop, scale, softcap)

    block_masks = None if mask is None or mask.shape[2] == 1 else split(mask)
    out = jnp.moveaxis(lax.map(jax.checkpoint(attend_block), (split(query), block_masks)), 0, 2)
    return out.reshape(*query.shape[:2], blocks * size, -1)[:, :, :length]


def _attend(
    query: Queries,
    key: Keys,
    value: Keys,
    mask: Mask | None,
    drop: Drop | None,
    scale: float,
    softcap: float | None,
) -> Queries:
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    # without it the gradients would be products of float32 and bfloat16 (jax issue 24047)
    precision = lax.DotAlgorithmPreset.BF16_BF16_F32 if query.dtype == jnp.bfloat16 else None
    heads, key_heads = query.shape[1], key.shape[1]
    grouped = heads != key_heads
    if grouped:
        query = query.reshape(query.shape[0], key_heads, heads // key_heads, *query.shape[2:])
    subscripts = "bkgnd,bksd->bkgns" if grouped else "bhnd,bhsd->bhns"
    scores = jnp.einsum(subscripts, query, key, preferred_element_type=wide, precision=precision)
    scores = scores.reshape(scores.shape[0], heads, *scores.shape[-2:]) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:  # finite, so that a query that attends to nothing gives no NaN
        scores = jnp.where(mask, scores, 0.7 * jnp.finfo(wide).min)
    weights = _softmax(scores).astype(value.dtype)
    weights = drop(weights) if drop else weights
    if not grouped:
        return jnp.einsum("bhns,bhsd->bhnd", weights, value)
    weights = weights.reshape(*query.shape[:-1], weights.shape[-1])
    out = jnp.einsum("bkgns,bksd->bkgnd", weights, value)
    return out.reshape(out.shape[0], heads, *out.shape[-2:])


@jax.custom_jvp
def _softmax(x: Array) -> Array:
    """Over the last axis. Its derivative needs its result alone; for that of `jax.nn.softmax` XLA's CPU compiler keeps
    dividend and divisor, each in x's shape, too."""
    numerators = jnp.exp(x - x.max(axis=-1, keepdims=True))
    return numerators * (1 / numerators.sum(axis=-1, keepdims=True))


@_softmax.defjvp
def _(inputs: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    out = _softmax(*inputs)
    return out, out * (tangents[0] - (out * tangents[0]).sum(axis=-1, keepdims=True))


def split_heads(x: Float[Array, "batch length width"], heads: int) -> Queries:
    """The heads' shares of the features: (batch, heads, length, width / heads)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def joined_heads(x: Queries) -> Float[Array, "batch length width"]:
    """The inverse of `split_heads`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
