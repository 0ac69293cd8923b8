"""NIST against the E2E scorer's figures, by hand, and against the definition written out."""

import math
import random
from pathlib import Path

import pytest

from lora_jax.data import e2e, pairs
from lora_jax.metrics.ngrams import nist_statistics


def test_the_ten_instance_example(shared: Path) -> None:
    folder = shared / "data/e2e_metrics_example"
    hypotheses = (folder / "baseline-output.txt").read_text().splitlines()
    blocks = (folder / "devel-conc.txt").read_text().strip().split("\n\n")
    score = nist_statistics(hypotheses, [block.split("\n") for block in blocks]).score()
    assert score == pytest.approx(7.7889, abs=5e-5)


@pytest.mark.parametrize("run", [0, *(pytest.param(run, marks=pytest.mark.slow) for run in range(1, 5))])
def test_tgen(shared: Path, run: int) -> None:
    file = shared / f"data/e2e_system_outputs/tgen-std.run{run}.txt"
    groups = pairs.contexts(e2e.load(shared / "data/e2e/official", "test"))
    score = nist_statistics(file.read_text().splitlines(), list(groups.values())).score()
    assert score == pytest.approx([8.5446, 8.4679, 8.5487, 8.5602, 8.6303][run], abs=5e-5)


def test_by_hand() -> None:
    # each of two words has one bit, the pair none beyond its first word
    assert nist_statistics(["A b"], [["a b"]]).score() == pytest.approx(1)
    # 2/3 of the length halves the score
    assert nist_statistics(["a b"], [["a b c"]]).score() == pytest.approx(math.log2(3) / 2)
    # words: 4, of them a 2, b 1, c 1; pairs: "a b", "a c", where a decides half. No reference holds more than one a.
    score = nist_statistics(["a b a"], [["a b", "a c"]]).score()
    assert score == pytest.approx((1 + 2) / 3 + 1 / 2)
    assert nist_statistics([""], [["a b"]]).score() == 0


def test_against_the_definition_written_out() -> None:
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices("abcd", k=rng.randint(1, 9)))

    for _ in range(100):
        hypotheses = [text() for _ in range(4)]
        references = [[text() for _ in range(rng.randint(1, 3))] for _ in hypotheses]
        expected = written_out(hypotheses, references)
        assert nist_statistics(hypotheses, references).score() == pytest.approx(expected)


def written_out(hypotheses: list[str], references: list[list[str]]) -> float:
    """Texts of one-letter words: an n-gram is a string of letters."""
    texts = ["".join(text.split()) for text in hypotheses]
    lists = [["".join(text.split()) for text in group] for group in references]

    def count(gram: str, text: str) -> int:
        return sum(text.startswith(gram, i) for i in range(len(text))) if gram else len(text)

    def everywhere(gram: str) -> int:
        return sum(count(gram, text) for group in lists for text in group)

    total = 0.0
    for n in range(1, 6):
        information, number = 0.0, 0
        for text, group in zip(texts, lists, strict=True):
            grams = [text[i : i + n] for i in range(len(text) - n + 1)]
            number += len(grams)
            for gram in set(grams):
                matches = min(grams.count(gram), max(count(gram, reference) for reference in group))
                if matches:
                    information += matches * math.log2(everywhere(gram[:-1]) / everywhere(gram))
        total += information / max(number, 1)
    length = sum(map(len, texts))
    average = sum(sum(map(len, group)) / len(group) for group in lists)
    beta = math.log(0.5) / math.log(1.5) ** 2
    return total * math.exp(beta * math.log(min(length / average, 1)) ** 2)
