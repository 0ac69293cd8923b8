"""Logical-form accuracy."""

import pytest

from lora_jax.metrics import logical_form_accuracy, score

QUERY = "SELECT MAX(\"Notes\") FROM table WHERE Slogan = 'South Australia' AND Year > 1990"


@pytest.mark.parametrize(
    "same",
    [
        "select  max('notes')\nfrom table where slogan = 'south australia' and year > 1990 ;",
        "SELECT MAX(`Notes`) FROM table WHERE Year > 1990 AND Slogan = \u201cSouth Australia\u201d;",
    ],
)
def test_the_same_but_for_its_writing(same: str) -> None:
    assert logical_form_accuracy([same], [[QUERY]]) == 1


@pytest.mark.parametrize(
    "other",
    [
        QUERY.replace("MAX", "MIN"),
        QUERY.replace("1990", "1991"),
        QUERY.replace(" AND Year > 1990", ""),
        QUERY.replace(" AND ", " OR "),
        "",
    ],
)
def test_another(other: str) -> None:
    assert logical_form_accuracy([other, QUERY], [[QUERY], ["SELECT a FROM table", QUERY]]) == 1 / 2


def test_a_value_with_and_in_it() -> None:
    query = "SELECT a FROM table WHERE b = rum and coke AND c = 1"
    assert logical_form_accuracy(["SELECT a FROM table WHERE c = 1 AND b = rum and coke"], [[query]]) == 1
    assert logical_form_accuracy(["SELECT a FROM table WHERE b = rum AND c = 1"], [[query]]) == 0


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="no hypotheses"):
        logical_form_accuracy([], [])
    with pytest.raises(TypeError, match="list of lists"):
        logical_form_accuracy([QUERY], [QUERY])


def test_as_a_style_of_score() -> None:
    assert score([QUERY, "SELECT a FROM b"], [[QUERY], [QUERY]], style="wikisql") == {"logical_form": 0.5}
