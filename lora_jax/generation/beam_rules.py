"""What a beam search keeps, what it calls finished, and when it ends: transformers' rule and the LoRA authors'.

Shapes: b prompts, k beams, T new tokens at most, v tokens in the vocabulary. A rule is called with the logits behind
each beam and the number `count` of tokens that the beams have; it returns the beams after one more, and what was found.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

_GROUP = 32  # logits in a group of `top_k`: the fastest size for 8,192 and for 50,257 (docs/performance.md)
_NEVER = -1e9  # transformers' score of what must not be chosen


class Found(NamedTuple):
    """Beams that ended, best first: of transformers k of them, of the authors one."""

    tokens: Array  # (b, n, T) int32
    scores: Array  # (b, n) float32, with the length penalty
    full: Array  # (b, n) bool: there is such a beam
    more: Array  # (b,) bool: better ones may come


class Transformers(NamedTuple):
    """`transformers.GenerationMixin._beam_search` (5.24), token for token."""

    eos: Array
    length_penalty: Array
    max_new_tokens: int
    early_stopping: bool | str

    def start(self, batch: int, k: int) -> Array:
        """(b, k) scores: all beams are the prompt, so one counts."""
        return jnp.tile(jnp.where(jnp.arange(k) == 0, 0.0, _NEVER)[None], (batch, 1))

    def nothing(self, beams: Any) -> Found:
        shape = beams.scores.shape
        return Found(beams.tokens, jnp.full(shape, _NEVER), jnp.zeros(shape, bool), jnp.ones(shape[:1], bool))

    def __call__(self, ban: Callable, logits: Array, count: Array, beams: Any, found: Found) -> tuple[Any, Found]:
        k = beams.scores.shape[1]
        keep = max(2, 1 + len(self.eos)) * k  # so that k go on even if every beam's best are end tokens
        # the banned tokens keep their share of the probability
        scores, parents, chosen = _continuations(ban(logits), _log_total(logits), beams.scores, keep)
        many = _extended(beams, parents, chosen, count, scores)
        stopped = jnp.isin(chosen, self.eos) | (count + 1 >= self.max_new_tokens)
        running = scores + jnp.where(stopped, _NEVER, 0.0)
        running, at = lax.top_k(running, k)
        going = many._replace(tokens=_pick(many.tokens, at), sees=_pick(many.sees, at), scores=running)

        # Only the k best may finish: those behind them are there to go on.
        finished = stopped & (jnp.arange(keep) < k)[None]
        final = scores / (count + 1).astype(jnp.float32) ** self.length_penalty
        if self.early_stopping is True:
            final += jnp.where(found.full.all(1), _NEVER, 0.0)[:, None]
        final += jnp.where(found.more, 0.0, _NEVER)[:, None]
        final += jnp.where(finished, 0.0, _NEVER)
        best, at = lax.top_k(jnp.concatenate([found.scores, final], 1), k)
        found = Found(
            _pick(jnp.concatenate([found.tokens, many.tokens], 1), at),
            best,
            _pick(jnp.concatenate([found.full, finished], 1), at),
            found.more,
        )
        return going, found._replace(more=found.more & self._improvable(count + 1, going, found))

    def _improvable(self, count: Array, beams: Any, found: Found) -> Array:
        longest = self.early_stopping == "never"
        length = jnp.where(longest & (self.length_penalty > 0), self.max_new_tokens, count).astype(jnp.float32)
        possible = beams.scores[:, 0] / length**self.length_penalty
        worst = jnp.where(found.full, found.scores.min(1, keepdims=True), _NEVER)
        return (possible[:, None] > worst).any(1)

    def open(self, count: Array, beams: Any, found: Found) -> Array:
        """(b,) which prompts are not done."""
        return found.more & ~found.full.all(1) if self.early_stopping is True else found.more

    def best(self, count: Array, beams: Any, found: Found) -> Array:
        return found.tokens[:, 0]


class Authors(NamedTuple):
    """The search of the LoRA authors (microsoft/LoRA, examples/NLG/src/gpt2_beam.py).

    Theirs takes all T steps. Here a prompt is done once no running beam can win: scores fall with every token, so a
    beam's own bounds what can come of it.
    """

    eos: Array
    length_penalty: Array
    max_new_tokens: int

    def start(self, batch: int, k: int) -> Array:
        return jnp.tile(jnp.where(jnp.arange(k) == 0, 0.0, -jnp.inf)[None], (batch, 1))

    def nothing(self, beams: Any) -> Found:
        scores = jnp.full_like(beams.scores[:, :1], -jnp.inf)
        return Found(beams.tokens[:, :1], scores, scores > 0, scores[:, 0] < 0)

    def __call__(self, ban: Callable, logits: Array, count: Array, beams: Any, found: Found) -> tuple[Any, Found]:
        logits = ban(logits)
        scores, parents, chosen = _continuations(logits, _log_total(logits), beams.scores, beams.scores.shape[1])
        beams = _extended(beams, parents, chosen, count, scores)
        ended = jnp.isin(chosen, self.eos)
        found = self._better(found, beams.tokens, jnp.where(ended, scores, -jnp.inf), count + 1)
        return beams._replace(scores=jnp.where(ended, -jnp.inf, scores)), found

    def _better(self, found: Found, tokens: Array, scores: Array, length: Array) -> Found:
        final = scores / length.astype(jnp.float32) ** self.length_penalty
        scores, at = lax.top_k(jnp.concatenate([found.scores, final], 1), 1)  # of equals the first found
        return found._replace(tokens=_pick(jnp.concatenate([found.tokens, tokens], 1), at), scores=scores)

    def open(self, count: Array, beams: Any, found: Found) -> Array:
        best = beams.scores.max(1)
        now, at_end = (count + 1).astype(jnp.float32), jnp.float32(self.max_new_tokens)
        bound = jnp.maximum(best / now**self.length_penalty, best / at_end**self.length_penalty)
        return bound > found.scores[:, 0]

    def best(self, count: Array, beams: Any, found: Found) -> Array:
        scores = jnp.where(count == self.max_new_tokens, beams.scores, -jnp.inf)  # before that none can win
        return self._better(found, beams.tokens, scores, count).tokens[:, 0]


def _log_total(logits: Array) -> tuple[Array, Array]:
    """(rows, 1) each: the largest logit, and the logarithm of the sum of exp(logits - largest)."""
    largest = logits.max(1, keepdims=True)
    return largest, jnp.log(jnp.exp(logits - largest).sum(1, keepdims=True))


def _continuations(logits: Array, total: tuple[Array, Array], scores: Array, keep: int) -> tuple[Array, Array, Array]:
    """The `keep` best of all beams' next tokens: scores, parent beams and tokens, (b, keep) each, best first."""
    b, k = scores.shape
    each = min(keep, logits.shape[1])
    values, tokens = top_k(logits, each)  # first within each beam: k * v numbers need no sorting
    largest, rest = total
    log_p = jnp.where(jnp.isneginf(values), values, (values - largest) - rest)  # all may be banned: no NaN
    all_scores = log_p.reshape(b, k, each) + scores[:, :, None]
    best, at = lax.top_k(all_scores.reshape(b, k * each), keep)
    return best, at // each, jnp.take_along_axis(tokens.reshape(b, k * each), at, 1)


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` of (rows, n), which on a CPU sorts: the k largest lie within the k groups whose largest are so (of
    equals the first groups), and the rest behind the last whole group."""
    rows, n = x.shape
    whole = n - n % _GROUP
    groups = x[:, :whole].reshape(rows, -1, _GROUP)
    if groups.shape[1] <= 2 * k:
        return lax.top_k(x, k)
    chosen = jnp.sort(lax.top_k(groups.max(2), k)[1], axis=1)
    places = (chosen[:, :, None] * _GROUP + jnp.arange(_GROUP, dtype=jnp.int32)[None, None]).reshape(rows, -1)
    rest = jnp.broadcast_to(jnp.arange(whole, n, dtype=jnp.int32)[None], (rows, n - whole))
    values = jnp.take_along_axis(groups, chosen[:, :, None], 1).reshape(rows, -1)
    best, at = lax.top_k(jnp.concatenate([values, x[:, whole:]], 1), k)
    return best, jnp.take_along_axis(jnp.concatenate([places, rest], 1), at, 1)


def _extended(beams: Any, parents: Array, chosen: Array, count: Array, scores: Array) -> Any:
    """The beams of those parents with one more token each."""
    tokens = _pick(beams.tokens, parents).at[:, :, count].set(chosen)
    return beams._replace(tokens=tokens, sees=_pick(beams.sees, parents), scores=scores)


def _pick(x: Array, at: Array) -> Array:
    """Rows of x (b, k, ...) along k."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *([1] * (x.ndim - 2))), 1)
