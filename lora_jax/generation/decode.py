"""Decoding with a KV cache, compiled once for each shape of the prompts."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lora_jax.lifting import lift
from lora_jax.models.gpt2 import init_cache


def generate(
    model: Any,
    params: Any,
    tokens: Any,
    mask: Any,
    *,
    max_new_tokens: int,
    eos: int | Sequence[int],
    pad: int = 0,
) -> Array:
    """The most likely next token, again and again, until every row has met an end token.

    Args:
      model: a GPT-2 (`models.gpt2`).
      params: its parameters: plain, adapted (`method.apply(params, delta)`) or merged.
      tokens: (batch, length) int32, the prompts, padded on the left.
      mask: (batch, length) bool or int, 1 at real tokens.
      max_new_tokens: the most tokens to add, at least 1.
      eos: an end token, or several. The one met is part of the result.
      pad: stands after it.

    Returns:
      (batch, max_new_tokens) int32, the new tokens only.

    Raises:
      ValueError: prompts and new tokens exceed the model's positions; the padding is not on the
          left; eos or pad is not in the vocabulary.
    """
    tokens, mask = _array(tokens, np.int32), _array(mask, bool)
    ends = np.atleast_1d(np.asarray(eos, np.int32))
    _check(model.config, tokens, mask, max_new_tokens, ends.tolist(), pad)
    return _greedy(model, params, tokens, mask, ends, np.int32(pad), max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _greedy(model: Any, params: Any, tokens: Array, mask: Array, eos: Array, pad: Array, max_new_tokens: int) -> Array:
    tokens, mask = tokens.astype(jnp.int32), mask.astype(bool)
    forward = lift(model.apply)
    batch, length = tokens.shape
    cache = init_cache(model.config, batch, length + max_new_tokens)

    def following(cache: Any, tokens: Array, mask: Array | None) -> tuple[Any, Array]:
        last = jnp.full((batch, 1), tokens.shape[1] - 1, jnp.int32)
        variables = {"params": params}
        logits, cache = forward(variables, tokens, mask, cache=cache, labelled=last)
        return cache, jnp.argmax(logits[:, 0], -1).astype(jnp.int32)

    def ended(token: Array) -> Array:
        return (token[:, None] == eos[None, :]).any(-1)

    def unfinished(state: tuple) -> Array:
        count, _, _, done, _ = state
        return (count < max_new_tokens) & ~done.all()

    def step(state: tuple) -> tuple:
        count, cache, token, done, out = state
        cache, token = following(cache, token[:, None], None)
        token = jnp.where(done, pad, token)
        return count + 1, cache, token, done | ended(token), out.at[:, count].set(token)

    cache, token = following(cache, tokens, mask)
    out = jnp.full((batch, max_new_tokens), pad, jnp.int32).at[:, 0].set(token)
    state = (jnp.ones((), jnp.int32), cache, token, ended(token), out)
    return lax.while_loop(unfinished, step, state)[-1]


def _array(x: Any, dtype: Any) -> Any:
    # numpy, not jax.numpy, which would compile a conversion for each shape
    return x if isinstance(x, jax.Array) else np.asarray(x, dtype)


def _check(config: Any, tokens: Any, mask: Any, max_new_tokens: int, ends: list[int], pad: int) -> None:
    if np.ndim(tokens) != 2 or np.shape(tokens) != np.shape(mask):
        raise ValueError(f"tokens {np.shape(tokens)} and mask {np.shape(mask)}: both must be (batch, length)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: at least 1")
    length = np.shape(tokens)[1]
    if length + max_new_tokens > config.n_positions:
        raise ValueError(
            f"prompts of {length} tokens and max_new_tokens={max_new_tokens} need "
            f"{length + max_new_tokens} positions, the model has {config.n_positions}"
        )
    if outside := [i for i in (*ends, pad) if not 0 <= i < config.vocab_size]:
        raise ValueError(f"eos={ends}, pad={pad}: {outside[0]} is not in the vocabulary of {config.vocab_size}")
    if isinstance(mask, jax.core.Tracer):
        return
    real = np.asarray(mask, bool)
    if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("mask: prompts must be padded on the left and hold a token at least")
