"""A text is text, whatever it spells and whatever a tokenizer's file asks for; and few encodings are in memory."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from lora_jax.data import pairs, sentences, text, tokenizing
from lora_jax.generation import end_tokens
from lora_jax.interop import hf
from lora_jax.models import gpt2
from tests.helpers.tokenizers import byte_level

END = "<|endoftext|>"
TEXTS = ["name : X | area : riverside", f"a {END} b", f"{END}{END}", "", "  spaces  ", "é 猫", END, "the river"]
COMPLETIONS = [f"{word} in the river {END}" for word in "a b c d e f g h".split()]


def trained(folder: Path) -> Tokenizer:
    (folder / "a.txt").write_text("name : X | area : riverside\nX is in the river .\n")
    return text.train_tokenizer([folder / "a.txt"], 280)


def cutting(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(3)


def padding(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=40, pad_id=0, pad_token=END)


def both(tokenizer: Tokenizer) -> None:
    cutting(tokenizer)
    padding(tokenizer)


def examples() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"context": TEXTS, "completion": COMPLETIONS})


def everything(tokenizer: Tokenizer, folder: Path) -> list[Any]:
    """What each path from texts to tokens makes with a tokenizer."""
    (folder / "b.txt").write_text("\n\n".join(part for part in TEXTS if part != END) + "\n\nthe end\n")
    encoded = pairs.encode(examples(), tokenizer, eos=0, length=100)
    return [
        *(array.tolist() for array in (encoded.tokens, encoded.offsets, encoded.starts)),
        pairs.prompts(TEXTS, tokenizer, eos=0, before=(270, 271), after=(272,)),
        text.encode([folder / "b.txt"], tokenizer, eos=0).tolist(),
        end_tokens(tokenizer, 0),
    ]


@pytest.mark.parametrize("setting", [cutting, padding, both])
def test_what_the_file_says_of_lengths_does_not_act(tmp_path: Path, setting: Callable) -> None:
    tokenizer = trained(tmp_path)
    expected = everything(tokenizer, tmp_path)
    setting(tokenizer)
    before = tokenizer.to_str()
    assert everything(tokenizer, tmp_path) == expected
    assert tokenizer.to_str() == before and not tokenizer.encode_special_tokens  # as it was


def test_special_tokens_that_a_text_spells_are_ordinary_characters(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path)
    literal = tokenizer.encode(END[:-1], add_special_tokens=False).ids + tokenizer.encode(">").ids
    encoded = pairs.encode(examples(), tokenizer, eos=0, length=100)
    assert np.count_nonzero(encoded.tokens == 0) == 2 * len(TEXTS)  # the separator and the end of each
    for context, prompt in zip(TEXTS, pairs.prompts(TEXTS, tokenizer, eos=0), strict=True):
        assert prompt.index(0) == len(prompt) - 1
        assert tokenizer.decode(prompt[:-1], skip_special_tokens=False) == context
    assert pairs.prompts([END], tokenizer, eos=0) == [[*literal, 0]]
    # a line of it parts documents, and in a line it is text
    (tmp_path / "c.txt").write_text(f"one {END} two\n{END}\nthree\n")
    stream = text.encode([tmp_path / "c.txt"], tokenizer, eos=0)
    assert np.count_nonzero(stream == 0) == 2
    assert tokenizer.decode(stream[1:].tolist(), skip_special_tokens=False) == f"one {END} two{END}three"


def test_special_tokens_in_sentences_are_ordinary_characters() -> None:
    rows = datasets.Dataset.from_dict({"first": ["a</s>b", "<mask>"], "second": ["<s>", "c"]})
    tokens = sentences.encode(rows, byte_level(), length=40, labels=2).tokens
    assert [np.count_nonzero(tokens == i) for i in range(5)] == [2, 0, 6, 0, 0]  # <s>, and three </s>, a pair


def test_a_tokenizer_without_such_tokens_is_not_copied(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path)
    assert tokenizing.plain(tokenizer) is not tokenizer
    tokenizer.encode_special_tokens = True
    assert tokenizing.plain(tokenizer) is tokenizer
    tokenizer.enable_truncation(5)
    assert tokenizing.plain(tokenizer) is not tokenizer


@pytest.mark.parametrize("limits", [(3, 1 << 20), (1000, 20)])
def test_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int]) -> None:
    tokenizer = trained(tmp_path)
    expected = everything(tokenizer, tmp_path)
    rows = datasets.Dataset.from_dict({"first": TEXTS, "second": COMPLETIONS})
    pair = sentences.encode(rows, byte_level(), length=20, labels=2, before=(40, 41))
    sizes: list[int] = []

    class Counting:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self.tokenizer = tokenizer

        def encode_batch_fast(self, texts: list, **options: Any) -> Any:
            sizes.append(len(texts))
            return self.tokenizer.encode_batch_fast(texts, **options)

    for name, value in zip(("_MOST_TEXTS", "_MOST_CHARACTERS"), limits, strict=True):
        monkeypatch.setattr(tokenizing, name, value)
    assert everything(tokenizer, tmp_path) == expected
    again = sentences.encode(rows, byte_level(), length=20, labels=2, before=(40, 41))
    for name in ("tokens", "token_types", "offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(pair, name))
    assert len(list(tokenizing.encodings(TEXTS, Counting(tokenizer)))) == len(TEXTS)
    assert max(sizes) <= 4 and len(sizes) >= 3


def test_folders(tmp_path: Path) -> None:
    """Neither a folder's truncation and padding act, nor does an id beyond the embedding pass, whatever their count."""
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(tmp_path)
    config = gpt2.GPT2Config(vocab_size=280, n_positions=8, n_embd=4, n_layer=1, n_head=1, eos_token_id=0)
    model = gpt2.GPT2(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    both(tokenizer)
    hf.save(tmp_path / "model", model, params, tokenizer)
    loaded = hf.load(tmp_path / "model")[2]
    assert loaded is not None and loaded.truncation is None and loaded.padding is None
    assert everything(loaded, tmp_path) == everything(tokenizer, tmp_path)
    assert loaded.encode("the river in the river").tokens == ["the", "Ġriver", "Ġin", "Ġthe", "Ġriver"]
    # to transformers a folder that is saved again, without them, is the same: it sets both at each call
    hf.save(tmp_path / "again", model, params, loaded)
    folders = (tmp_path / "model", tmp_path / "again")
    ids = [transformers.PreTrainedTokenizerFast.from_pretrained(folder)(TEXTS)["input_ids"] for folder in folders]
    assert ids[0] == ids[1]

    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 280  # and no token has the id before
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json: .* is token 280, but config.json says vocab_size 280"):
        hf.load(tmp_path / "model")


@pytest.mark.slow
def test_memory_is_that_of_the_arrays(tmp_path: Path) -> None:
    """200,000 lines at once would take a gigabyte as the tokenizer has them."""
    tokenizer = trained(tmp_path)
    line = "name : X | area : riverside | X is in the river . " * 2
    rows = datasets.Dataset.from_dict({"context": [line] * 200_000, "completion": ["the river"] * 200_000})
    (tmp_path / "many.txt").write_text(f"{line}\n\n" * 200_000)

    def peak_of(encode: Callable[[], Any]) -> float:
        """How much more memory the process has ever had, in bytes."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        encode()
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    tokens = len(pairs.encode(rows.select(range(100)), tokenizer, eos=0, length=512).tokens) * 2000
    assert peak_of(lambda: pairs.encode(rows, tokenizer, eos=0, length=512)) < 4 * 4 * tokens + 100e6
    assert peak_of(lambda: text.encode([tmp_path / "many.txt"], tokenizer, eos=0)) < 4 * 4 * tokens + 100e6
