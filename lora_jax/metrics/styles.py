"""Which scores each data set has, and on which tokens."""

import functools
from collections.abc import Callable, Sequence

from lora_jax.metrics.bleu import bleu_statistics
from lora_jax.metrics.captions import cider_statistics, rouge_l_statistics
from lora_jax.metrics.meteor import meteor_statistics
from lora_jax.metrics.nist import nist_statistics
from lora_jax.metrics.rouge import KINDS, rouge_statistics
from lora_jax.metrics.sql import logical_form_statistics
from lora_jax.metrics.statistics import Statistics
from lora_jax.metrics.ter import ter_statistics
from lora_jax.metrics.tokens import nltk_words, ptb_tokens

Texts = Sequence[str]
Lists = Sequence[Sequence[str]]
Parts = dict[str, Callable[[], Statistics]]


def e2e(hypotheses: Texts, references: Lists) -> Parts:
    """tuetschek/e2e-metrics."""
    tokens = functools.cache(lambda: _split(ptb_tokens, hypotheses, references))
    return {
        "bleu": lambda: bleu_statistics(hypotheses, references),
        "nist": lambda: nist_statistics(hypotheses, references),
        "meteor": lambda: meteor_statistics(*tokens()),
        "rouge_l": lambda: rouge_l_statistics(*tokens()),
        "cider": lambda: cider_statistics(*tokens()),
    }


def webnlg(hypotheses: Texts, references: Lists, *, tokenize: str = "13a") -> Parts:
    """WebNLG/GenerationEval, BLEU by multi-bleu-detok."""
    words = functools.cache(lambda: _split(nltk_words, hypotheses, references))
    return {
        "bleu": lambda: bleu_statistics(hypotheses, references, tokenize=tokenize, lowercase=False, smooth=False),
        "meteor": lambda: meteor_statistics(*words()),
        "ter": lambda: ter_statistics(*words()),
    }


def samsum(hypotheses: Texts, references: Lists) -> Parts:
    """Package rouge-score with stemming."""
    parts = functools.cache(lambda: rouge_statistics(hypotheses, references))

    def part(kind: str) -> Statistics:
        return parts()[kind]

    return {kind: functools.partial(part, kind) for kind in KINDS}


STYLES: dict[str, Callable[[Texts, Lists], Parts]] = {
    "e2e": e2e,
    "webnlg": webnlg,
    # BLEU by multi-bleu: on the tokens that the texts have
    "dart": functools.partial(webnlg, tokenize="none"),
    "samsum": samsum,
    "wikisql": lambda queries, references: {"logical_form": lambda: logical_form_statistics(queries, references)},
}


def _split(tokens: Callable[[Texts], list[str]], hypotheses: Texts, references: Lists) -> tuple[Texts, Lists]:
    """Tokens of all texts in one call."""
    token_lists = iter(tokens([*hypotheses, *(text for texts in references for text in texts)]))
    return [next(token_lists) for _ in hypotheses], [[next(token_lists) for _ in texts] for texts in references]
