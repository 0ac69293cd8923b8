"""Sampling: empirical frequencies against the exact distribution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lora_jax.generation import generate
from lora_jax.models import gpt2

CONFIG = gpt2.GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
MODEL = gpt2.GPT2(CONFIG)
ROWS = 4096


@pytest.fixture(scope="module")
def params() -> Any:
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params)


def probabilities(params: Any, tokens: list[int], temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The exact distribution of the next token, by sorting in plain Python."""
    logits = np.asarray(MODEL.apply({"params": params}, np.array([tokens])))[0, -1].astype(np.float64) / temperature
    p = np.exp(logits - logits.max())
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    total, reached, kept = sum(p[order]), 0.0, []
    for i in order:
        if reached < top_p:
            kept.append(i)
        reached += p[i] / total
    result = np.zeros(len(p))
    result[kept] = p[kept] / p[kept].sum()
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0, "top_k": 7, "top_p": 0.8},
        {"top_p": 0.7},
        *(pytest.param(options, marks=pytest.mark.slow) for options in ({}, {"temperature": 0.5}, {"top_k": 4})),
    ],
    ids=str,
)
def test_frequencies(params: Any, options: dict[str, Any]) -> None:
    """Two tokens drawn: the frequencies of all pairs, where the second depends on the first."""
    prompt = [3, 9, 1]
    full = {"temperature": 1.0, "top_k": 11, "top_p": 1.0} | options
    tokens = np.tile(prompt, (ROWS, 1))
    key = jax.random.key(5)
    new = np.asarray(
        generate(MODEL, params, tokens, np.ones_like(tokens), max_new_tokens=2, eos=10, pad=0, key=key, **options)
    )
    first = probabilities(params, prompt, **full)
    expected = np.stack([p * probabilities(params, [*prompt, i], **full) for i, p in enumerate(first)])
    expected[10] = 0
    expected[10, 0] = first[10]  # after the end token comes padding alone
    pair_counts = np.zeros((11, 11))
    np.add.at(pair_counts, (new[:, 0], new[:, 1]), 1)
    assert (pair_counts[expected == 0] == 0).all()
    likely = expected * ROWS >= 5  # the chi-squared approximation needs some counts; the rest are one class
    counts = np.append(pair_counts[likely], pair_counts[~likely].sum())
    means = np.append(expected[likely], expected[~likely].sum()) * ROWS
    counts, means = counts[means > 0], means[means > 0]
    assert scipy.stats.chisquare(counts, means).pvalue > 1e-3


def test_keys(params: Any) -> None:
    tokens = np.full((64, 3), 4)
    mask = np.ones_like(tokens)
    options: dict[str, Any] = {"max_new_tokens": 4, "eos": 0}
    once, again, other = (
        np.asarray(generate(MODEL, params, tokens, mask, **options, key=jax.random.key(seed))) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(once, again)
    assert (once != other).any() and len(np.unique(once, axis=0)) > 1
    cold = generate(MODEL, params, tokens, mask, **options, key=jax.random.key(1), temperature=1e-4)
    np.testing.assert_array_equal(cold, generate(MODEL, params, tokens, mask, **options))
    np.testing.assert_array_equal(
        cold, generate(MODEL, params, tokens, mask, **options, key=jax.random.key(1), top_k=1)
    )


def test_temperature_compiles_nothing_new(params: Any) -> None:
    compiled = []
    tokens = np.full((2, 3), 4)
    heats = [(jax.random.key(seed), heat) for seed, heat in ((0, 0.7), (1, 0.9))]

    def run(key: Any, heat: float) -> None:
        options: dict[str, Any] = {"max_new_tokens": 4, "eos": 0, "key": key, "temperature": heat, "top_p": heat}
        jax.block_until_ready(generate(MODEL, params, tokens, np.ones_like(tokens), **options))

    def listen(name: str, _: float, **__: Any) -> None:
        compiled.append(name)

    run(*heats[0])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(*heats[1])
        assert "/jax/core/compile/backend_compile_duration" not in compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
