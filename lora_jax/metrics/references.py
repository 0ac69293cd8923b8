"""Lists of references: their checks, and the two rules for those that are missing."""

from collections.abc import Sequence

References = Sequence[Sequence[str | None]]


def check_lists(hypotheses: Sequence[str], references: References) -> None:
    """Raises, with the reason, unless each hypothesis has its list of references.

    Raises:
      TypeError: a string where a list belongs, or a hypothesis that is not a string.
      ValueError: nothing to score, lists of different lengths, or an instance without reference.
    """
    if isinstance(hypotheses, str):
        raise TypeError("hypotheses are a list of texts, not one text")
    if not len(hypotheses):
        raise ValueError("no hypotheses to score")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but {len(references)} lists of references")
    if isinstance(references, str) or any(isinstance(texts, str) for texts in references):
        raise TypeError("references are a list of lists of texts, one list a hypothesis")
    for number, text in enumerate(hypotheses):
        if not isinstance(text, str):
            raise TypeError(f"hypothesis {number} (counted from 0) is not a text: {text!r}")
    for number, texts in enumerate(present(references)):
        if not texts:
            raise ValueError(f"instance {number} (counted from 0) has no reference")


def present(references: References) -> list[list[str]]:
    """The references that are there: not None, not empty, not blank."""
    return [[text for text in texts if text and text.strip()] for texts in references]


def padded(references: References) -> list[list[str]]:
    """All lists as long as the longest, "" for what is missing: what the official scorers of WebNLG and DART read
    from one file a reference number."""
    widest = max(len(texts) for texts in references)
    return [[_or_empty(text) for text in texts] + [""] * (widest - len(texts)) for texts in references]


def _or_empty(text: str | None) -> str:
    return text if text and text.strip() else ""
