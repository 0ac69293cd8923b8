"""GLUE's metrics (Wang et al. 2018; the paper's Table 2 has the first of each task, of MRPC and QQP the accuracy)."""

import warnings

import numpy as np
from numpy.typing import ArrayLike

from lora_jax.core.extras import extra

# GLUE's own, in its order; f1 is of class 1 (a paraphrase, a duplicate).
METRICS = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
}
# What the paper's Table 2 reports. Its MNLI is the accuracy on the matched examples (the authors' README).
MAIN = {name: metrics[0] for name, metrics in METRICS.items()}


def glue(name: str, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The metrics of a task, as fractions: accuracy and f1 of 0 to 1, matthews, pearson and spearman of -1 to 1.

    A correlation with a constant has no value (0 / 0); it is 0 here, as of a model that has learnt nothing. So is the
    f1 where neither side has a 1.

    Args:
      name: a key of `METRICS`.
      predictions: (N,) ids of labels; of STS-B numbers, which need not lie within 0 to 5.
      labels: (N,) the true ones.

    Raises:
      ValueError: another name, nothing to score, shapes that differ, predictions that are no ids, NaN.
    """
    if name not in METRICS:
        raise ValueError(f"no GLUE task {name!r}: one of {', '.join(METRICS)}")
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != true.shape or not len(predicted):
        raise ValueError(f"predictions of shape {predicted.shape} for labels of shape {true.shape}: both (N,), N > 0")
    if name == "stsb":
        predicted, true = predicted.astype(np.float64), true.astype(np.float64)
        if not (np.isfinite(predicted).all() and np.isfinite(true).all()):
            raise ValueError("a prediction or a label is NaN or infinite")
    elif not (predicted.dtype.kind in "iu" and true.dtype.kind in "iu"):
        raise ValueError(
            f"predictions of {predicted.dtype} for labels of {true.dtype}: both must be integers, ids of labels"
        )
    return {metric: _METRICS[metric](predicted, true) for metric in METRICS[name]}


def _accuracy(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean(found == true))


# The packages take a second to import, and most programs score no GLUE: so within the functions.
def _matthews(found: np.ndarray, true: np.ndarray) -> float:
    with extra("data"):
        from sklearn.metrics import matthews_corrcoef

    # asked first: scikit-learn gives 0 as well, but warns where both have one and the same class
    return 0.0 if _constant(found) or _constant(true) else float(matthews_corrcoef(true, found))


def _f1(found: np.ndarray, true: np.ndarray) -> float:
    with extra("data"):
        from sklearn.metrics import f1_score

    return float(f1_score(true, found, zero_division=0.0))


def _pearson(found: np.ndarray, true: np.ndarray) -> float:
    with extra("data"):
        from scipy.stats import NearConstantInputWarning, pearsonr

    if _constant(found) or _constant(true):
        return 0.0
    with warnings.catch_warnings():
        # predictions that differ in the last digits only: the value is rough, and as good as that of a constant
        warnings.simplefilter("ignore", NearConstantInputWarning)
        return float(pearsonr(found, true).statistic)


def _spearman(found: np.ndarray, true: np.ndarray) -> float:
    with extra("data"):
        from scipy.stats import spearmanr

    return 0.0 if _constant(found) or _constant(true) else float(spearmanr(found, true).statistic)


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


_METRICS = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman}
