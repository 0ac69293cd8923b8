"""Logical-form accuracy of SQL texts, for WikiSQL (paper, Table 4)."""

import re

from lora_jax.metrics.statistics import Lists, References, Statistics, Texts, checked, mean


def logical_form_accuracy(predictions: Texts, references: References) -> float:
    """The fraction of queries, SELECT ... FROM ... WHERE ... AND ..., that are a reference but for how they are
    written; references are one list a query, in WikiSQL of one. Errors are those of `bleu`.

    Case, blanks, the kind of quotes and a closing semicolon do not count, nor does the order of conditions, as in the
    official evaluate.py without `--ordered` (salesforce/WikiSQL); which compares numbers of columns, here their names
    are compared.

    >>> logical_form_accuracy(['select a from t where b = "x"'], [["SELECT a FROM t WHERE b = 'x'"]])
    1.0
    """
    return logical_form_statistics(predictions, checked(predictions, references)).score()


def logical_form_statistics(predictions: Texts, references: Lists) -> Statistics:
    """The mean over instances of 1 where the query is right."""
    forms = [{_form(query) for query in queries} for queries in references]
    return mean([_form(query) in accepted for query, accepted in zip(predictions, forms, strict=True)])


def _form(query: str) -> tuple[str, frozenset[str]]:
    """What stands before WHERE, and the conditions. A value with an "and" in it falls apart alike on both sides."""
    text = " ".join(re.sub('["`\u2018\u2019\u201c\u201d]', "'", query.lower()).split()).removesuffix(";").rstrip()
    head, _, conditions = text.partition(" where ")
    return head, frozenset(conditions.split(" and "))
