"""GLUE's metrics, against their formulas worked out plainly."""

import subprocess
import sys
from fractions import Fraction
from math import fsum, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.glue import TASKS
from lora_jax.metrics.glue import MAIN, METRICS, glue

CLASSES = sorted(set(TASKS) - {"stsb"})


def counts(predicted: list[int], true: list[int]) -> tuple[int, int, int, int]:
    """True and false positives, false and true negatives."""
    both = list(zip(predicted, true, strict=True))
    return both.count((1, 1)), both.count((1, 0)), both.count((0, 1)), both.count((0, 0))


def matthews(predicted: list[int], true: list[int]) -> float:
    tp, fp, fn, tn = counts(predicted, true)
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / sqrt(below) if below else 0.0


def f1(predicted: list[int], true: list[int]) -> float:
    tp, fp, fn, _ = counts(predicted, true)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def pearson(x: list[float], y: list[float]) -> float:
    """In exact fractions, up to the root."""
    a, b = ([Fraction(v) - sum(map(Fraction, values)) / len(values) for v in values] for values in (x, y))
    squares = sum(v * v for v in a) * sum(v * v for v in b)
    return float(sum(v * w for v, w in zip(a, b, strict=True))) / sqrt(squares) if squares else 0.0


def ranks(values: list[float]) -> list[float]:
    return [sum(w < v for w in values) + (values.count(v) + 1) / 2 for v in values]


@given(rows=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_of_two_classes(rows: list[tuple[int, int]]) -> None:
    predicted, true = [a for a, _ in rows], [b for _, b in rows]
    accuracy = fsum(a == b for a, b in rows) / len(rows)
    expected = {"accuracy": accuracy, "f1": f1(predicted, true), "matthews": matthews(predicted, true)}
    for name in ("cola", "sst2", "mrpc", "qqp", "qnli", "rte"):
        scores = glue(name, np.array(predicted, np.int32), true)
        assert list(scores) == list(METRICS[name])
        assert scores == pytest.approx({metric: expected[metric] for metric in METRICS[name]}, abs=1e-12)
        assert all(type(score) is float for score in scores.values())


@given(rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_of_three_classes(rows: list[tuple[int, int]]) -> None:
    scores = glue("mnli", [a for a, _ in rows], [b for _, b in rows])
    assert scores == {"accuracy": pytest.approx(sum(a == b for a, b in rows) / len(rows))}


# quarters: ties are frequent, and no rounding stands between values
quarters = st.integers(-8, 28).map(lambda n: n / 4)


scores = st.integers(0, 20).map(lambda n: n / 4)


@given(rows=st.lists(st.tuples(quarters, scores), min_size=1, max_size=30))
def test_correlations(rows: list[tuple[float, float]]) -> None:
    predicted, true = [a for a, _ in rows], [b for _, b in rows]
    expected = {"pearson": pearson(predicted, true), "spearman": pearson(ranks(predicted), ranks(true))}
    found = glue("stsb", np.array(predicted, np.float32), np.array(true, np.float32))
    assert list(found) == ["pearson", "spearman"]
    assert found == pytest.approx(expected, abs=1e-9)  # sums in float64


def test_by_hand() -> None:
    # 2 true and 1 false positive, 1 false and 1 true negative
    predicted, true = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert glue("mrpc", predicted, true) == pytest.approx({"accuracy": 3 / 5, "f1": 4 / 6})
    assert glue("cola", predicted, true) == pytest.approx({"matthews": (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)})
    assert glue("stsb", [1.0, 2.0, 4.0], [0.0, 5.0, 4.0]) == pytest.approx(
        {"pearson": 0.6186, "spearman": 0.5}, abs=1e-4
    )


@pytest.mark.parametrize("label", [0, 1])
def test_constants_have_no_correlation_and_no_warning(label: int) -> None:
    """What a model that has learnt nothing predicts; the tests' settings make every warning an error."""
    assert glue("cola", [label] * 4, [0, 1, 1, 0]) == glue("cola", [0, 1, 1, 0], [label] * 4) == {"matthews": 0.0}
    assert glue("cola", [label] * 4, [label] * 4) == {"matthews": 0.0}
    assert glue("mrpc", [0] * 4, [label] * 4) == {"accuracy": 1.0 - label, "f1": 0.0}
    nothing = {"pearson": 0.0, "spearman": 0.0}
    assert glue("stsb", [2.5] * 3, [0.0, 1.0, 5.0]) == glue("stsb", [0.0, 1.0, 5.0], [2.5] * 3) == nothing
    assert glue("stsb", [2.5], [2.5]) == nothing
    # all but constant: some value, no warning
    near = glue("stsb", 2.5 + np.array([0, 1, 2]) * 4e-16, [0.0, 1.0, 5.0])
    assert all(-1 <= value <= 1 for value in near.values())


def test_names() -> None:
    assert set(METRICS) == set(MAIN) == set(TASKS)
    assert MAIN == {**dict.fromkeys(CLASSES, "accuracy"), "cola": "matthews", "stsb": "pearson"}


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="no GLUE task 'wnli': one of cola"):
        glue("wnli", [0], [0])
    for predicted, true in (([0, 1], [0]), ([], []), ([[0]], [[0]]), (0, 0)):
        with pytest.raises(ValueError, match=r"both \(N,\), N > 0"):
            glue("rte", predicted, true)
    for predicted in ([0.2, 0.8], ["a", "b"], [True, False]):
        with pytest.raises(ValueError, match="both must be integers, ids of labels"):
            glue("rte", predicted, [0, 1])
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            glue("stsb", [value, 1.0], [0.0, 1.0])


@given(st.sampled_from(sorted(METRICS)), st.integers(0, 4), st.data())
def test_what_is_no_id_of_the_task_has_no_score(name: str, row: int, data: st.DataObject) -> None:
    """Among good rows, as prediction or as label; -1 is what hidden labels are."""
    count = max(TASKS[name].outputs, 2)
    columns = {what: [n % count for n in range(5)] for what in ("prediction", "label")}
    what = data.draw(st.sampled_from(["label"] if name == "stsb" else ["prediction", "label"]))
    outside = data.draw(st.integers(6, 9) | st.integers(-9, -1) if name == "stsb" else st.sampled_from([-1, count, -7]))
    glue(name, columns["prediction"], columns["label"])
    columns[what][row] = outside
    with pytest.raises(ValueError, match=rf"a {what} is {outside}, not .* hides its labels\? experiments.predict"):
        glue(name, columns["prediction"], columns["label"])


def test_the_packages_are_imported_when_needed() -> None:
    code = "import sys, lora_jax.metrics.glue; print('sklearn' in sys.modules, 'scipy.stats' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"
