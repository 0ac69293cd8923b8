"""BLEU as the official scorers of E2E, WebNLG and DART compute it, by sacrebleu's counts; and NIST as mteval-v13a
defines it and the E2E scorer computes it (tuetschek/e2e-metrics, its Python version, which differs from the Perl one
where instances have different numbers of references)."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lora_jax.metrics.statistics import Lists, References, Statistics, Texts, checked, package

_BLEU_ORDER, _NIST_ORDER = 4, 5
_Grams = Counter[tuple[str, ...]]
# NIST's length penalty is 1/2 where the texts have 2/3 of the references' average length
_BETA = math.log(0.5) / math.log(1.5) ** 2


def bleu(hypotheses: Texts, references: References) -> float:
    """Corpus BLEU-4, 0 to 100, over all references of each hypothesis, as the E2E scorer has it: mteval-v13a's tokens,
    case-insensitive, no smoothing but of counts of zero. None and blank texts are no references.

    Raises:
      TypeError: a string where a list of references belongs.
      ValueError: nothing to score, lists of different lengths, or an instance without reference.

    >>> bleu(["a pub by the river"], [["a pub by the river", "a riverside pub"]])
    100.0
    """
    return bleu_statistics(hypotheses, checked(hypotheses, references)).score()


def bleu_statistics(
    hypotheses: Texts, references: Lists, *, tokenize: str = "13a", lowercase: bool = True, smooth: bool = True
) -> Statistics:
    """Rows of hypothesis length, closest reference length (the shorter of two), four counts of matches and four of
    n-grams.

    Args:
      tokenize: "13a" (mteval-v13a, multi-bleu-detok) or "none" (multi-bleu: the texts are tokenized).
      smooth: a count of zero becomes 1/2, the next 1/4, ... (mteval-v13a); else it makes the score 0 (multi-bleu).
    """
    # force: no warning about texts that end in a token " ."; effective_order: none about single sentences, only
    # whose counts are used
    options = {"tokenize": tokenize, "lowercase": lowercase, "force": True, "effective_order": True}
    metric = package("sacrebleu.metrics").BLEU(**options)
    scores = [metric.sentence_score(text, texts) for text, texts in zip(hypotheses, references, strict=True)]
    values = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], float)
    return Statistics(values, functools.partial(_bleu_of_sums, smooth=smooth))


def _bleu_of_sums(sums: np.ndarray, *, smooth: bool) -> np.ndarray:
    """sacrebleu's `BLEU.compute_bleu` for many sums at once."""
    length, reference_length = sums[..., 0], sums[..., 1]
    counts, totals = sums[..., 2 : 2 + _BLEU_ORDER], sums[..., 2 + _BLEU_ORDER :]
    matched = np.asarray(counts > 0)
    if smooth:
        counts = np.where(matched, counts, 0.5 ** np.cumsum(~matched, axis=-1))
    defined = np.asarray((totals > 0).all(-1) & (matched.any(-1) if smooth else matched.all(-1)))
    precisions = np.where(defined[..., None], counts / np.maximum(totals, 1), 1)
    brevity = np.minimum(1 - reference_length / np.maximum(length, 1), 0)
    return np.where(defined, 100 * np.exp(brevity + np.log(precisions).mean(-1)), 0)


def nist_statistics(hypotheses: Texts, references: Lists) -> Statistics:
    """Rows of the information of matched n-grams (n = 1 to 5), the numbers of n-grams, and the average reference
    length; on mteval-v13a's tokens, lower-cased.

    The information of an n-gram is log2 of how much rarer it is in all references together than its first n - 1
    words. Matches are clipped by the most that any one reference of the instance holds.
    """
    tokenizer = package("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    tokens = [[tokenizer(text.lower()).split() for text in texts] for texts in references]
    grams = [[Counter(_ngrams(words)) for words in texts] for texts in tokens]
    seen: _Grams = Counter({(): sum(len(words) for texts in tokens for words in texts)})
    for counter in itertools.chain.from_iterable(grams):
        seen.update(counter)
    values = np.zeros((len(hypotheses), 2 * _NIST_ORDER + 1))
    for row, text, counters, texts in zip(values, hypotheses, grams, tokens, strict=True):
        words = tokenizer(text.lower()).split()
        most: _Grams = Counter()
        for counter in counters:
            most |= counter
        for gram, count in (Counter(_ngrams(words)) & most).items():
            row[len(gram) - 1] += count * math.log2(seen[gram[:-1]] / seen[gram])
        row[_NIST_ORDER:-1] = [max(len(words) - n, 0) for n in range(_NIST_ORDER)]
        row[-1] = np.mean([len(words) for words in texts])
    return Statistics(values, _nist_of_sums)


def _ngrams(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for n in range(1, _NIST_ORDER + 1) for i in range(len(words) - n + 1)]


def _nist_of_sums(sums: np.ndarray) -> np.ndarray:
    information, totals, reference_length = sums[..., :_NIST_ORDER], sums[..., _NIST_ORDER:-1], sums[..., -1]
    # no words: the logarithm of a tiny number makes the penalty 0
    ratio = np.clip(totals[..., 0] / np.maximum(reference_length, 1), 1e-300, 1)
    return np.exp(_BETA * np.log(ratio) ** 2) * (information / np.maximum(totals, 1)).sum(-1)
