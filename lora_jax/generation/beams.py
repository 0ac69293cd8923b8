"""Beam search over one KV cache that is never reordered.

All beams of a prompt share the slots of its cache. What a beam reads is said by its attention mask: the prompt, which
is computed and kept once, and a slot for each of its tokens, so that beams with a common past share that too. Choosing
beams chooses rows of the mask; no keys and values move. Slots that no beam reads any more are free for new tokens, so
the cache seldom has to hold `num_beams` times the new tokens: it begins small and grows when it is full.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.lifting.interpreter import lift
from lora_jax.generation import beam_rules
from lora_jax.generation.bans import ban_repeats
from lora_jax.models.family import new_cache

_ROOM = 16  # the cache begins with so many slots a beam besides the prompt's, then has twice as many, and so on


class Beams(NamedTuple):
    """The running beams: b prompts, k beams each, up to T new tokens."""

    tokens: Array  # (b, k, T) int32, chosen so far, then pad
    sees: Array  # (b, k, slots of the cache) bool, where their tokens and the prompt are
    scores: Array  # (b, k) float32, log p


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "num_beams", "no_repeat", "early_stopping", "rule")
)
def search(
    model: Any,
    params: Any,
    tokens: Array,
    mask: Array,
    eos: Array,
    pad: Array,
    length_penalty: Array,
    *,
    max_new_tokens: int,
    num_beams: int,
    no_repeat: int,
    early_stopping: bool | str,
    rule: str,
) -> tuple[Array, Array]:
    """(batch, max_new_tokens) new tokens of each prompt's best beam, and (batch,) whether NaN was met."""
    tokens, mask = tokens.astype(jnp.int32), mask.astype(bool)
    forward = functools.partial(lift(model.apply), {"params": params})
    batch, length = tokens.shape
    shape = (batch, num_beams, max_new_tokens)
    decide: beam_rules.Transformers | beam_rules.Authors = (
        beam_rules.Transformers(eos, length_penalty, max_new_tokens, early_stopping)
        if rule == "hf"
        else beam_rules.Authors(eos, length_penalty, max_new_tokens)
    )
    # what n-grams are banned for: the authors count those of the new tokens alone
    banning = tokens if rule == "hf" else tokens[:, :0]
    history = jnp.broadcast_to(banning[:, None], (batch, num_beams, banning.shape[1]))

    def choose(logits: Array, count: Array, beams: Beams, found: Any) -> tuple[Beams, Any]:
        """The beams after another token, from the logits (b, k, vocabulary) behind each."""
        text = jnp.concatenate([history, beams.tokens], 2).reshape(batch * num_beams, -1)
        flat = logits.reshape(batch * num_beams, -1)
        ban = functools.partial(ban_repeats, tokens=text, end=history.shape[2] + count, size=no_repeat)
        return decide(ban, flat, count, beams, found)

    def going(state: tuple) -> Array:
        count, _, beams, found, _ = state
        return (count < max_new_tokens) & decide.open(count, beams, found).any()

    def room(state: tuple) -> Array:
        return ((~state[2].sees.any(1)).sum(1) >= num_beams).all()

    def step(state: tuple) -> tuple:
        count, cache, beams, found, broken = state
        _, slots = lax.top_k((~beams.sees.any(1)).astype(jnp.float32), num_beams)  # free ones
        beams = beams._replace(sees=beams.sees | jax.nn.one_hot(slots, beams.sees.shape[2], dtype=bool))
        new = jnp.take(beams.tokens, count - 1, axis=2)
        positions = jnp.broadcast_to(mask.sum(1, dtype=jnp.int32)[:, None] + count - 1, new.shape)
        logits, cache = forward(new, beams.sees, positions=positions, cache={**cache, "index": slots})
        broken |= jnp.isnan(logits.max(2)).any(1) & decide.open(count, beams, found)
        beams, found = choose(logits, count, beams, found)
        return count + 1, cache, beams, found, broken

    cache = new_cache(model, batch, length)
    last = jnp.full((batch, 1), length - 1, jnp.int32)
    logits, cache = forward(tokens, mask, cache=cache, labelled=last)
    broken = jnp.isnan(logits.max(2)).any(1)
    start = jnp.zeros((), jnp.int32)
    sees = jnp.broadcast_to(mask[:, None], (batch, num_beams, length))
    beams = Beams(jnp.full(shape, pad, jnp.int32), sees, decide.start(batch, num_beams))
    found = decide.nothing(beams)
    beams, found = choose(jnp.broadcast_to(logits, (batch, num_beams, logits.shape[2])), start, beams, found)
    state = (start + 1, {**cache, "index": jnp.zeros((batch, num_beams), jnp.int32)}, beams, found, broken)
    slots = 0
    while slots < num_beams * max_new_tokens:
        slots = min(max(2 * slots, _ROOM * num_beams), num_beams * max_new_tokens)
        state = _grown(state, length + slots)
        state = lax.while_loop(lambda state: going(state) & room(state), step, state)
    count, _, beams, found, broken = state
    return decide.best(count, beams, found), broken


def _grown(state: tuple, length: int) -> tuple:
    """The state with a cache of `length` slots."""

    def longer(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])

    count, cache, beams, found, broken = state
    layers = jax.tree.map(lambda x: longer(x, x.ndim - 2), cache["layers"])
    cache = {**cache, "mask": longer(cache["mask"], 1), "layers": layers}
    return count, cache, beams._replace(sees=longer(beams.sees, 2)), found, broken
