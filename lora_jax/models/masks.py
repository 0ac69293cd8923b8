"""Attention masks and positions: padding, packing and the slots of a KV cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lora_jax.core.extras import extra
from lora_jax.models import shapes

with extra("train"):
    from jaxtyping import Bool, Int, Shaped

PaddingMask = Bool[Array, "batch length"]  # True at the tokens that are no padding
Segments = Int[Array, "batch length"]
Slots = Shaped[Array | np.ndarray, "batch length slots"]


def causal_inputs(
    tokens: shapes.Tokens, mask: Any, positions: Any, segments: Any, cache: dict[str, Any] | None
) -> tuple[Int[Array, "batch length"], Bool[Array, "#batch 1 #length slots"] | None, Bool[Array, "batch slots"] | None]:
    """Positions, attention mask and the cache's new mask for tokens that attend to themselves and to those before.

    Arguments and errors are those of `gpt2.GPT2.hidden`.
    """
    length = tokens.shape[1]
    if mask is not None and jnp.ndim(mask) == 3 and (cache is None or positions is None):
        raise ValueError("a mask (batch, length, cache length) needs a cache, and positions")
    if cache is not None and length > (most := cache["mask"].shape[1]):
        raise ValueError(f"{length} tokens do not fit into a cache of length {most}")
    if cache is not None and segments is not None:
        raise ValueError("segments (packing) and a cache do not go together")
    positions, segments = (None if ids is None else jnp.asarray(ids) for ids in (positions, segments))
    keep = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    if cache is None:
        attention = attention_mask(None if mask is None else keep, segments, causal=length)
        return (count_before(keep, segments) if positions is None else positions), attention, None
    if keep.ndim == 3:
        return positions, keep[:, None], cache["mask"]
    index, cached = cache["index"], write(cache["mask"], keep, cache["index"])
    if positions is None:
        positions = lax.dynamic_slice_in_dim(count_before(cached), index, length, axis=1)
    rows, slots = index + jnp.arange(length, dtype=jnp.int32), jnp.arange(cached.shape[1], dtype=jnp.int32)
    up_to_own = slots[None, None, None, :] <= rows[None, None, :, None]
    return positions, cached[:, None, None, :] & up_to_own, cached


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

    `mask` is True at non-padding tokens, None without padding; tokens attend within their own segment; `causal` is the
    length of sequences whose tokens attend to themselves and to those before, 0: to all.
    """
    parts = [] if mask is None else [mask[:, None, None, :]]
    if segments is not None:
        parts.append(segments[:, None, :, None] == segments[:, None, None, :])
    if causal:
        parts.append(jnp.tril(jnp.ones((causal, causal), bool))[None, None])
    return functools.reduce(jnp.logical_and, parts) if parts else None


def write(
    slots: Shaped[Array, " batch *slots"], new: Shaped[Array, " batch *new"], index: Int[Array, "..."], axis: int = 1
) -> Shaped[Array, " batch *slots"]:
    """The slots (batch, slots, ...), or with the slots on another axis, with `new` written into them.

    `index` is () int32, the first slot of consecutive ones; or (batch, new length) int32, the slot of each.
    """
    new = new.astype(slots.dtype)
    if index.ndim == 0:
        return lax.dynamic_update_slice_in_dim(slots, new, index, axis)
    before = (slice(None),) * (axis - 1)
    return jax.vmap(lambda row, new, at: row.at[(*before, at)].set(new, unique_indices=True))(slots, new, index)
