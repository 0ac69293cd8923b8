"""No n-gram twice: which next tokens would repeat one."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def ban_repeats(
    logits: Float[Array, "rows vocabulary"], tokens: Int[Array, "rows length"], end: Int[Array, ""], size: int
) -> Float[Array, "rows vocabulary"]:
    """The logits of the next token with -inf at every one that would complete an n-gram that the row already has.

    The first `end` of `tokens` are written; `size` is n, 0 bans nothing.
    """
    length = tokens.shape[1]
    if not 0 < size <= length:
        return logits
    starts = jnp.arange(length - size + 1)
    repeats = jnp.broadcast_to(starts + size <= end, (len(tokens), len(starts)))
    for i in range(size - 1):  # the new n-gram would begin with the last n - 1 tokens
        last = jnp.take(tokens, end - (size - 1) + i, axis=1, mode="clip")
        repeats &= tokens[:, i : i + len(starts)] == last[:, None]
    followers = tokens[:, size - 1 :]
    rows = jnp.arange(len(tokens))[:, None]
    return logits.at[rows, followers].min(jnp.where(repeats, -jnp.inf, jnp.inf).astype(logits.dtype))
