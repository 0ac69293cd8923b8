"""Who sees whom, and where each token stands: padding, packing and the slots of a KV cache."""

import jax
import jax.numpy as jnp
from jax import Array, lax


def count_before(real: Array, segments: Array | None = None) -> Array:
    """How many real tokens stand before each one in its segment, 0 at padding; int32."""
    ones = real.astype(jnp.int32)
    before = jnp.cumsum(ones, axis=1) - ones
    if segments is not None:
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        before = before - lax.cummax(jnp.where(starts, before, 0), axis=1)
    return jnp.where(real, before, 0)


def attention_mask(real: Array | None, segments: Array | None, causal: int = 0) -> Array | None:
    """Who sees whom, (batch or 1, 1, length or 1, length); None: all. `causal`: the length of texts of which each token
    sees itself and those before it."""
    mask = None if real is None else real[:, None, None, :]
    if segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        mask = same if mask is None else mask & same
    if causal:
        before = jnp.tril(jnp.ones((causal, causal), bool))[None, None]
        mask = before if mask is None else mask & before
    return mask


def write(slots: Array, new: Array, index: Array, axis: int = 1) -> Array:
    """The slots (batch, length, ...), or with their length on another axis, with `new` in them.

    Args:
      index: () int32, `new` stands from there on; or (batch, new length) int32, the slot of each.
    """
    new = new.astype(slots.dtype)
    if index.ndim == 0:
        return lax.dynamic_update_slice_in_dim(slots, new, index, axis)
    before = (slice(None),) * (axis - 1)
    return jax.vmap(lambda row, new, at: row.at[(*before, at)].set(new, unique_indices=True))(slots, new, index)


def cached_attention_mask(seen: Array, index: Array, length: int) -> Array:
    """Which slots each of `length` tokens from `index` on sees: real ones up to itself."""
    rows = index + jnp.arange(length, dtype=jnp.int32)
    slots = jnp.arange(seen.shape[1], dtype=jnp.int32)
    causal = slots[None, None, None, :] <= rows[None, None, :, None]
    return seen[:, None, None, :] & causal
