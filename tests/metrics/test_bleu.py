"""BLEU against the official E2E scorer's figures."""

from pathlib import Path

import pytest

from lora_jax.data import e2e, pairs
from lora_jax.metrics import bleu


def test_the_ten_instance_example(shared: Path) -> None:
    folder = shared / "data/e2e_metrics_example"
    hypotheses = (folder / "baseline-output.txt").read_text().splitlines()
    blocks = (folder / "devel-conc.txt").read_text().strip().split("\n\n")
    references = [block.split("\n") for block in blocks]
    assert (len(hypotheses), sum(map(len, references))) == (10, 137)
    assert bleu(hypotheses, references) == pytest.approx(72.03, rel=1e-3)


@pytest.mark.parametrize("run", [0, *(pytest.param(run, marks=pytest.mark.slow) for run in range(1, 5))])
def test_tgen(shared: Path, run: int) -> None:
    file = shared / f"data/e2e_system_outputs/tgen-std.run{run}.txt"
    groups = pairs.contexts(e2e.load(shared / "data/e2e/official", "test"))
    expected = [66.16, 65.66, 66.67, 67.17, 66.38][run]
    score = bleu(file.read_text().splitlines(), list(groups.values()))
    assert score == pytest.approx(expected, rel=1e-3)


def test_case_ragged_and_missing_references() -> None:
    hypotheses = ["the cat sat on the mat .", "a dog barked at the moon"]
    references = [["The Cat sat on the mat."], ["no match here", "A dog barked at the moon"]]
    assert bleu(hypotheses, references) == pytest.approx(100)
    padded = [[references[0][0], None, ""], [*references[1], None]]
    assert bleu(hypotheses, padded) == bleu(hypotheses, references)
    # by hand: 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 (counted as 1/2), no brevity
    by_hand = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert bleu(["a b c d"], [["a b c e"]]) == pytest.approx(by_hand)


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="no hypotheses"):
        bleu([], [])
    with pytest.raises(ValueError, match="2 hypotheses but 1 lists of references"):
        bleu(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"instance 1 .* has no reference"):
        bleu(["a", "b"], [["a"], [None, ""]])
    with pytest.raises(TypeError, match="list of lists"):
        bleu(["a"], ["a"])
    assert bleu([""], [["a b c d"]]) == 0
