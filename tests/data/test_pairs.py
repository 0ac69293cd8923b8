"""Tokens, separator and loss mask of pairs."""

import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer

from lora_jax.data import e2e, pairs, text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("name : X | area : riverside\nX is by the river .\n")
    return text.train_tokenizer([file], 280)


def dataset(*rows: tuple[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"context": [row[0] for row in rows], "completion": [row[1] for row in rows]})


def test_tokens_and_starts(tokenizer: Tokenizer) -> None:
    rows = [("name : X", "X is by the river ."), ("area : riverside", "It is X .")]
    encoded = pairs.encode(dataset(*rows), tokenizer, eos=0, length=100)
    assert len(encoded) == 2 and encoded.skipped == 0
    for i, (context, completion) in enumerate(rows):
        tokens = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]]
        head, tail = tokens[: encoded.starts[i]], tokens[encoded.starts[i] :]
        assert head[-1] == 0 and tail[-1] == 0
        assert (tokens == 0).sum() == 2
        assert tokenizer.decode(list(head[:-1])) == context
        assert tokenizer.decode(list(tail[:-1])) == " " + completion
        assert encoded.lengths[i] == len(tokens) - 1
        assert encoded.labels[i] == len(tail)
        assert pairs.prompts([context], tokenizer, eos=0) == [list(head)]


def test_gpt2_tokens_of_a_real_pair(shared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "data/gpt2_tokenizer/tokenizer.json"))
    data = e2e.load(shared / "data/e2e", "test").select([0])
    encoded = pairs.encode(data, tokenizer, eos=50256, length=1024)
    context = "name : Blue Spice | Type : coffee shop | area : city centre"
    completion = " A coffee shop in the city centre area called Blue Spice ."
    expected = [*tokenizer.encode(context).ids, 50256, *tokenizer.encode(completion).ids, 50256]
    np.testing.assert_array_equal(encoded.tokens, expected)
    assert encoded.starts[0] == len(tokenizer.encode(context).ids) + 1


def test_examples_longer_than_the_context(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    data = dataset(("name : X", "X ."), ("name : X", "long " * 50), ("area : X", "Y ."))
    longest = max(pairs.encode(data.select([0, 2]), tokenizer, eos=0, length=99).lengths)
    with caplog.at_level(logging.WARNING):
        encoded = pairs.encode(data, tokenizer, eos=0, length=int(longest))
    assert (len(encoded), encoded.skipped) == (2, 1)
    assert f"skipped 1 of 3 examples longer than {longest} tokens" in caplog.text
    expected = pairs.encode(data.select([0, 2]), tokenizer, eos=0, length=99)
    np.testing.assert_array_equal(encoded.tokens, expected.tokens)
    with pytest.raises(ValueError, match=r"example 1 .* \d+ tokens, \d+ more than the context of \d+, as have 1 of 3"):
        pairs.encode(data, tokenizer, eos=0, length=int(longest), long="error")
    with pytest.raises(ValueError, match="5 more than the context of 2, as have 3 of 3 examples"):
        pairs.encode(data, tokenizer, eos=0, length=2)
    with pytest.raises(ValueError, match="long='cut'"):
        pairs.encode(data, tokenizer, eos=0, length=2, long="cut")


def test_no_such_eos(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"eos=50256 is no token of the tokenizer, which has 280"):
        pairs.encode(dataset(("a", "b")), tokenizer, eos=50256, length=10)


def test_a_prefix_and_an_infix_stand_around_the_context(tokenizer: Tokenizer) -> None:
    data, inserted = dataset(("name : X", "X ."), ("area : X", "Y .")), {"before": range(300, 303), "after": [303]}
    plain, encoded = (pairs.encode(data, tokenizer, eos=0, length=99, **how) for how in ({}, inserted))
    for n in range(2):
        plain_ids, all_ids = (each.tokens[each.offsets[n] : each.offsets[n + 1]].tolist() for each in (plain, encoded))
        start = plain.starts[n]
        assert all_ids == [300, 301, 302, *plain_ids[:start], 303, *plain_ids[start:]]
        assert encoded.starts[n] == start + 4
    np.testing.assert_array_equal(encoded.labels, plain.labels)
    prompt = pairs.prompts(data["context"], tokenizer, eos=0, **inserted)[0]
    assert prompt == encoded.tokens[: encoded.starts[0]].tolist()
    with pytest.raises(ValueError, match=r"tokens, 4 of them the method's own, 3 more than the context of"):
        pairs.encode(data, tokenizer, eos=0, length=int(max(plain.lengths)), long="error", **inserted)
