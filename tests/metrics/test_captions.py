"""PTB tokens, ROUGE-L and CIDEr: by hand, and the E2E scorer's figures."""

from pathlib import Path

import pytest

from lora_jax.data import e2e, pairs
from lora_jax.metrics.java import meteor_statistics, ptb_tokens
from lora_jax.metrics.rouge import cider_statistics, rouge_l_statistics
from lora_jax.metrics.scores import STYLES, nltk_words


def test_ptb_tokens() -> None:
    # brackets stay: the list of punctuation has them in capitals
    texts = ['It costs £20-25, near "Café Rouge": isn\'t it?', "", "Two\nlines\u2028here (yes).", " . "]
    expected = ["it costs # 20-25 near café rouge is n't it", "", "two lines here -lrb- yes -rrb-", ""]
    assert ptb_tokens(texts) == expected


def test_nltk_words() -> None:
    text = 'Dr. Ann isn\'t here. She said "no".'
    assert nltk_words([text, "", "a . b"]) == ["Dr. Ann is n't here . She said `` no '' .", "", "a . b"]


def test_rouge_l_by_hand() -> None:
    # the best precision is 2/3 (a c), the best recall 2/2 (of "a c")
    precision, recall = 2 / 3, 1
    by_hand = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l_statistics(["a b c"], [["a x c y z", "a c"]]).score() == pytest.approx(by_hand)
    assert rouge_l_statistics(["", "a"], [["a b"], ["a"]]).score() == pytest.approx(1 / 2)


def test_cider_by_hand() -> None:
    # two documents without a common n-gram: each text is like its reference in the n-grams that it has
    assert cider_statistics(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]]).score() == pytest.approx(10)
    assert cider_statistics(["a b", "e f"], [["a b"], ["e f"]]).score() == pytest.approx(5)
    # a word of every document has no weight; nor has an empty text
    assert cider_statistics(["a", ""], [["a b"], ["a c"]]).score() == 0


def test_the_ten_instance_example(shared: Path) -> None:
    folder = shared / "data/e2e_metrics_example"
    hypotheses = (folder / "baseline-output.txt").read_text().splitlines()
    blocks = (folder / "devel-conc.txt").read_text().strip().split("\n\n")
    parts = STYLES["e2e"](hypotheses, [block.split("\n") for block in blocks])
    assert parts["rouge_l"]().score() == pytest.approx(0.7910, abs=5e-5)
    assert parts["cider"]().score() == pytest.approx(2.3039, abs=5e-5)


@pytest.mark.slow
def test_tgen(shared: Path) -> None:
    """The published means of five runs (Dusek, Howcroft and Rieser 2019), which used the same program."""
    groups = list(pairs.contexts(e2e.load(shared / "data/e2e/official", "test")).values())
    files = [shared / f"data/e2e_system_outputs/tgen-std.run{run}.txt" for run in range(5)]
    runs = [ptb_tokens(file.read_text().splitlines()) for file in files]
    tokens = iter(ptb_tokens([text for texts in groups for text in texts]))
    references = [[next(tokens) for _ in texts] for texts in groups]
    # one start of METEOR for all runs
    meteor = meteor_statistics([text for run in runs for text in run], references * 5)
    scores = meteor.aggregate(meteor.values.reshape(5, 630, -1).sum(1))
    assert scores.mean() == pytest.approx(0.4507, abs=5e-5)
    scores = [rouge_l_statistics(run, references).score() for run in runs]
    assert sum(scores) / 5 == pytest.approx(0.6917, abs=5e-5)
    scores = [cider_statistics(run, references).score() for run in runs]
    assert sum(scores) / 5 == pytest.approx(2.2253, abs=5e-5)
