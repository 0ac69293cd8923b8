"""NIST as mteval-v13a defines it and the E2E scorer computes it (tuetschek/e2e-metrics, its Python version, which
differs from the Perl one where instances have different numbers of references)."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.metrics.statistics import Statistics

_ORDER = 5
_Grams = Counter[tuple[str, ...]]
# the length penalty is 1/2 where the texts have 2/3 of the references' average length
_BETA = math.log(0.5) / math.log(1.5) ** 2


def nist_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """Rows of the information of matched n-grams (n = 1 to 5), the numbers of n-grams, and the average reference
    length; on mteval-v13a's tokens, lower-cased.

    The information of an n-gram is log2 of how much rarer it is in all references together than its first n - 1
    words. Matches are clipped by the most that any one reference of the instance holds.
    """
    with extra("scores"):
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer = Tokenizer13a()
    tokens = [[tokenizer(text.lower()).split() for text in texts] for texts in references]
    grams = [[Counter(_ngrams(words)) for words in texts] for texts in tokens]
    seen: _Grams = Counter({(): sum(len(words) for texts in tokens for words in texts)})
    for counter in (counter for counters in grams for counter in counters):
        seen.update(counter)
    values = np.zeros((len(hypotheses), 2 * _ORDER + 1))
    for row, text, counters, texts in zip(values, hypotheses, grams, tokens, strict=True):
        words = tokenizer(text.lower()).split()
        most: _Grams = Counter()
        for counter in counters:
            most |= counter
        for gram, count in (Counter(_ngrams(words)) & most).items():
            row[len(gram) - 1] += count * math.log2(seen[gram[:-1]] / seen[gram])
        row[_ORDER:-1] = [max(len(words) - n, 0) for n in range(_ORDER)]
        row[-1] = np.mean([len(words) for words in texts])
    return Statistics(values, _aggregate)


def _ngrams(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(words) - n + 1)]


def _aggregate(sums: np.ndarray) -> np.ndarray:
    information, totals, reference_length = sums[..., :_ORDER], sums[..., _ORDER:-1], sums[..., -1]
    # no words: the logarithm of a tiny number makes the penalty 0
    ratio = np.clip(totals[..., 0] / np.maximum(reference_length, 1), 1e-300, 1)
    return np.exp(_BETA * np.log(ratio) ** 2) * (information / np.maximum(totals, 1)).sum(-1)
