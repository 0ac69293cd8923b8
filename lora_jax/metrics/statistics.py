"""What every score is made of: lists of references, one row of statistics an instance, and the bootstrap over rows.

A corpus score here is `aggregate(values.sum(0))` of one row of statistics an instance. A resample of the corpus is then
a row of counts (how often each instance was drawn), and a thousand resamples are one matrix product.
"""

import importlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core import extras

Texts = Sequence[str]
Lists = Sequence[Sequence[str]]  # of the references of each instance, all present
References = Sequence[Sequence[str | None]]


class Statistics(NamedTuple):
    """What a corpus score is made of."""

    values: np.ndarray  # (instances, k)
    aggregate: Callable[[np.ndarray], np.ndarray]  # sums (..., k) -> scores (...)

    def score(self) -> float:
        return float(self.aggregate(self.values.sum(0)))


def mean(scores: Sequence[float]) -> Statistics:
    """The mean over instances as a corpus score."""
    values = np.stack([np.asarray(scores, float), np.ones(len(scores))], axis=-1)
    return Statistics(values, lambda sums: sums[..., 0] / sums[..., 1])


def draws(instances: int, samples: int, seed: int) -> np.ndarray:
    """(samples, instances): how often each instance stands in each resample of the corpus."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(instances, np.full(instances, 1 / instances), size=samples).astype(float)


def interval(scores: np.ndarray, level: float) -> tuple[float, float]:
    """The percentile interval of resampled scores (samples,)."""
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"score": statistics.median(values), "low": min(values), "high": max(values)}


def checked(hypotheses: Texts, references: References) -> list[list[str]]:
    """The references that are `present`, once it is clear that each hypothesis has some.

    Raises:
      TypeError: a string where a list belongs, or a hypothesis that is not a string.
      ValueError: nothing to score, lists of different lengths, or an instance without reference.
    """
    if isinstance(hypotheses, str):
        raise TypeError("hypotheses are a list of texts, not one text")
    if not len(hypotheses):
        raise ValueError("no hypotheses to score")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but {len(references)} lists of references")
    if isinstance(references, str) or any(isinstance(texts, str) for texts in references):
        raise TypeError("references are a list of lists of texts, one list a hypothesis")
    lists = present(references)
    for number, (text, texts) in enumerate(zip(hypotheses, lists, strict=True)):
        if not isinstance(text, str):
            raise TypeError(f"hypothesis {number} (counted from 0) is not a text: {text!r}")
        if not texts:
            raise ValueError(f"instance {number} (counted from 0) has no reference")
    return lists


def present(references: References) -> list[list[str]]:
    """The references that are there: not None, not empty, not blank."""
    return [[text for text in texts if text and text.strip()] for texts in references]


def padded(references: References) -> list[list[str]]:
    """All lists as long as the longest, "" for what is missing: what the official scorers of WebNLG and DART read
    from one file a reference number."""
    longest = max(len(texts) for texts in references)
    lists = [[*texts, *[None] * (longest - len(texts))] for texts in references]
    return [[text if text and text.strip() else "" for text in texts] for texts in lists]


def package(module: str) -> Any:
    """A module that the extra `scores` brings; one that is not installed is a ModuleNotFoundError that names it."""
    with extras.extra("scores"):
        return importlib.import_module(module)
