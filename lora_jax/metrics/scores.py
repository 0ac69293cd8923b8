"""The scores of the paper's text tables (3, 4, 13, 14), with bootstrap intervals and paired comparison."""

import functools
import logging
from collections.abc import Callable

import numpy as np

from lora_jax.metrics import statistics
from lora_jax.metrics.java import meteor_statistics, ptb_tokens
from lora_jax.metrics.ngrams import bleu_statistics, nist_statistics
from lora_jax.metrics.rouge import KINDS, cider_statistics, rouge_l_statistics, rouge_statistics
from lora_jax.metrics.sql import logical_form_statistics
from lora_jax.metrics.statistics import Lists, References, Statistics, Texts, checked, draws, interval, package, padded
from lora_jax.metrics.ter import ter_statistics

log = logging.getLogger(__name__)
FILLED = ("webnlg", "dart")  # the styles in which something stands for missing references
Parts = dict[str, Callable[[], Statistics]]


def score(hypotheses: Texts, references: References, *, style: str, missing: str | None = None) -> dict[str, float]:
    """The scores of a data set, as its official scorer prints them.

    - e2e: bleu, nist, meteor, rouge_l, cider, by tuetschek/e2e-metrics: BLEU and NIST case-insensitive on mteval-v13a's
      tokens (`bleu`, `nist_statistics`), the others on the PTB tokens of the MS-COCO caption evaluation.
    - webnlg: bleu, meteor, ter, by WebNLG/GenerationEval: multi-bleu-detok (13a tokens, case counts), METEOR 1.5 and
      pyter's TER, the least over references, on nltk's words.
    - dart: as webnlg, but BLEU by multi-bleu, on the tokens that the texts have.

    - chat: exact_match, the fraction of texts that are a reference, bleu as webnlg's, and rouge1, rouge2, rougeL.

    bleu is of 0 to 100, nist and cider (up to 10) have no unit, meteor, rouge_l and ter are fractions; of ter less is
    better. METEOR, ROUGE-L and CIDEr need Java; they and TER need the extra `scores`. What cannot be had is left out,
    with one warning that says why. Texts are scored as they are: the LoRA authors first lower-case those of WebNLG and
    DART, put spaces around every character that is no letter, digit or underscore, and keep six references.

    Args:
      hypotheses: one text an instance. An empty one matches nothing.
      references: one list an instance, of any length; None and blank texts are missing references.
      style: "e2e", "webnlg", "dart", "samsum", "wikisql" or "chat". DART's texts are taken as tokenized: the LoRA
        authors give multi-bleu-detok texts of words and marks alone, which it splits no further but at underscores.
      missing: what stands for a missing reference, and in WebNLG and DART for those that a list lacks to be as long as
        the longest. "first": the first reference, which changes no score, so that nothing is as good (the pipeline of
        the LoRA authors; the default). "empty": a reference of no words, as in most published figures: BLEU's closest
        length and METEOR may choose it, its TER is 1. Lists of other styles are not filled.

    Raises:
      TypeError: a string where a list belongs.
      ValueError: an unknown style or rule, nothing to score, lists of different lengths, or an instance without any
        reference.

    >>> from lora_jax import metrics
    >>> sorted(metrics.score(["a pub"], [["a pub", "a bar"]], style="samsum"))
    ['rouge1', 'rouge2', 'rougeL']
    """
    return {name: part.score() for name, part in _statistics(hypotheses, references, style, missing).items()}


def report(
    hypotheses: Texts,
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

    `samples` is the number of resamples, `level` the part of them that the interval holds, `seed` that of the draws;
    the other arguments are those of `score`.

    >>> from lora_jax import metrics
    >>> metrics.report(["a pub", "a bar"], [["a pub"], ["a bar"]], style="samsum", samples=10)["rouge1"]
    {'score': 1.0, 'low': 1.0, 'high': 1.0}
    """
    parts = _statistics(hypotheses, references, style, missing)
    weights = draws(len(hypotheses), samples, seed)
    result = {}
    for name, part in parts.items():
        low, high = interval(part.aggregate(weights @ part.values), level)
        result[name] = {"score": part.score(), "low": low, "high": high}
    return result


def paired(
    hypotheses: Texts,
    others: Texts,
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

    `others` are the second system's texts for the same instances; the other arguments are those of `report`.

    >>> from lora_jax import metrics
    >>> first, second, references = ["a pub", "a bar"], ["a pub", "an inn"], [["a pub"], ["a bar"]]
    >>> metrics.paired(first, second, references, style="samsum", samples=10)["rouge1"]["difference"]
    0.5
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


def _statistics(hypotheses: Texts, references: References, style: str, missing: str | None) -> dict[str, Statistics]:
    if style not in STYLES:
        raise ValueError(f"style {style!r}: one of {', '.join(STYLES)}")
    if missing not in (None, "first", "empty"):
        raise ValueError(f"missing {missing!r}: 'first' or 'empty'")
    if missing and style not in FILLED:
        raise ValueError(f"missing {missing!r}: lists of {style} are not filled, leave it out")
    lists = checked(hypotheses, references)
    if missing == "empty":
        lists = padded(references)
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


def _e2e(hypotheses: Texts, references: Lists) -> Parts:
    """tuetschek/e2e-metrics."""
    tokens = functools.cache(lambda: _split(ptb_tokens, hypotheses, references))
    return {
        "bleu": lambda: bleu_statistics(hypotheses, references),
        "nist": lambda: nist_statistics(hypotheses, references),
        "meteor": lambda: meteor_statistics(*tokens()),
        "rouge_l": lambda: rouge_l_statistics(*tokens()),
        "cider": lambda: cider_statistics(*tokens()),
    }


def _webnlg(hypotheses: Texts, references: Lists, *, tokenize: str = "13a") -> Parts:
    """WebNLG/GenerationEval, BLEU by multi-bleu-detok."""
    words = functools.cache(lambda: _split(nltk_words, hypotheses, references))
    return {
        "bleu": lambda: bleu_statistics(hypotheses, references, tokenize=tokenize, lowercase=False, smooth=False),
        "meteor": lambda: meteor_statistics(*words()),
        "ter": lambda: ter_statistics(*words()),
    }


def _chat(hypotheses: Texts, references: Lists) -> Parts:
    """BLEU and ROUGE as for SAMSum, and the answers that are one of the references but for blanks around them."""
    pairs = list(zip(hypotheses, references, strict=True))
    return {
        "exact_match": lambda: statistics.mean([text.strip() in map(str.strip, texts) for text, texts in pairs]),
        "bleu": lambda: bleu_statistics(hypotheses, references, tokenize="13a", lowercase=False, smooth=False),
        **_samsum(hypotheses, references),
    }


def _samsum(hypotheses: Texts, references: Lists) -> Parts:
    """Package rouge-score with stemming."""
    parts = functools.cache(lambda: rouge_statistics(hypotheses, references))
    return {kind: lambda kind=kind: parts()[kind] for kind in KINDS}  # type: ignore[misc]


STYLES: dict[str, Callable[[Texts, Lists], Parts]] = {
    "e2e": _e2e,
    "webnlg": _webnlg,
    # BLEU by multi-bleu: on the tokens that the texts have
    "dart": functools.partial(_webnlg, tokenize="none"),
    "samsum": _samsum,
    "chat": _chat,
    "wikisql": lambda queries, references: {"logical_form": lambda: logical_form_statistics(queries, references)},
}


def nltk_words(texts: Texts) -> list[str]:
    """nltk's `word_tokenize`, one space between: English Punkt sentences (of package punkt, which holds the model that
    nltk would download), split into words by nltk's rules; the WebNLG challenge's scorer uses it for METEOR and TER."""
    sentences = package("punkt").sent_tokenize
    split = package("nltk.tokenize").NLTKWordTokenizer().tokenize
    return [" ".join(word for sentence in sentences(text) for word in split(sentence)) for text in texts]


def _split(tokens: Callable[[Texts], list[str]], hypotheses: Texts, references: Lists) -> tuple[Texts, Lists]:
    """Tokens of all texts in one call."""
    token_lists = iter(tokens([*hypotheses, *(text for texts in references for text in texts)]))
    return [next(token_lists) for _ in hypotheses], [[next(token_lists) for _ in texts] for texts in references]
