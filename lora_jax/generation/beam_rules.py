"""Which beams a search keeps and calls finished, and when it ends: transformers' rule and the LoRA authors'.

Shapes: b prompts, k beams, T new tokens at most, v tokens in the vocabulary. A rule is called with the logits after
each beam and the number `count` of tokens that the beams have; it returns the beams with one more, and
the finished ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

Count = Int[Array, ""]
Ban = Callable[[Array], Array]

_GROUP = 32  # logits in a group of `top_k`: the fastest size for 8,192 and for 50,257 (docs/performance.md)
_NEVER = -1e9  # transformers' lowest score


class Finished(NamedTuple):
    """The n best beams that ended, best first: k by transformers' rule, 1 by the authors'."""

    tokens: Int[Array, "b n T"]
    scores: Float[Array, "b n"]  # with the length penalty
    exists: Bool[Array, "b n"]  # whether there is such a beam yet
    improvable: Bool[Array, " b"]  # whether a better one may come


@dataclasses.dataclass(frozen=True)
class Rule:
    """What both have in common."""

    eos: Array
    length_penalty: Array
    max_new_tokens: int
    early_stopping: bool | str = False
    lowest: ClassVar[float]  # the score of what must not be chosen
    finished: ClassVar[int | None]  # beams that are kept of those that ended; None: as many as run
    bans_prompt: ClassVar[bool]  # whether the prompt's n-grams are banned too, or those of the new tokens alone

    def start(self, tokens: Int[Array, "b k T"]) -> tuple[Float[Array, "b k"], Finished]:
        """The scores of k beams without tokens, which are all the same, so that one counts; and no finished ones."""
        b, k, _ = tokens.shape
        n = self.finished or k
        scores = jnp.tile(jnp.where(jnp.arange(k) == 0, 0.0, self.lowest)[None], (b, 1))
        lowest = jnp.full((b, n), self.lowest, jnp.float32)
        return scores, Finished(tokens[:, :n], lowest, jnp.zeros((b, n), bool), jnp.ones(b, bool))


class Transformers(Rule):
    """`transformers.GenerationMixin._beam_search` (5.24), token for token."""

    lowest, finished, bans_prompt = _NEVER, None, True

    def __call__(self, ban: Ban, logits: Array, count: Count, beams: Any, finished: Finished) -> tuple[Any, Finished]:
        k = beams.scores.shape[1]
        keep = max(2, 1 + len(self.eos)) * k  # so that k continue even if every beam's best are end tokens
        # the banned tokens keep their share of the probability
        scores, parents, chosen = _continuations(ban(logits), logits, beams.scores, keep)
        candidates = _extended(beams, parents, chosen, count, scores)
        stopped = jnp.isin(chosen, self.eos) | (count + 1 >= self.max_new_tokens)
        running, at = lax.top_k(scores + jnp.where(stopped, _NEVER, 0.0), k)
        beams = type(beams)(_pick(candidates.tokens, at), _pick(candidates.attends, at), running)

        # Only the k best may finish: those after them are there to be continued.
        ends = stopped & (jnp.arange(keep) < k)[None]
        final = scores / (count + 1).astype(jnp.float32) ** self.length_penalty
        if self.early_stopping is True:
            final += jnp.where(finished.exists.all(1), _NEVER, 0.0)[:, None]
        final += jnp.where(finished.improvable, 0.0, _NEVER)[:, None]
        final += jnp.where(ends, 0.0, _NEVER)
        best, at = lax.top_k(jnp.concatenate([finished.scores, final], 1), k)
        tokens = _pick(jnp.concatenate([finished.tokens, candidates.tokens], 1), at)
        exists = _pick(jnp.concatenate([finished.exists, ends], 1), at)

        longest = (self.early_stopping == "never") & (self.length_penalty > 0)
        length = jnp.where(longest, self.max_new_tokens, count + 1).astype(jnp.float32)
        possible = beams.scores[:, 0] / length**self.length_penalty
        worst = jnp.where(exists, best.min(1, keepdims=True), _NEVER)
        return beams, Finished(tokens, best, exists, finished.improvable & (possible[:, None] > worst).any(1))

    def unfinished(self, count: Count, beams: Any, finished: Finished) -> Bool[Array, " b"]:
        """Which prompts need more steps."""
        return finished.improvable & ~finished.exists.all(1) if self.early_stopping is True else finished.improvable

    def best(self, count: Count, beams: Any, finished: Finished) -> Int[Array, "b T"]:
        """The tokens of each prompt's best beam."""
        return finished.tokens[:, 0]


class Authors(Rule):
    """The search of the LoRA authors (microsoft/LoRA, examples/NLG/src/gpt2_beam.py).

    It takes all T steps. Here a prompt is done once no running beam can win: scores fall with every token, so a beam's
    score bounds those of its continuations.
    """

    lowest, finished, bans_prompt = -jnp.inf, 1, False

    def __call__(self, ban: Ban, logits: Array, count: Count, beams: Any, finished: Finished) -> tuple[Any, Finished]:
        logits = ban(logits)
        scores, parents, chosen = _continuations(logits, logits, beams.scores, beams.scores.shape[1])
        beams = _extended(beams, parents, chosen, count, scores)
        ended = jnp.isin(chosen, self.eos)
        finished = self._better(finished, beams.tokens, jnp.where(ended, scores, -jnp.inf), count + 1)
        return beams._replace(scores=jnp.where(ended, -jnp.inf, scores)), finished

    def _better(self, finished: Finished, tokens: Array, scores: Array, length: Array) -> Finished:
        final = scores / length.astype(jnp.float32) ** self.length_penalty
        scores, at = lax.top_k(jnp.concatenate([finished.scores, final], 1), 1)  # of equals the first to end
        return finished._replace(tokens=_pick(jnp.concatenate([finished.tokens, tokens], 1), at), scores=scores)

    def unfinished(self, count: Count, beams: Any, finished: Finished) -> Bool[Array, " b"]:
        """Which prompts need more steps."""
        best = beams.scores.max(1)
        now, at_end = (count + 1).astype(jnp.float32), jnp.float32(self.max_new_tokens)
        bound = jnp.maximum(best / now**self.length_penalty, best / at_end**self.length_penalty)
        return bound > finished.scores[:, 0]

    def best(self, count: Count, beams: Any, finished: Finished) -> Int[Array, "b T"]:
        """The tokens of each prompt's best beam."""
        scores = jnp.where(count == self.max_new_tokens, beams.scores, -jnp.inf)  # before that none can win
        return self._better(finished, beams.tokens, scores, count).tokens[:, 0]


RULES: dict[str, type[Transformers | Authors]] = {"hf": Transformers, "lora_paper": Authors}


def _continuations(
    allowed: Float[Array, "rows v"], logits: Float[Array, "rows v"], scores: Float[Array, "b k"], keep: int
) -> tuple[Float[Array, "b keep"], Int[Array, "b keep"], Int[Array, "b keep"]]:
    """The `keep` best of all beams' next tokens: scores, parent beams and tokens, best first.

    They are chosen by the `allowed` logits, and have the probabilities of `logits`.
    """
    b, k = scores.shape
    per_beam = min(keep, logits.shape[1])
    largest = logits.max(1, keepdims=True)
    rest = jnp.log(jnp.exp(logits - largest).sum(1, keepdims=True))
    values, tokens = top_k(allowed, per_beam)  # first within each beam: k * v numbers need no sorting
    log_p = jnp.where(jnp.isneginf(values), values, (values - largest) - rest)  # all may be banned: no NaN
    all_scores = log_p.reshape(b, k, per_beam) + scores[:, :, None]
    best, at = lax.top_k(all_scores.reshape(b, k * per_beam), keep)
    return best, at // per_beam, jnp.take_along_axis(tokens.reshape(b, k * per_beam), at, 1)


def top_k(x: Shaped[Array, "rows n"], k: int) -> tuple[Shaped[Array, "rows k"], Int[Array, "rows k"]]:
    """`lax.top_k` of (rows, n), which on a CPU sorts: the k largest lie within the k groups whose largest are so (of
    equals the first groups), or after the last full group."""
    rows, n = x.shape
    grouped = n - n % _GROUP
    groups = x[:, :grouped].reshape(rows, -1, _GROUP)
    if groups.shape[1] <= 2 * k:
        values, indices = lax.top_k(x, k)
        return values, indices
    chosen = jnp.sort(lax.top_k(groups.max(2), k)[1], axis=1)
    indices = (chosen[:, :, None] * _GROUP + jnp.arange(_GROUP, dtype=jnp.int32)[None, None]).reshape(rows, -1)
    rest = jnp.broadcast_to(jnp.arange(grouped, n, dtype=jnp.int32)[None], (rows, n - grouped))
    values = jnp.take_along_axis(groups, chosen[:, :, None], 1).reshape(rows, -1)
    best, at = lax.top_k(jnp.concatenate([values, x[:, grouped:]], 1), k)
    return best, jnp.take_along_axis(jnp.concatenate([indices, rest], 1), at, 1)


def _extended(beams: Any, parents: Array, chosen: Array, count: Count, scores: Array) -> Any:
    """The beams of those parents, with one more token each."""
    tokens = _pick(beams.tokens, parents).at[:, :, count].set(chosen)
    return beams._replace(tokens=tokens, attends=_pick(beams.attends, parents), scores=scores)


def _pick(x: Shaped[Array, "b k *rest"], at: Int[Array, "b n"]) -> Shaped[Array, "b n *rest"]:
    """Rows of x along k."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *([1] * (x.ndim - 2))), 1)
