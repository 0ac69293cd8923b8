"""The scores of the paper's text tables (3, 13, 14), with bootstrap intervals and paired comparison."""

import logging
from collections.abc import Sequence

import numpy as np

from lora_jax.metrics.references import References, check_lists, padded, present
from lora_jax.metrics.statistics import Statistics, draws, interval
from lora_jax.metrics.styles import STYLES

log = logging.getLogger(__name__)
FILLED = ("webnlg", "dart")  # the styles in which something stands for missing references


def score(
    hypotheses: Sequence[str], references: References, *, style: str, missing: str | None = None
) -> dict[str, float]:
    """The scores of a data set, as its official scorer prints them.

    - e2e: bleu, nist, meteor, rouge_l, cider, by tuetschek/e2e-metrics: BLEU and NIST case-insensitive on mteval-v13a's
      tokens (`bleu`, `nist_statistics`), the others on the PTB tokens of the MS-COCO caption evaluation.
    - webnlg: bleu, meteor, ter, by WebNLG/GenerationEval: multi-bleu-detok (13a tokens, case counts), METEOR 1.5 and
      pyter's TER, the least over references, on nltk's words.
    - dart: as webnlg, but BLEU by multi-bleu, on the tokens that the texts have.

    bleu is of 0 to 100, nist and cider (up to 10) have no unit, meteor, rouge_l and ter are fractions; of ter less is
    better. METEOR, ROUGE-L and CIDEr need Java; they and TER need the extra `scores`. What cannot be had is left out,
    with one warning that says why. Texts are scored as they are: the LoRA authors first lower-case those of WebNLG and
    DART, put spaces around every character that is no letter, digit or underscore, and keep six references.

    Args:
      hypotheses: one text an instance. An empty one matches nothing.
      references: one list an instance, of any length; None and blank texts are missing references.
      style: "e2e", "webnlg", "dart", "samsum" or "wikisql". DART's texts are taken as tokenized: the LoRA authors give
        multi-bleu-detok texts of words and marks alone, which it splits no further but at underscores.
      missing: what stands for a missing reference, and in WebNLG and DART for those that a list lacks to be as long as
        the longest. "first": the first reference, which changes no score, so that nothing is as good (the pipeline of
        the LoRA authors; the default). "empty": a reference of no words, as in most published figures: BLEU's closest
        length and METEOR may choose it, its TER is 1. Lists of other styles are not filled.

    Raises:
      TypeError: a string where a list belongs.
      ValueError: an unknown style or rule, nothing to score, lists of different lengths, or an instance without any
        reference.
    """
    return {name: part.score() for name, part in _statistics(hypotheses, references, style, missing).items()}


def report(
    hypotheses: Sequence[str],
    references: References,
    *,
    style: str,
    missing: str | None = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """`score` with the bootstrap's percentile interval: {"bleu": {"score": ..., "low": ..., "high": ...}, ...}.

    The instances are drawn again with replacement (Koehn 2004) and each corpus score is computed from the statistics
    of those drawn. CIDEr's document frequencies and NIST's information weights stay those of all references.

    Args:
      hypotheses, references, style, missing: as for `score`.
      samples: the number of resamples.
      level: the part of them that the interval holds.
      seed: of the draws.
    """
    parts = _statistics(hypotheses, references, style, missing)
    weights = draws(len(hypotheses), samples, seed)
    result = {}
    for name, part in parts.items():
        low, high = interval(part.aggregate(weights @ part.values), level)
        result[name] = {"score": part.score(), "low": low, "high": high}
    return result


def paired(
    hypotheses: Sequence[str],
    others: Sequence[str],
    references: References,
    *,
    style: str,
    missing: str | None = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """By how much the first system's scores differ from the second's, by the paired bootstrap (Koehn 2004):
    {"bleu": {"difference": first - second, "low": ..., "high": ..., "p": ...}, ...}.

    Both are scored on the same resamples. p is two-sided, as sacrebleu and Moses have it: how often the difference of
    a resample is as far from the resamples' mean as the difference found is from zero, (1 + times) / (1 + samples).

    Args:
      hypotheses, others: the texts of two systems for the same instances.
      references, style, missing, samples, level, seed: as for `report`.
    """
    firsts = _statistics(hypotheses, references, style, missing)
    seconds = _statistics(others, references, style, missing)
    weights = draws(len(hypotheses), samples, seed)
    result = {}
    for name, first in firsts.items():
        second = seconds[name]
        difference = first.score() - second.score()
        differences = first.aggregate(weights @ first.values) - second.aggregate(weights @ second.values)
        low, high = interval(differences, level)
        as_far = np.sum(np.abs(differences - differences.mean()) >= abs(difference))
        p = (1 + float(as_far)) / (1 + samples)
        result[name] = {"difference": difference, "low": low, "high": high, "p": p}
    return result


def _statistics(
    hypotheses: Sequence[str], references: References, style: str, missing: str | None
) -> dict[str, Statistics]:
    if style not in STYLES:
        raise ValueError(f"style {style!r}: one of {', '.join(STYLES)}")
    if missing not in (None, "first", "empty"):
        raise ValueError(f"missing {missing!r}: 'first' or 'empty'")
    if missing and style not in FILLED:
        raise ValueError(f"missing {missing!r}: lists of {style} are not filled, leave it out")
    check_lists(hypotheses, references)
    lists = padded(references) if missing == "empty" else present(references)
    by_name: dict[str, Statistics] = {}
    absent: dict[str, Exception] = {}
    for name, part in STYLES[style](hypotheses, lists).items():
        try:
            by_name[name] = part()
        except (ImportError, RuntimeError) as error:  # not installed, or its Java failed
            absent[name] = error
    if absent:
        log.warning("left out of the scores: %s (%s)", ", ".join(absent), next(iter(absent.values())))
    return by_name
