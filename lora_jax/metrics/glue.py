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
HIDDEN = "is it a test split, which hides its labels? experiments.predict writes what GLUE's server scores"
_CLASSES = dict.fromkeys(METRICS, 2) | {"mnli": 3, "stsb": 0}


def glue(name: str, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The metrics of a task, as fractions: accuracy and f1 of 0 to 1, matthews, pearson and spearman of -1 to 1.

    A correlation with a constant has no value (0 / 0); it is 0 here, as of a model that has learnt nothing. So is the
    f1 where neither side has a 1.

    Args:
      name: a key of `METRICS`.
      predictions: (N,) ids of labels; of STS-B numbers, which need not lie within 0 to 5.
      labels: (N,) the true ones.

    Raises:
      ValueError: another name, nothing to score, shapes that differ, predictions or labels that are none of the task's
        ids (the hub's test splits hide labels as -1), of STS-B labels outside of 0 to 5, NaN.
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
        if (outside := true[(true < 0) | (true > 5)]).size:
            raise ValueError(f"a label is {outside[0]:g}, not within 0 to 5: {HIDDEN}")
    elif not (predicted.dtype.kind in "iu" and true.dtype.kind in "iu"):
        dtypes = f"predictions of {predicted.dtype} for labels of {true.dtype}"
        raise ValueError(f"{dtypes}: both must be integers, ids of labels")
    else:
        need_ids(predicted, _CLASSES[name], "prediction")
        need_ids(true, _CLASSES[name], "label")
    return {metric: _value(metric, predicted, true) for metric in METRICS[name]}


def need_ids(ids: np.ndarray, count: int, what: str) -> None:
    """A ValueError for what is none of so many ids of labels."""
    if (outside := ids[(ids < 0) | (ids >= count)]).size:
        raise ValueError(f"a {what} is {outside[0]}, not one of 0 to {count - 1}: {HIDDEN}")


def _value(metric: str, predicted: np.ndarray, true: np.ndarray) -> float:
    if metric == "accuracy":
        return float(np.mean(predicted == true))
    with extra("data"):  # they take a second to import, and most programs score no GLUE
        from scipy import stats
        from sklearn.metrics import f1_score, matthews_corrcoef

    if metric == "f1":
        return float(f1_score(true, predicted, zero_division=0.0))
    # of a constant scikit-learn would warn, and scipy give NaN
    if (predicted == predicted[0]).all() or (true == true[0]).all():
        return 0.0
    if metric == "matthews":
        return float(matthews_corrcoef(true, predicted))
    correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[metric]
    with warnings.catch_warnings():
        # predictions that differ in the last digits only: the value is rough, and as good as that of a constant
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(correlation(predicted, true).statistic)
