"""TER: by hand, and against pyter's rules written out."""

import random

import pytest

from lora_jax.metrics.ter import ter_statistics


def rate(hypothesis: str, *references: str) -> float:
    return ter_statistics([hypothesis], [references]).score()


def test_by_hand() -> None:
    assert rate("a b c d", "a b c d") == 0
    assert rate("a x c", "a b c d") == pytest.approx(2 / 4)
    # one shift of two words
    assert rate("c d a b", "a b c d") == pytest.approx(1 / 4)
    # the example of Snover et al. (2006): one shift, two substitutions, one insertion of 13 words
    reference = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
    hypothesis = "THIS WEEK THE SAUDIS denied information published in the new york times"
    assert rate(hypothesis, reference) == pytest.approx(4 / 13)
    # the least over references, each by its own length; longer than the reference can be more than 1
    assert rate("a b", "x y z", "a c d e") == pytest.approx(3 / 4)
    assert rate("a b c", "x") == pytest.approx(3)


def test_what_is_empty() -> None:
    assert rate("", "a b") == 1
    assert rate("x y z", "") == 1
    assert rate("x y z", "a", "") == 1
    assert rate("a", "a", "") == 0
    assert rate("", "") == 1


def test_the_mean_is_over_instances() -> None:
    score = ter_statistics(["a", "a b c d"], [["b"], ["a b c d"]]).score()
    assert score == pytest.approx(1 / 2)


def test_against_the_rules_written_out() -> None:
    rng = random.Random(0)
    for _ in range(300):
        words = ["dog", "a", "cat", "b", "zoo"][: rng.randint(1, 5)]
        hypothesis = rng.choices(words, k=rng.randint(0, 8))
        reference = rng.choices(words, k=rng.randint(1, 8))
        expected = written_out(hypothesis, reference)
        assert rate(" ".join(hypothesis), " ".join(reference)) == pytest.approx(expected)


def written_out(hypothesis: list[str], reference: list[str]) -> float:
    shifts = 0
    while True:
        best = max(
            every_shift(hypothesis, reference), key=lambda moved: (-distance(moved, reference), moved), default=[]
        )
        if not best or distance(best, reference) >= distance(hypothesis, reference):
            return (shifts + distance(hypothesis, reference)) / len(reference)
        hypothesis, shifts = best, shifts + 1


def every_shift(words: list[str], goal: list[str]) -> list[list[str]]:
    """A run of words that stands at another index of the goal goes there; only runs that cannot be longer."""
    shifted = []
    for size in range(1, len(words) + 1):
        for i in range(len(words) - size + 1):
            for j in range(len(goal) - size + 1):
                longer = i + size < len(words) and j + size < len(goal) and words[i + size] == goal[j + size]
                if i != j and words[i : i + size] == goal[j : j + size] and not longer:
                    moved = words[:i] + words[i + size :]
                    moved[j:j] = words[i : i + size]
                    shifted.append(moved)
    return shifted


def distance(one: list[str], other: list[str]) -> int:
    row = list(range(len(other) + 1))
    for i, word in enumerate(one):
        last, row = row, [i + 1]
        for j, target in enumerate(other):
            row.append(min(last[j + 1] + 1, row[j] + 1, last[j] + (word != target)))
    return row[-1]
