"""Logical-form accuracy of SQL texts, for WikiSQL (paper, Table 4)."""

import re
from collections.abc import Sequence

from lora_jax.metrics.references import References, check_lists, present
from lora_jax.metrics.statistics import Statistics, mean


def logical_form_accuracy(predictions: Sequence[str], references: References) -> float:
    """The fraction of queries that are a reference but for how they are written.

    Case, blanks, the kind of quotes and a closing semicolon do not count, nor does the order of conditions, as in the
    official evaluate.py without `--ordered` (salesforce/WikiSQL); which compares numbers of columns, here their names
    are compared.

    Args:
      predictions: one query an instance: SELECT ... FROM ... WHERE ... AND ...
      references: one list of queries an instance, in WikiSQL of one.

    Raises:
      TypeError, ValueError: as `bleu`.
    """
    check_lists(predictions, references)
    return logical_form_statistics(predictions, present(references)).score()


def logical_form_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """The mean over instances of 1 where the query is right."""
    forms = [{_form(query) for query in queries} for queries in references]
    return mean([_form(query) in accepted for query, accepted in zip(predictions, forms, strict=True)])


def _form(query: str) -> tuple[str, frozenset[str]]:
    """What stands before WHERE, and the conditions. A value with an "and" in it falls apart alike on both sides."""
    text = " ".join(re.sub('["`\u2018\u2019\u201c\u201d]', "'", query.lower()).split()).removesuffix(";").rstrip()
    head, _, conditions = text.partition(" where ")
    return head, frozenset(conditions.split(" and "))
