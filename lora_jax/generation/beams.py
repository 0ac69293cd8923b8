"""Beam search over one KV cache that is never reordered.

All beams of a prompt share the slots of its cache. A beam's attention mask has the prompt, which is computed and kept
once, and a slot for each of the beam's tokens, so that beams with a common beginning share that too. Choosing beams
chooses rows of the mask; no keys and values move. Slots that no beam attends to are free for new tokens, so the cache
seldom has to hold `num_beams` times the new tokens: it begins small and grows when it is full.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from lora_jax.core.lifting.interpreter import lift
from lora_jax.generation import beam_rules
from lora_jax.generation.bans import ban_repeats
from lora_jax.models.family import new_cache

_ROOM = 16  # the cache begins with so many slots a beam besides the prompt's, then has twice as many, and so on


class Beams(NamedTuple):
    """The running beams: b prompts, k beams each, up to T new tokens."""

    tokens: Int[Array, "b k T"]  # chosen so far, then pad
    attends: Bool[Array, "b k slots"]  # the slots of the cache that hold the prompt and their tokens
    scores: Float[Array, "b k"]  # log p


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "num_beams", "no_repeat", "early_stopping", "rule")
)
def search(
    model: Any,
    params: Any,
    tokens: Int[Array, "batch length"],
    mask: Shaped[Array, "batch length"],
    eos: Int[Array, " ends"],
    pad: Int[Array, ""],
    length_penalty: Float[Array, ""],
    *,
    max_new_tokens: int,
    num_beams: int,
    no_repeat: int,
    early_stopping: bool | str,
    rule: str,
) -> tuple[Int[Array, "batch new"], Bool[Array, " batch"]]:
    """(batch, max_new_tokens) new tokens of each prompt's best beam, and (batch,) whether logits were NaN."""
    tokens, mask = tokens.astype(jnp.int32), mask.astype(bool)
    forward = functools.partial(lift(model.apply), {"params": params})
    batch, length = tokens.shape
    advance = beam_rules.RULES[rule](eos, length_penalty, max_new_tokens, early_stopping)
    banned_in = tokens if advance.bans_prompt else tokens[:, :0]
    history = jnp.broadcast_to(banned_in[:, None], (batch, num_beams, banned_in.shape[1]))

    def choose(logits: Array, count: Array, beams: Beams, finished: Any) -> tuple[Beams, Any]:
        """The beams after another token, from the logits (b, k, vocabulary) of each."""
        text = jnp.concatenate([history, beams.tokens], 2).reshape(batch * num_beams, -1)
        ban = functools.partial(ban_repeats, tokens=text, end=history.shape[2] + count, size=no_repeat)
        return advance(ban, logits.reshape(batch * num_beams, -1), count, beams, finished)

    def unfinished(state: tuple) -> Array:
        """Whether a prompt needs another step, and the cache has room for it."""
        count, _, beams, finished, _ = state
        room = ((~beams.attends.any(1)).sum(1) >= num_beams).all()
        return (count < max_new_tokens) & advance.unfinished(count, beams, finished).any() & room

    def step(state: tuple) -> tuple:
        count, cache, beams, finished, has_nan = state
        _, slots = lax.top_k((~beams.attends.any(1)).astype(jnp.float32), num_beams)  # free ones
        beams = beams._replace(attends=beams.attends | jax.nn.one_hot(slots, beams.attends.shape[2], dtype=bool))
        new = jnp.take(beams.tokens, count - 1, axis=2)
        positions = jnp.broadcast_to(mask.sum(1, dtype=jnp.int32)[:, None] + count - 1, new.shape)
        logits, cache = forward(new, beams.attends, positions=positions, cache={**cache, "index": slots})
        has_nan |= jnp.isnan(logits.max(2)).any(1) & advance.unfinished(count, beams, finished)
        beams, finished = choose(logits, count, beams, finished)
        return count + 1, cache, beams, finished, has_nan

    last = jnp.full((batch, 1), length - 1, jnp.int32)
    logits, cache = forward(tokens, mask, cache=new_cache(model, batch, length), labelled=last)
    empty = jnp.full((batch, num_beams, max_new_tokens), pad, jnp.int32)
    attends = jnp.broadcast_to(mask[:, None], (batch, num_beams, length))
    scores, finished = advance.start(empty)
    beams, start = Beams(empty, attends, scores), jnp.zeros((), jnp.int32)
    beams, finished = choose(jnp.broadcast_to(logits, (batch, num_beams, logits.shape[2])), start, beams, finished)
    cache = {**cache, "index": jnp.zeros((batch, num_beams), jnp.int32)}
    state, slots = (start + 1, cache, beams, finished, jnp.isnan(logits.max(2)).any(1)), 0
    while slots < num_beams * max_new_tokens:
        slots = min(max(2 * slots, _ROOM * num_beams), num_beams * max_new_tokens)
        state = lax.while_loop(unfinished, step, _grown(state, length + slots))
    count, _, beams, finished, has_nan = state
    return advance.best(count, beams, finished), has_nan


def _grown(state: tuple, length: int) -> tuple:
    """The state with a cache of `length` slots."""

    def longer(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])

    count, cache, beams, finished, has_nan = state
    layers = jax.tree.map(lambda x: longer(x, x.ndim - 2), cache["layers"])
    of_slots = {name: longer(cache[name], 1) for name in ("mask", "positions") if name in cache}
    cache = {**cache, **of_slots, "layers": layers}
    return count, cache, beams._replace(attends=longer(beams.attends, 2)), finished, has_nan
