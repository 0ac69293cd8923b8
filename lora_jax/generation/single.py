"""Greedy decoding and sampling: one sequence a prompt, token by token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from lora_jax.core.lifting.interpreter import lift
from lora_jax.generation.bans import ban_repeats
from lora_jax.models.family import new_cache


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "no_repeat", "top_k"))
def extend(
    model: Any,
    params: Any,
    tokens: Int[Array, "batch length"],
    mask: Shaped[Array, "batch length"],
    eos: Int[Array, " ends"],
    pad: Int[Array, ""],
    key: Array | None,
    temperature: Float[Array, ""] | None,
    top_p: Float[Array, ""] | None,
    *,
    max_new_tokens: int,
    no_repeat: int,
    top_k: int | None,
) -> tuple[Int[Array, "batch new"], Bool[Array, " batch"]]:
    """(batch, max_new_tokens) new tokens, and (batch,) whether logits were NaN. Without a key it is greedy."""
    tokens, mask = tokens.astype(jnp.int32), mask.astype(bool)
    forward = lift(model.apply)
    batch, length = tokens.shape
    cache = new_cache(model, batch, length + max_new_tokens)
    text = jnp.concatenate([tokens, jnp.full((batch, max_new_tokens), pad, jnp.int32)], 1)

    def next_token(text: Array, count: Array, cache: Any, new: Array, mask: Array | None) -> tuple[Any, Array, Array]:
        last = jnp.full((batch, 1), new.shape[1] - 1, jnp.int32)
        logits, cache = forward({"params": params}, new, mask, cache=cache, labelled=last)
        logits = ban_repeats(logits[:, 0], text, length + count, no_repeat)
        if key is None or temperature is None:
            token = largest(logits)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, count), warp(logits, temperature, top_k, top_p))
        return cache, token.astype(jnp.int32), jnp.isnan(logits.max(-1))

    def unfinished(state: tuple) -> Array:
        count, _, _, done, _, _ = state
        return (count < max_new_tokens) & ~done.all()

    def step(state: tuple) -> tuple:
        count, cache, token, done, text, has_nan = state
        cache, token, nan = next_token(text, count, cache, token[:, None], None)
        token = jnp.where(done, pad, token)
        text = text.at[:, length + count].set(token)
        return count + 1, cache, token, done | jnp.isin(token, eos), text, has_nan | (nan & ~done)

    start = jnp.zeros((), jnp.int32)
    cache, token, has_nan = next_token(text, start, cache, tokens, mask)
    state = (start + 1, cache, token, jnp.isin(token, eos), text.at[:, length].set(token), has_nan)
    *_, text, has_nan = lax.while_loop(unfinished, step, state)
    return text[:, length:], has_nan


def largest(logits: Float[Array, "rows vocabulary"]) -> Int[Array, " rows"]:
    """argmax of (rows, vocabulary), the first of equals, by two reductions that XLA vectorises on a CPU: jnp.argmax is
    one of pairs, which it does not. Of NaN any token."""
    indices = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(logits == logits.max(1, keepdims=True), indices, logits.shape[1] - 1).min(1)


def warp(
    logits: Float[Array, "rows vocabulary"],
    temperature: Float[Array, ""],
    top_k: int | None,
    top_p: Float[Array, ""] | None,
) -> Float[Array, "rows vocabulary"]:
    """(rows, vocabulary) logits to draw from: temperature, then the k likeliest, then the likeliest that reach p."""
    logits = logits / temperature
    if top_k is not None:
        smallest = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1)
        before = jnp.cumsum(ranked, -1) - ranked  # a token stays while those before it do not reach p
        kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, before < top_p, -1, inplace=False)
        logits = jnp.where(kept, logits, -jnp.inf)
    return logits
