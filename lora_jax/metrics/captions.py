"""ROUGE-L and CIDEr of the MS-COCO caption evaluation, on texts of tokens with one space between."""

from collections.abc import Sequence

from lora_jax.metrics.extra import extra
from lora_jax.metrics.statistics import Statistics, mean


def rouge_l_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """The mean of F (beta 1.2) of the best precision and the best recall over the references; a fraction.

    Raises:
      ImportError: without pycocoevalcap.
    """
    scorer = extra("pycocoevalcap.rouge.rouge").Rouge()
    return mean([scorer.calc_score([text], list(texts)) for text, texts in zip(hypotheses, references, strict=True)])


def cider_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """The mean of up to 10 an instance; the document frequencies are those of all references given.

    Raises:
      ImportError: without pycocoevalcap.
    """
    scorer = extra("pycocoevalcap.cider.cider").Cider()
    texts = {number: [text] for number, text in enumerate(hypotheses)}
    _, scores = scorer.compute_score({number: list(texts) for number, texts in enumerate(references)}, texts)
    return mean(scores)
