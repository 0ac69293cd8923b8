"""ROUGE-1, ROUGE-2 and ROUGE-L as reported for SAMSum (paper, Table 4): package rouge-score with stemming."""

from collections.abc import Sequence

from lora_jax.metrics.extra import extra
from lora_jax.metrics.references import References, check_lists, present
from lora_jax.metrics.statistics import Statistics, mean

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(hypotheses: Sequence[str], references: References) -> dict[str, float]:
    """Mean F1 of "rouge1", "rouge2" and "rougeL", fractions; of several references each takes its best.

    Args:
      hypotheses: one text an instance.
      references: one list an instance; None and blank texts are no references.

    Raises:
      ImportError: without rouge-score.
      TypeError, ValueError: as `bleu`.
    """
    check_lists(hypotheses, references)
    return {kind: part.score() for kind, part in rouge_statistics(hypotheses, present(references)).items()}


def rouge_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Statistics]:
    """Of each kind the mean over instances."""
    scorer = extra("rouge_score.rouge_scorer").RougeScorer(KINDS, use_stemmer=True)
    rows = [scorer.score_multi(texts, text) for text, texts in zip(hypotheses, references, strict=True)]
    return {kind: mean([row[kind].fmeasure for row in rows]) for kind in KINDS}
