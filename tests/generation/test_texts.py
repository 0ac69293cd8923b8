"""From prompts of any length to cleaned texts."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lora_jax.data import text
from lora_jax.data.files import check_unicode
from lora_jax.generation import clean, complete, completions, end_tokens, generate, texts
from lora_jax.generation.texts import batches_of
from lora_jax.models import gpt2

CONFIG = gpt2.GPT2Config(vocab_size=300, n_positions=40, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, time and again and again.\n" * 3)
    return text.train_tokenizer([file], 300)


@pytest.fixture(scope="module")
def params() -> Any:
    params = jax.jit(gpt2.GPT2(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)


def test_every_prompt_in_its_place(tokenizer: Tokenizer, params: Any, capsys: pytest.CaptureFixture) -> None:
    vocabulary = tokenizer.get_vocab_size()
    assert vocabulary <= CONFIG.vocab_size
    model = gpt2.GPT2(CONFIG)
    random = np.random.default_rng(0)
    prompts = [list(random.integers(1, vocabulary, n)) for n in (3, 30, 16, 1, 17, 5, 2, 29)]
    options: dict[str, Any] = {"max_new_tokens": 10, "eos": [0, 40]}
    texts = complete(model, params, tokenizer, prompts, **options, batch_size=3)
    assert "generate: 100%" in capsys.readouterr().err
    for prompt, completion in zip(prompts, texts, strict=True):
        padded = np.zeros((1, 30), int)
        padded[0, 30 - len(prompt) :] = prompt
        new = generate(model, params, padded, np.arange(30)[None] >= 30 - len(prompt), **options)
        assert completion == clean(np.asarray(new[0]), tokenizer, options["eos"])
    assert len(set(texts)) > 4
    again = complete(model, params, tokenizer, prompts, **options, batch_size=3, progress=False)
    assert again == texts
    assert capsys.readouterr().err == ""
    assert complete(model, params, tokenizer, [], **options, progress=False) == []


def test_batches_are_as_few_as_can_be() -> None:
    batches = list(batches_of([[1] * n for n in (3, 30, 16, 1, 17, 5, 2)], 3, 40))
    assert [numbers for numbers, *_ in batches] == [[0], [2, 3, 5], [6, 1, 4]]
    assert [tokens.shape for _, tokens, _ in batches] == [(3, 16), (3, 16), (3, 32)]
    assert [mask.sum(1).tolist() for *_, mask in batches] == [[3, 3, 3], [16, 1, 5], [2, 30, 17]]


def test_each_batch_has_its_own_draws(tokenizer: Tokenizer, params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its first prompt's number, whatever was done before."""
    drawn = []

    def generated(model: Any, params: Any, tokens: Any, mask: Any, *, key: Any, **options: Any) -> np.ndarray:
        drawn.append(jax.random.key_data(key).tolist())
        return np.zeros((len(tokens), 1), int)

    monkeypatch.setattr(texts, "generate", generated)
    key, prompts = jax.random.key(3), [[1] * n for n in (20, 3, 30, 2)]
    options: dict[str, Any] = {"max_new_tokens": 1, "eos": 0, "batch_size": 2, "key": key}
    assert [list(batch) for batch in completions(gpt2.GPT2(CONFIG), params, tokenizer, prompts, **options)] == [
        [1, 3],
        [0, 2],
    ]
    assert drawn == [jax.random.key_data(jax.random.fold_in(key, row)).tolist() for row in (1, 0)]
    rest = completions(gpt2.GPT2(CONFIG), params, tokenizer, prompts, done={1, 3}, **options)
    assert [list(batch) for batch in rest] == [[0, 2]] and drawn[2:] == drawn[1:2]


def test_clean(tokenizer: Tokenizer) -> None:
    def ids(string: str) -> list[int]:
        return tokenizer.encode(string).ids

    assert clean(ids("  The fox. \n"), tokenizer, 0) == "The fox."
    assert clean([*ids(" The fox."), 0, *ids(" The dog.")], tokenizer, 0) == "The fox."
    assert clean(ids("The fox.<|endoftext|>The dog."), tokenizer, 299) == "The fox."
    assert clean(ids("The fox.\n\nThe dog."), tokenizer, 0) == "The fox."
    assert clean(ids("The fox.\nThe dog."), tokenizer, 0) == "The fox.\nThe dog."
    assert clean([0, 0], tokenizer, 0) == ""
    assert clean([*ids("The"), *ids(","), *ids("fox")], tokenizer, [0, ids(",")[0]]) == "The"


def test_end_tokens(tokenizer: Tokenizer, shared: Path) -> None:
    assert end_tokens(tokenizer, 0) == [0]  # two line ends are two tokens here
    theirs = Tokenizer.from_file(str(shared / "data/gpt2_tokenizer/tokenizer.json"))
    assert end_tokens(theirs, 50256) == [50256, 628]


def test_prompts_that_do_not_fit(tokenizer: Tokenizer, params: Any) -> None:
    model = gpt2.GPT2(CONFIG)
    for bad, message in (([], "is empty"), ([1] * 31, "has 31 tokens, 1 too many: .* 1 to 30")):
        with pytest.raises(ValueError, match=rf"prompt 1 \(counted from 0\) {message}"):
            complete(model, params, tokenizer, [[1], bad], max_new_tokens=10, eos=0)
    for rows in (1, 3):
        with pytest.raises(ValueError, match=rf"tokens \({rows}, 0\): the prompts are empty"):
            generate(model, params, np.zeros((rows, 0)), np.zeros((rows, 0)), max_new_tokens=10, eos=0)


HOW: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"num_beams": 2, "beam_rule": "lora_paper"}]


@pytest.mark.parametrize("how", [*HOW, {"key": jax.random.key(0)}])
@pytest.mark.parametrize("prompts", [[], np.zeros((0, 5), np.int32), np.zeros((0, 0)), jnp.zeros((0, 3), jnp.int32)])
def test_no_prompts_have_no_new_tokens(params: Any, prompts: Any, how: dict[str, Any]) -> None:
    got = generate(gpt2.GPT2(CONFIG), params, prompts, prompts, max_new_tokens=7, eos=0, **how)
    assert isinstance(got, jax.Array) and got.shape == (0, 7) and got.dtype == jnp.int32


@pytest.mark.parametrize("how", HOW)
def test_without_end_tokens_every_text_has_all_its_tokens(
    tokenizer: Tokenizer, params: Any, how: dict[str, Any]
) -> None:
    model, prompts = gpt2.GPT2(CONFIG), np.random.default_rng(0).integers(1, 300, (4, 6))
    options: dict[str, Any] = {"max_new_tokens": 6, "pad": 299, **how}
    free = np.asarray(generate(model, params, prompts, prompts > 0, eos=None, **options))
    assert free.shape == (4, 6) and not (free == 299).any()
    if not how:
        end = int(free[0, 2])
        ended = np.asarray(generate(model, params, prompts, prompts > 0, eos=end, **options))
        for row, all_tokens in zip(ended, free, strict=True):
            at = np.flatnonzero(all_tokens == end)
            kept = at[0] + 1 if len(at) else 6
            assert row.tolist() == [*all_tokens[:kept].tolist(), *[299] * (6 - kept)]
    texts = complete(model, params, tokenizer, prompts.tolist(), max_new_tokens=6, eos=None, progress=False, **how)
    assert len(texts) == 4


@given(st.lists(st.text(st.characters() | st.characters(categories=["Cs"]), max_size=4), max_size=4))
def test_half_of_a_surrogate_pair_is_no_text(texts: list[str]) -> None:
    bad = [number for number, text in enumerate(texts) if any("\ud800" <= char <= "\udfff" for char in text)]
    if not bad:
        return check_unicode(texts, "context")
    with pytest.raises(ValueError, match=rf"context {bad[0]} \(counted from 0\) has '\\ud.*half of a surrogate pair"):
        check_unicode(texts, "context")
