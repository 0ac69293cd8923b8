"""Beam search over one KV cache that is never reordered.

The beams of a prompt are written side by side into the cache of that prompt: the tokens of step t into the slots
`length + t * num_beams` and on. What a beam reads is said by the attention mask: the prompt, which is computed and kept
once, and of each step the slot of its own ancestor. So choosing beams moves a few integers, no keys and values.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.generation import beam_rules
from lora_jax.generation.bans import ban_repeats
from lora_jax.lifting import lift
from lora_jax.models.gpt2 import init_cache

_FIRST_STEPS = 16  # the cache has room for so many steps, then twice as many, and so on


class Beams(NamedTuple):
    """The running beams: b prompts, k beams each, up to T new tokens."""

    tokens: Array  # (b, k, T) int32, chosen so far, then pad
    slots: Array  # (b, k, T) int32, which of a step's k slots holds the token
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
    decide: beam_rules.Transformers | beam_rules.Authors
    if rule == "hf":
        decide = beam_rules.Transformers(eos, length_penalty, max_new_tokens, early_stopping)
        history = jnp.broadcast_to(tokens[:, None], (batch, num_beams, length))
    else:
        decide = beam_rules.Authors(eos, length_penalty, max_new_tokens)
        history = jnp.zeros((batch, num_beams, 0), jnp.int32)

    def choose(logits: Array, count: Array, beams: Beams, found: Any) -> tuple[Beams, Any]:
        """The beams after another token, from the logits (b, k, vocabulary) behind each."""
        text = jnp.concatenate([history, beams.tokens], 2).reshape(batch * num_beams, -1)
        flat = logits.reshape(batch * num_beams, -1)
        ban = functools.partial(ban_repeats, tokens=text, end=history.shape[2] + count, size=no_repeat)
        return decide(ban, flat, count, beams, found)

    def unfinished(end: int, state: tuple) -> Array:
        count, _, beams, found, _ = state
        return (count < end) & decide.open(count, beams, found).any()

    def step(state: tuple) -> tuple:
        count, cache, beams, found, broken = state
        new = jnp.take(beams.tokens, count - 1, axis=2)
        beams = beams._replace(slots=beams.slots.at[:, :, count - 1].set(jnp.arange(num_beams)))
        sees = jnp.concatenate([_prompt(mask, num_beams), _ancestors(beams.slots, count, cache, length)], 2)
        positions = jnp.broadcast_to(mask.sum(1, dtype=jnp.int32)[:, None] + count - 1, new.shape)
        logits, cache = forward(new, sees, positions=positions, cache=cache)
        broken |= jnp.isnan(logits.max(2)).any(1) & decide.open(count, beams, found)
        beams, found = choose(logits, count, beams, found)
        return count + 1, cache, beams, found, broken

    cache = init_cache(model.config, batch, length)
    last = jnp.full((batch, 1), length - 1, jnp.int32)
    logits, cache = forward(tokens, mask, cache=cache, labelled=last)
    broken = jnp.isnan(logits.max(2)).any(1)
    start = jnp.zeros((), jnp.int32)
    beams = Beams(jnp.full(shape, pad, jnp.int32), jnp.zeros(shape, jnp.int32), decide.start(batch, num_beams))
    found = decide.nothing(beams)
    beams, found = choose(jnp.broadcast_to(logits, (batch, num_beams, logits.shape[2])), start, beams, found)
    state = (start + 1, cache, beams, found, broken)
    end = 0
    while end < max_new_tokens:
        end = min(max(2 * end, _FIRST_STEPS), max_new_tokens)
        state = (state[0], _grown(state[1], length + end * num_beams, model.config.scan_layers), *state[2:])
        state = lax.while_loop(functools.partial(unfinished, end), step, state)
    count, _, beams, found, broken = state
    return decide.best(count, beams, found), broken


def _prompt(mask: Array, num_beams: int) -> Array:
    return jnp.broadcast_to(mask[:, None], (len(mask), num_beams, mask.shape[1]))


def _ancestors(slots: Array, count: Array, cache: Any, length: int) -> Array:
    """(b, k, slots of the cache behind the prompt): whether each holds a token of each beam."""
    batch, k, _ = slots.shape
    steps = (cache["mask"].shape[1] - length) // k
    slots = jnp.where((jnp.arange(steps) < count)[None, None], slots[:, :, :steps], -1)
    return jax.nn.one_hot(slots, k, dtype=bool).reshape(batch, k, steps * k)


def _grown(cache: Any, length: int, scanned: bool) -> Any:
    """The cache with room for `length` tokens."""

    def pad(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, length - x.shape[axis])
        return jnp.pad(x, widths)

    layers = jax.tree.map(lambda x: pad(x, 3 if scanned else 2), cache["layers"])
    return {"index": cache["index"], "mask": pad(cache["mask"], 1), "layers": layers}
