"""ROUGE of summaries, by hand."""

import pytest

from lora_jax.metrics import report, rouge, score


def test_by_hand() -> None:
    # words: 3 of 4 and 3 of 5; pairs: 1 of 3 and 1 of 4 ("cats sat", stemmed); in order: "cat sat" + "mat" = 3
    scores = rouge(["the cats sat mat"], [["a cat sat on mats"]])
    assert scores == pytest.approx({"rouge1": 6 / 9, "rouge2": 2 / 7, "rougeL": 6 / 9})
    # each score takes its best reference; the mean is over instances
    scores = rouge(["b a", ""], [["a b", "b", None], ["c"]])
    assert scores == pytest.approx({"rouge1": 1 / 2, "rouge2": 0, "rougeL": (2 / 3) / 2})


def test_as_a_style_of_score() -> None:
    texts, references = ["the cats sat mat", "a dog"], [["a cat sat on mats"], ["the dog", None]]
    assert score(texts, references, style="samsum") == rouge(texts, references)
    interval = report(texts, references, style="samsum", samples=50)["rouge1"]
    assert interval["low"] <= interval["score"] == rouge(texts, references)["rouge1"] <= interval["high"]


def test_what_cannot_be_scored() -> None:
    with pytest.raises(TypeError, match="list of lists"):
        rouge(["a"], ["a"])
    with pytest.raises(ValueError, match=r"instance 0 .* has no reference"):
        rouge(["a"], [[""]])
