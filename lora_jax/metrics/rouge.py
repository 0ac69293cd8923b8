"""ROUGE as reported for SAMSum (paper, Table 4), and ROUGE-L and CIDEr of the MS-COCO caption evaluation, by their
packages."""

from lora_jax.metrics.statistics import Lists, References, Statistics, Texts, checked, mean, package

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(hypotheses: Texts, references: References) -> dict[str, float]:
    """Mean F1 of "rouge1", "rouge2" and "rougeL" by package rouge-score with stemming, fractions; of several references
    each takes its best. Arguments and errors are those of `bleu`.

    >>> rouge(["a pub by the river"], [["a riverside pub", "a pub by the river"]])
    {'rouge1': 1.0, 'rouge2': 1.0, 'rougeL': 1.0}
    """
    lists = checked(hypotheses, references)
    return {kind: part.score() for kind, part in rouge_statistics(hypotheses, lists).items()}


def rouge_statistics(hypotheses: Texts, references: Lists) -> dict[str, Statistics]:
    """Of each kind the mean over instances."""
    scorer = package("rouge_score.rouge_scorer").RougeScorer(KINDS, use_stemmer=True)
    rows = [scorer.score_multi(texts, text) for text, texts in zip(hypotheses, references, strict=True)]
    return {kind: mean([row[kind].fmeasure for row in rows]) for kind in KINDS}


def rouge_l_statistics(hypotheses: Texts, references: Lists) -> Statistics:
    """The mean of F (beta 1.2) of the best precision and the best recall over the references; a fraction. Texts are
    tokens with one space between."""
    scorer = package("pycocoevalcap.rouge.rouge").Rouge()
    return mean([scorer.calc_score([text], list(texts)) for text, texts in zip(hypotheses, references, strict=True)])


def cider_statistics(hypotheses: Texts, references: Lists) -> Statistics:
    """The mean of up to 10 an instance; the document frequencies are those of all references given. Texts are tokens
    with one space between."""
    scorer = package("pycocoevalcap.cider.cider").Cider()
    texts = {number: [text] for number, text in enumerate(hypotheses)}
    _, scores = scorer.compute_score({number: list(texts) for number, texts in enumerate(references)}, texts)
    return mean(scores)
