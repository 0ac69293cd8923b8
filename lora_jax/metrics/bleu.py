"""BLEU as the official E2E scorer computes it."""

from collections.abc import Sequence
from typing import Any

import sacrebleu


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]) -> float:
    """Corpus BLEU-4, 0 to 100, over all references of each hypothesis: mteval-v13a's tokens,
    case-insensitive, no smoothing but of counts of zero.

    Args:
      hypotheses: one text an instance.
      references: one list an instance, of any length; None and "" are no references.

    Raises:
      TypeError: a string where a list of references belongs.
      ValueError: nothing to score, lists of different lengths, or an instance without reference.
    """
    check_lists(hypotheses, references)
    ragged = [[text for text in texts if text] for texts in references]
    for number, texts in enumerate(ragged):
        if not texts:
            raise ValueError(f"instance {number} (counted from 0) has no reference")
    widest = max(len(texts) for texts in ragged)
    # sacrebleu wants the i-th reference of every instance together, None where there is none
    streams: list[list[Any]] = [[t[i] if i < len(t) else None for t in ragged] for i in range(widest)]
    # force: no warning about texts that end in a token " ."
    score = sacrebleu.corpus_bleu(list(hypotheses), streams, tokenize="13a", lowercase=True, force=True)
    return float(score.score)


def check_lists(hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]) -> None:
    """Raises, with the reason, unless each hypothesis has its list of references."""
    if not hypotheses:
        raise ValueError("no hypotheses to score")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but {len(references)} lists of references")
    if any(isinstance(texts, str) for texts in references):
        raise TypeError("references are a list of lists of texts, one list a hypothesis")
