"""BLEU as the official scorers of E2E, WebNLG and DART compute it, by sacrebleu's counts."""

import functools
from collections.abc import Sequence

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.metrics.references import References, check_lists, present
from lora_jax.metrics.statistics import Statistics

_ORDER = 4


def bleu(hypotheses: Sequence[str], references: References) -> float:
    """Corpus BLEU-4, 0 to 100, over all references of each hypothesis, as the E2E scorer has it: mteval-v13a's tokens,
    case-insensitive, no smoothing but of counts of zero.

    Args:
      hypotheses: one text an instance.
      references: one list an instance, of any length; None and blank texts are no references.

    Raises:
      TypeError: a string where a list of references belongs.
      ValueError: nothing to score, lists of different lengths, or an instance without reference.
    """
    check_lists(hypotheses, references)
    return bleu_statistics(hypotheses, present(references)).score()


def bleu_statistics(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: str = "13a",
    lowercase: bool = True,
    smooth: bool = True,
) -> Statistics:
    """Rows of hypothesis length, closest reference length (the shorter of two), four counts of matches and four of
    n-grams.

    Args:
      tokenize: "13a" (mteval-v13a, multi-bleu-detok) or "none" (multi-bleu: the texts are tokenized).
      smooth: a count of zero becomes 1/2, the next 1/4, ... (mteval-v13a); else it makes the score 0 (multi-bleu).
    """
    with extra("scores"):
        from sacrebleu.metrics import BLEU

    # force: no warning about texts that end in a token " ."; effective_order: none about single sentences, only
    # whose counts are used
    metric = BLEU(tokenize=tokenize, lowercase=lowercase, force=True, effective_order=True)
    scores = [metric.sentence_score(text, texts) for text, texts in zip(hypotheses, references, strict=True)]
    values = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], float)
    return Statistics(values, functools.partial(_aggregate, smooth=smooth))


def _aggregate(sums: np.ndarray, *, smooth: bool) -> np.ndarray:
    """sacrebleu's `BLEU.compute_bleu` for many sums at once."""
    length, reference_length = sums[..., 0], sums[..., 1]
    counts, totals = sums[..., 2 : 2 + _ORDER], sums[..., 2 + _ORDER :]
    matched = np.asarray(counts > 0)
    if smooth:
        counts = np.where(matched, counts, 0.5 ** np.cumsum(~matched, axis=-1))
    defined = np.asarray((totals > 0).all(-1) & (matched.any(-1) if smooth else matched.all(-1)))
    precisions = np.where(defined[..., None], counts / np.maximum(totals, 1), 1)
    brevity = np.minimum(1 - reference_length / np.maximum(length, 1), 0)
    return np.where(defined, 100 * np.exp(brevity + np.log(precisions).mean(-1)), 0)
