"""SAMSum and WikiSQL, the paper's two generation tasks with GPT-3 (Table 4), from local JSON lines.

The inputs are those that the paper names (appendix C); how GPT-3's prompts were written in detail is not known.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_jax.core.extras import extra
from lora_jax.data.files import find, json_value, of_form, read_lines

with extra("data"):
    import datasets

SAMSUM = "SAMSum is public as the ancillary file of arXiv 1911.12237 (JSON lists: write one object a line)"
WIKISQL = "WikiSQL is public at github.com/salesforce/WikiSQL (data.tar.bz2)"

_SAMSUM_FILES = {"train": ("train.jsonl",), "valid": ("valid.jsonl", "val.jsonl"), "test": ("test.jsonl",)}
_WIKISQL_FILES = {"train": ("train.jsonl",), "valid": ("dev.jsonl",), "test": ("test.jsonl",)}
_AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")  # as in the official lib/query.py
_OPERATORS = ("=", ">", "<", "OP")


def samsum(path: str | Path, split: str = "train") -> datasets.Dataset:
    """Dialogues and their summaries: the utterances, one a line, then a blank line.

    They are those of a split ("train", "valid" or "test") in a folder that holds train, valid (or val) and test.jsonl
    (also .gz), or of one file, whatever the split, of lines {"dialogue": ..., "summary": ...}.

    Raises:
      FileNotFoundError: there is nothing there; names the public source.
      ValueError: a line is not of the form, with the path and the line.
    """

    def pair(row: dict[str, Any]) -> dict[str, str]:
        dialogue = row["dialogue"].replace("\r\n", "\n").strip()
        return {"context": dialogue + "\n\n", "completion": row["summary"].strip()}

    return datasets.Dataset.from_list(_read(find(path, split, _SAMSUM_FILES, SAMSUM), pair, SAMSUM))


def wikisql(path: str | Path, split: str = "train") -> datasets.Dataset:
    """Questions on a table and their SQL: the table's columns joined by " | ", a line with the question; the query as
    the official lib/query.py prints it, but with the columns' names.

    The folder holds the official files, {train,dev,test}.jsonl and .tables.jsonl (also .gz); one of the former has its
    tables beside it. Errors are those of `samsum`.
    """
    file = find(path, split, _WIKISQL_FILES, WIKISQL)
    stem = file.name.removesuffix(".gz").removesuffix(".jsonl")
    tables = find(file.parent, "tables", {"tables": (f"{stem}.tables.jsonl",)}, WIKISQL)

    def table(row: dict[str, Any]) -> tuple[str, list[str]]:
        if not isinstance(row["id"], str):
            raise TypeError(f"the id {row['id']!r} is no string")
        return row["id"], row["header"]

    headers = dict(_read(tables, table, WIKISQL))

    def pair(row: dict[str, Any]) -> dict[str, str]:
        header = headers[row["table_id"]]
        question = " | ".join(header) + "\n" + row["question"].strip()
        return {"context": question, "completion": query(row["sql"], header)}

    return datasets.Dataset.from_list(_read(file, pair, WIKISQL))


def query(sql: dict[str, Any], header: list[str]) -> str:
    """The official form of a query as SQL.

    >>> query({"sel": 1, "agg": 3, "conds": [[0, 0, "Oslo"], [2, 1, 7]]}, ["City", "Club", "Wins"])
    'SELECT COUNT Club FROM table WHERE City = "Oslo" AND Wins > 7'
    """
    selected = " ".join(filter(None, ("SELECT", _AGGREGATES[sql["agg"]], header[sql["sel"]], "FROM table")))
    conditions = [
        f"{header[column]} {_OPERATORS[operator]} " + (f'"{value}"' if isinstance(value, str) else str(value))
        for column, operator, value in sql["conds"]
    ]
    return f"{selected} WHERE {' AND '.join(conditions)}" if conditions else selected


def _read(file: Path, take: Callable[[dict[str, Any]], Any], source: str) -> list[Any]:
    """What `take` makes of each line."""
    taken = []
    for number, line in enumerate(read_lines(file), 1):
        with of_form(f"{file}:{number}: not a line of the form wanted; {source}"):
            taken.append(take(json_value(line)))
    return taken
