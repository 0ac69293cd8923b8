"""METEOR 1.5 (Denkowski and Lavie 2014) for English, by the authors' Java program."""

from collections.abc import Sequence

import numpy as np

from lora_jax.metrics import java
from lora_jax.metrics.statistics import Statistics

# the program's parameters for English (task "rank")
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1, 0.6, 0.8, 0.6])  # of exact, stem, synonym and paraphrase matches
_WORDS, _CHUNKS, _MATCHED = slice(0, 2), 20, slice(21, 23)  # columns; pairs are of hypothesis and reference


def meteor_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """The program's 23 statistics of each instance and its best reference, with `-norm` (it lower-cases and splits off
    punctuation); fractions.

    An empty reference is one of length 0. Of references that match equally well the first is taken.
    """
    lines = [
        " ||| ".join(["SCORE", *(_text(reference) for reference in texts), _text(hypothesis)])
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    file = java.jar("meteor", "meteor-1.5.jar")
    answers = java.run(["-jar", file, "-", "-", "-stdio", "-l", "en", "-norm"], lines)
    values = np.array([answer.split() for answer in answers], float)
    # a text that is matched entirely in one chunk adds none to the sum, as in the program
    in_one_chunk = (values[:, _CHUNKS] == 1) & (values[:, _MATCHED] == values[:, _WORDS]).all(1)
    values[in_one_chunk, _CHUNKS] = 0
    return Statistics(values, aggregate)


def aggregate(sums: np.ndarray) -> np.ndarray:
    """The score of summed statistics (..., 23), as the program's EVAL gives it.

    They are the words of hypothesis and reference, the function words of both, per stage of matching the matched
    content words of both and the matched function words of both, the chunks, and all matched words of both.
    """
    words, function_words = sums[..., _WORDS], sums[..., 2:4]
    content, function = np.split(sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4), 2, axis=-1)
    matches = _WEIGHTS @ (_DELTA * content + (1 - _DELTA) * function)
    lengths = _DELTA * (words - function_words) + (1 - _DELTA) * function_words
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(matches / lengths, -1, 0)
        f_mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragmentation = sums[..., _CHUNKS] / sums[..., _MATCHED].mean(-1)
    return np.nan_to_num(f_mean * (1 - _GAMMA * fragmentation**_BETA), nan=0.0)


def _text(text: str) -> str:
    return java.one_line(text.replace("|||", " "))
