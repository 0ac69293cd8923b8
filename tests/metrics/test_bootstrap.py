"""Resamples of a corpus, their intervals and the comparison of two systems."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from lora_jax.metrics import bleu, paired, report, scores
from lora_jax.metrics.ngrams import bleu_statistics
from lora_jax.metrics.statistics import Statistics, draws, interval, mean
from lora_jax.metrics.ter import ter_statistics

WORDS = "the a cat dog sat ran on under mat moon . big".split()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A style of two scores without Java, which takes seconds to start."""
    parts = {"bleu": bleu_statistics, "ter": ter_statistics}
    quick = lambda *texts: {name: lambda part=part: part(*texts) for name, part in parts.items()}  # noqa: E731
    monkeypatch.setitem(scores.STYLES, "dart", quick)


def corpus(size: int) -> list[list[str]]:
    rng = random.Random(0)
    return [[" ".join(rng.choices(WORDS, k=9)) for _ in range(rng.randint(1, 3))] for _ in range(size)]


def system(references: list[list[str]], rate: float, seed: int) -> list[str]:
    """First references with so many of their words replaced."""
    rng = random.Random(seed)
    words = [texts[0].split() for texts in references]
    return [" ".join(rng.choice(WORDS) if rng.random() < rate else word for word in text) for text in words]


@pytest.mark.parametrize("statistics", [bleu_statistics, ter_statistics])
def test_a_resample_is_a_corpus(statistics: Callable[..., Statistics]) -> None:
    references = corpus(30)
    hypotheses = system(references, 0.3, 1)
    weights = draws(30, 20, seed=0)
    assert (weights.sum(1) == 30).all() and len(np.unique(weights, axis=0)) == 20
    part = statistics(hypotheses, references)
    scores = part.aggregate(weights @ part.values)
    for row, score in zip(weights.astype(int), scores, strict=True):
        chosen = np.repeat(np.arange(30), row)
        again = statistics([hypotheses[i] for i in chosen], [references[i] for i in chosen])
        assert score == pytest.approx(again.score())


@pytest.mark.parametrize("smooth", [True, False])
def test_bleu_of_sums_is_sacrebleus(smooth: bool) -> None:
    part = bleu_statistics(["a"], [["a"]], smooth=smooth)
    rng = np.random.default_rng(0)
    totals = np.sort(rng.integers(0, 6, (300, 4)))[:, ::-1]
    counts = rng.integers(0, totals + 1)
    sums = np.concatenate([totals[:, :1], rng.integers(1, 9, (300, 1)), counts, totals], axis=1)
    method = "exp" if smooth else "none"
    expected = [
        BLEU.compute_bleu(list(row[2:6]), list(row[6:]), int(row[0]), int(row[1]), smooth_method=method).score
        for row in sums
    ]
    assert min(expected) == 0 < max(expected)
    np.testing.assert_allclose(part.aggregate(sums.astype(float)), expected, atol=1e-9)


def test_an_interval_is_of_normal_theory() -> None:
    scores = np.random.default_rng(0).normal(size=400)
    part = mean(list(scores))
    low, high = interval(part.aggregate(draws(400, 4000, seed=1) @ part.values), 0.9)
    error = scores.std() / 20
    assert (low, high) == pytest.approx((scores.mean() - 1.645 * error, scores.mean() + 1.645 * error), abs=0.1 * error)


def test_intervals_cover() -> None:
    """The interval of a part of the instances holds the score of them all, about as often as it says."""
    part = mean(list(np.random.default_rng(0).exponential(size=20_000)))
    covered = []
    for trial in range(200):
        values = part.values[trial * 100 : (trial + 1) * 100]
        low, high = interval(part.aggregate(draws(100, 400, seed=trial) @ values), 0.9)
        covered.append(low <= part.score() <= high)
    assert 0.83 < np.mean(covered) < 0.95


def test_report(quick: None) -> None:
    references = corpus(60)
    hypotheses = system(references, 0.3, 1)
    intervals = report(hypotheses, references, style="dart", samples=200)
    assert intervals["bleu"]["score"] == pytest.approx(bleu(hypotheses, references))
    assert all(part["low"] < part["score"] < part["high"] for part in intervals.values())
    assert intervals == report(hypotheses, references, style="dart", samples=200)
    assert intervals != report(hypotheses, references, style="dart", samples=200, seed=1)
    narrow = report(hypotheses, references, style="dart", samples=200, level=0.5)["ter"]
    assert intervals["ter"]["low"] < narrow["low"] < narrow["high"] < intervals["ter"]["high"]


def test_paired(quick: None) -> None:
    references = corpus(100)
    good, close, bad = (system(references, rate, seed) for rate, seed in ((0.3, 1), (0.3, 2), (0.5, 3)))
    better = paired(good, bad, references, style="dart", samples=500)
    assert better["bleu"]["low"] > 0 > better["ter"]["high"]  # of TER less is better
    assert better["bleu"]["p"] < 0.05 and better["ter"]["p"] < 0.05
    assert better["bleu"]["difference"] == pytest.approx(bleu(good, references) - bleu(bad, references))
    assert paired(good, close, references, style="dart", samples=500)["bleu"]["p"] > 0.05
    worse = paired(bad, good, references, style="dart", samples=500)
    for name, part in better.items():
        back = {"difference": -part["difference"], "low": -part["high"], "high": -part["low"], "p": part["p"]}
        assert worse[name] == pytest.approx(back)
    same = paired(good, good, references, style="dart", samples=100)["bleu"]
    assert same == {"difference": 0, "low": 0, "high": 0, "p": 1}
    with pytest.raises(ValueError, match="99 hypotheses but 100 lists"):
        paired(good, bad[1:], references, style="dart")
