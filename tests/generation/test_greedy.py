"""Greedy decoding: against transformers, against a loop without cache, adapted against merged."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.generation import generate
from lora_jax.generation.single import largest
from lora_jax.interop import hf
from lora_jax.models import gpt2

CONFIG = gpt2.GPT2Config(vocab_size=53, n_positions=40, n_embd=16, n_layer=2, n_head=2, eos_token_id=0)
QV = lj.lora(lj.select("**/attn/{query,value}/kernel"), rank=2, alpha=8)


forward = jax.jit(gpt2.GPT2(CONFIG).apply)


def random_params(config: gpt2.GPT2Config = CONFIG, seed: int = 0) -> Any:
    """Weights large enough that texts vary and two tokens are never equally likely."""
    params = jax.jit(gpt2.GPT2(config).init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)


def adapt(params: Any) -> Any:
    delta = QV.init(jax.random.key(1), params)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    noise = jax.tree.map(lambda x: x + 0.5 * jax.random.normal(next(keys), x.shape), delta)
    return QV.apply(params, noise)


def random_prompts(lengths: list[int], width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (len(lengths), width))
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    return np.where(mask, tokens, 7), mask


def without_cache(params: Any, prompt: np.ndarray, max_new_tokens: int, eos: list[int], pad: int = 0) -> list[int]:
    """One prompt without padding, the whole text anew for each token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens and not set(tokens[len(prompt) :]) & set(eos):
        # one shape for all: padding on the right does not reach back
        padded = np.zeros((1, CONFIG.n_positions), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = forward({"params": params}, padded)
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    new = tokens[len(prompt) :]
    return new + [pad] * (max_new_tokens - len(new))


class Pair(tuple):
    """Hypothesis prints it where a test fails; all weights would be a warning instead of what is wrong."""

    def __repr__(self) -> str:
        return "pair"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A random model of transformers', and the same loaded here."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=53,
        n_positions=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    model, params, _ = hf.load(folder)
    return Pair((theirs, model, params))


@given(data=st.data())
@settings(max_examples=30)
def test_as_transformers(pair: tuple[Any, Any, Any], data: st.DataObject) -> None:
    theirs, model, params = pair
    # a few shapes only, as each is compiled
    rows, width, new = data.draw(st.sampled_from([(1, 1, 1), (1, 5, 20), (4, 8, 9)]), "shape")
    lengths = data.draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows), "lengths")
    eos = data.draw(st.lists(st.integers(0, 52), min_size=3, max_size=3, unique=True), "eos")
    tokens, mask = random_prompts(lengths, width, data.draw(st.integers(0, 99), "seed"))
    pad = 52 - eos[0]
    ours = np.asarray(generate(model, params, tokens, mask, max_new_tokens=new, eos=eos, pad=pad))
    expected = theirs.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=pad,
    )[:, width:].numpy()
    assert ours.shape == (len(lengths), new) and ours.dtype == np.int32
    np.testing.assert_array_equal(ours[:, : expected.shape[1]], expected)
    assert (ours[:, expected.shape[1] :] == pad).all()


@pytest.mark.parametrize("form", ["base", "adapted", "merged"])
def test_as_a_loop_without_cache(form: str) -> None:
    base = random_params()
    params = {"base": base, "adapted": adapt(base), "merged": lj.merge(adapt(base))}[form]
    plain = lj.merge(params)
    tokens, mask = random_prompts([1, 6, 4, 2], 6, 2)
    expected = [without_cache(plain, t[m], 20, [0, 5, 14], 2) for t, m in zip(tokens, mask, strict=True)]
    ends = [row.index(2) if 2 in row else 20 for row in expected]
    assert min(ends) < max(ends), "the rows should end at different times"
    generated = generate(gpt2.GPT2(CONFIG), params, tokens, mask, max_new_tokens=20, eos=[0, 5, 14], pad=2)
    np.testing.assert_array_equal(generated, expected)


def test_adapted_differs_from_base_and_scanned_agrees() -> None:
    base = random_params()
    tokens, mask = random_prompts([3, 6], 6, 0)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos": 0}
    plain = generate(gpt2.GPT2(CONFIG), base, tokens, mask, **options)
    changed = generate(gpt2.GPT2(CONFIG), adapt(base), tokens, mask, **options)
    assert (np.asarray(plain) != np.asarray(changed)).any()
    scanned = gpt2.GPT2(dataclasses.replace(CONFIG, scan_layers=True))
    again = generate(scanned, gpt2.to_scanned(base), tokens, mask, **options)
    np.testing.assert_array_equal(plain, again)


def test_one_compilation_for_each_shape() -> None:
    compiled = []

    def listen(name: str, _: float, **__: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    base, shapes = random_params(), [(2, 4), (3, 6)]
    trees = [base, jax.tree.map(lambda x: x + 0.01, base)]
    adapted = [adapt(tree) for tree in trees]
    prompts = [
        random_prompts([1 + (seed + i) % width for i in range(rows)], width, seed)
        for seed in range(4)
        for rows, width in shapes
    ]

    def run(params: Any, options: dict) -> None:
        for tokens, mask in prompts:
            jax.block_until_ready(generate(gpt2.GPT2(CONFIG), params, tokens, mask, max_new_tokens=7, **options))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(trees[0], {"eos": 1})
        assert 0 < len(compiled) <= len(shapes)
        run(trees[1], {"eos": 9, "pad": 3})
        assert len(compiled) <= len(shapes)
        run(adapted[0], {"eos": 1})
        assert len(compiled) <= 2 * len(shapes)
        run(adapted[1], {"eos": 2})
        assert len(compiled) <= 2 * len(shapes)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_bad_input() -> None:
    model, params = gpt2.GPT2(CONFIG), random_params()
    tokens, mask = random_prompts([3, 6], 6, 0)
    options: dict[str, Any] = {"max_new_tokens": 4, "eos": 0}
    with pytest.raises(ValueError, match=r"6 tokens and max_new_tokens=35 need 41 .* has 40"):
        generate(model, params, tokens, mask, max_new_tokens=35, eos=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, params, tokens, mask, max_new_tokens=0, eos=0)
    with pytest.raises(ValueError, match="53 is not in the vocabulary of 53"):
        generate(model, params, tokens, mask, max_new_tokens=4, eos=[1, 53])
    with pytest.raises(ValueError, match="pad=-1: -1 is not in the vocabulary"):
        generate(model, params, tokens, mask, **options, pad=-1)
    with pytest.raises(ValueError, match="padded on the left"):
        generate(model, params, tokens, mask[:, ::-1], **options)
    with pytest.raises(ValueError, match="hold a token at least"):
        generate(model, params, tokens, np.zeros_like(mask), **options)
    with pytest.raises(ValueError, match=r"both must be \(batch, length\)"):
        generate(model, params, tokens, mask[:1], **options)


def test_under_jit() -> None:
    model, params = gpt2.GPT2(CONFIG), random_params()
    tokens, mask = random_prompts([3, 6], 6, 0)

    @jax.jit
    def inside(params: Any, tokens: Any, mask: Any) -> Any:
        return generate(model, params, tokens, mask, max_new_tokens=9, eos=0)

    expected = generate(model, params, tokens, mask, max_new_tokens=9, eos=0)
    np.testing.assert_array_equal(inside(params, tokens, mask), expected)


def test_from_the_shared_base(shared: Path) -> None:
    """Real weights and a real prompt, against transformers."""
    folder = shared / "base"
    model, params, tokenizer = hf.load(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.encode("The house stood at the end of the street, and").ids
    tokens, mask = np.array([ids]), np.ones((1, len(ids)), bool)
    ours = generate(model, params, tokens, mask, max_new_tokens=16, eos=0)
    expected = theirs.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
    )[:, len(ids) :]
    np.testing.assert_array_equal(ours, expected.numpy())


def test_the_first_of_the_largest_is_taken_without_a_reduction_of_pairs() -> None:
    logits = jax.random.randint(jax.random.key(0), (50, 7), 0, 3).astype(jnp.float32)  # ties
    logits = logits.at[0].set(-jnp.inf)
    np.testing.assert_array_equal(largest(logits), jnp.argmax(logits, -1))
    assert 0 <= int(largest(jnp.full((1, 7), jnp.nan))[0]) < 7
    assert "argmax" not in str(jax.make_jaxpr(largest)(logits))
