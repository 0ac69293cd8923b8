"""Tasks: one table of loaders, and how their texts are written before scoring."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lora_jax.data import pairs, tasks

FOLDERS = {"e2e": "e2e", "webnlg": "webnlg_challenge_2017", "dart": "dart", "dart_dev": "dart"}


def by_splitting(text: str) -> str:
    """The steps that the authors' code takes."""
    return " ".join(" ".join(re.split(r"(\W)", text.lower())).split())


@given(st.text())
@example('The "A_b" isn\'t -- 3.5km\tfrom Ærø,\n\nİstanbul Straße\u00a0\u2028(№ 5)…')
def test_normalized_as_by_splitting(text: str) -> None:
    assert pairs.normalize(text) == by_splitting(text)


def test_normalized_by_hand() -> None:
    assert pairs.normalize("It's at 120.0 m, (Aarhus_Airport) .") == "it ' s at 120 . 0 m , ( aarhus_airport ) ."


@pytest.mark.parametrize("text", ["A .", "  A .\n", "A .<|endoftext|> B\n\nC", "A .\n\nB<|endoftext|>", "\tA .\n\n\n"])
def test_cleaned(text: str) -> None:
    assert pairs.clean(text) == "A ."


def test_what_of_the_references_is_scored() -> None:
    texts = [f" Text-{number}. \n\n more" for number in range(8)]
    assert tasks.references(tasks.TASKS["e2e"], texts) == [f"Text-{number}." for number in range(8)]
    for name in ("webnlg", "dart"):
        expected = [f"text - {number} ." for number in range(6)]
        assert tasks.references(tasks.named(name), texts) == expected
    assert tasks.references(tasks.named("dart"), ["A", ""]) == ["a", ""]


@pytest.mark.parametrize("name", FOLDERS)
def test_cleaning_takes_nothing_from_the_real_references(shared: Path, name: str) -> None:
    data = tasks.named(name).load(shared / "data" / FOLDERS[name], "test")
    assert all(pairs.clean(text) == text.strip() for text in data["completion"])
    assert sum(not text for text in data["completion"]) == name.startswith("dart")


@pytest.mark.parametrize(
    ("name", "split", "longest"),
    [
        ("e2e", "test", 132),
        ("dart", "test", 224),
        pytest.param("webnlg", "train", 258, marks=pytest.mark.slow),
        pytest.param("dart", "valid", 228, marks=pytest.mark.slow),
    ],
)
def test_no_pair_is_longer_than_the_authors_cut(shared: Path, name: str, split: str, longest: int) -> None:
    """In GPT-2's tokens: of the 512 at which they cut, nothing is ever cut."""
    tokenizer = Tokenizer.from_file(str(shared / "data/gpt2_tokenizer/tokenizer.json"))
    data = tasks.named(name).load(shared / "data" / FOLDERS[name], split)
    encoded = pairs.encode(data, tokenizer, eos=50256, length=512, long="error")
    assert encoded.lengths.max() == longest


def test_no_such_task() -> None:
    with pytest.raises(ValueError, match=r"no task 'webnlg2017' \(data\.name\): one of e2e, webnlg, dart"):
        tasks.named("webnlg2017")
