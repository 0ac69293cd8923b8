"""The rules of beam search on a model whose next token depends on the last one alone, so that each case is by hand."""

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.generation import generate
from lora_jax.generation.bans import ban_repeats
from lora_jax.generation.beam_rules import Authors, Finished
from lora_jax.generation.beams import Beams
from lora_jax.models import gpt2

END, START = 0, 1


@dataclasses.dataclass(frozen=True)
class Chain:
    """A model whose parameters are its logits: (last token, next token)."""

    config: gpt2.GPT2Config

    def apply(self, variables: Any, tokens: Any, mask: Any, *, cache: Any, labelled: Any = None, **_: Any) -> Any:
        logits = variables["params"][tokens]
        return (logits if labelled is None else logits[:, -1:]), cache


def chain(size: int) -> Chain:
    return Chain(gpt2.GPT2Config(vocab_size=size, n_positions=64, n_embd=2, n_layer=1, n_head=1, eos_token_id=END))


def table(probabilities: dict[int, dict[int, float]], size: int) -> Any:
    logits = np.full((size, size), -60.0, np.float32)
    for token, following in probabilities.items():
        for other, p in following.items():
            logits[token, other] = math.log(p)
    return jnp.asarray(logits)


def beam(params: Any, **options: Any) -> list[int]:
    tokens = generate(chain(len(params)), params, [[START]], [[1]], eos=END, pad=END, num_beams=2, **options)
    return np.asarray(tokens)[0].tolist()


# Ends at once with p = 0.9, or goes on with 0.1 and then never ends of its own will.
LATE = table({START: {END: 0.9, 2: 0.1}, 2: {2: 1.0}}, 4)


def test_a_late_beam_of_the_authors_wins_by_its_length() -> None:
    """log 0.9 = -0.105 ends after one token; -2.303 / 12^2 = -0.016 wins, which -2.303 / 2^2 does not show."""
    options: dict[str, Any] = {"max_new_tokens": 12, "beam_rule": "lora_paper"}
    assert beam(LATE, **options, length_penalty=2.0) == [2] * 12
    assert beam(LATE, **options, length_penalty=1.0) == [END] * 12  # -2.303 / 12 = -0.19 does not


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_the_authors_search_ends_only_when_no_beam_can_win(penalty: float) -> None:
    """A running beam ends at best without another loss, after any number of tokens up to the last."""
    rule = Authors(jnp.array([END]), jnp.float32(penalty), 9)
    for running, ended, count in itertools.product((-0.1, -1.0, -4.0), (-0.05, -0.3, -2.0), (1, 4, 8)):
        beams = Beams(jnp.zeros((1, 1, 9), jnp.int32), jnp.ones((1, 1, 3), bool), jnp.array([[running]]))
        finished = Finished(beams.tokens + 1, jnp.array([[ended]]), jnp.ones((1, 1), bool), jnp.ones(1, bool))
        best = max(running / length**penalty for length in range(count + 1, 10))
        assert bool(rule.unfinished(jnp.int32(count), beams, finished)[0]) == (best > ended)
        # before the full length a running beam wins by no score
        assert rule.best(jnp.int32(count), beams, finished).tolist() == [[1] * 9]
        assert rule.best(jnp.int32(9), beams, finished).tolist() == [[int(running / 9**penalty <= ended)] * 9]


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_bans_are_of_what_would_come_twice(size: int) -> None:
    random = np.random.default_rng(size)
    for end in range(9):
        tokens = random.integers(0, 3, (6, 8)).astype(np.int32)
        scores = ban_repeats(jnp.zeros((6, 3)), jnp.asarray(tokens), jnp.int32(end), size)
        for row, banned in zip(tokens[:, :end].tolist(), np.isneginf(scores), strict=True):
            there = {tuple(row[i : i + size]) for i in range(len(row) - size + 1)} if size else set()
            last = tuple(row[len(row) - size + 1 :]) if size > 1 else ()
            short = size > 1 and len(row) < size - 1
            assert banned.tolist() == [not short and (*last, token) in there for token in range(3)]
