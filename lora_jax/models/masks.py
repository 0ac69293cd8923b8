"""Attention masks and positions: padding, packing and the slots of a KV cache."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.extras import extra

with extra("train"):
    from jaxtyping import Bool, Int, Shaped

PaddingMask = Bool[Array, "batch length"]  # True at the tokens that are no padding
Segments = Int[Array, "batch length"]


def count_before(mask: PaddingMask, segments: Segments | None = None) -> Int[Array, "batch length"]:
    """The number of non-padding tokens before each one in its segment, 0 at padding; int32."""
    ones = mask.astype(jnp.int32)
    before = jnp.cumsum(ones, axis=1) - ones
    if segments is not None:
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        before = before - lax.cummax(jnp.where(starts, before, 0), axis=1)
    return jnp.where(mask, before, 0)


def attention_mask(
    mask: PaddingMask | None, segments: Segments | None, causal: int = 0
) -> Bool[Array, "#batch 1 #length length"] | None:
    """The positions that each query attends to, (batch or 1, 1, length or 1, length); None: all.

    Args:
      mask: True at non-padding tokens; None: there is no padding.
      segments: tokens attend within their own.
      causal: the length of sequences whose tokens attend to themselves and to those before; 0: to all.
    """
    allowed = None if mask is None else mask[:, None, None, :]
    if segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        allowed = same if allowed is None else allowed & same
    if causal:
        before = jnp.tril(jnp.ones((causal, causal), bool))[None, None]
        allowed = before if allowed is None else allowed & before
    return allowed


def write(
    slots: Shaped[Array, " batch *slots"], new: Shaped[Array, " batch *new"], index: Int[Array, "..."], axis: int = 1
) -> Shaped[Array, " batch *slots"]:
    """The slots (batch, slots, ...), or with the slots on another axis, with `new` written into them.

    Args:
      index: () int32, the first slot of consecutive ones; or (batch, new length) int32, the slot of each.
    """
    new = new.astype(slots.dtype)
    if index.ndim == 0:
        return lax.dynamic_update_slice_in_dim(slots, new, index, axis)
    before = (slice(None),) * (axis - 1)
    return jax.vmap(lambda row, new, at: row.at[(*before, at)].set(new, unique_indices=True))(slots, new, index)


def cached_attention_mask(
    mask: Bool[Array, "batch slots"], index: Int[Array, ""], length: int
) -> Bool[Array, "batch 1 length slots"]:
    """The slots that each of `length` tokens, written from slot `index` on, attends to: up to its own, no padding."""
    rows = index + jnp.arange(length, dtype=jnp.int32)
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)
    causal = slots[None, None, None, :] <= rows[None, None, :, None]
    return mask[:, None, None, :] & causal
