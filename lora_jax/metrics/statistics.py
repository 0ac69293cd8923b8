"""Corpus scores as functions of sums over the instances, and the bootstrap that this allows.

Every score here is `aggregate(values.sum(0))` of one row of statistics an instance. A resample of the corpus is then
a row of counts (how often each instance was drawn), and a thousand resamples are one matrix product.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


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
