"""WebNLG 2017: say the facts of a set of triples (paper, Table 14).

Read are the challenge's JSON files, prepared as the authors do (microsoft/LoRA, examples/NLG,
format_converting_webnlg.py), or the same data of the Hugging Face hub.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_jax.core.extras import extra
from lora_jax.data import hub
from lora_jax.data.files import find, read_json

with extra("data"):
    import datasets

SOURCE = (
    "the JSON files are public at github.com/microsoft/LoRA (examples/NLG/data/webnlg_challenge_2017), the challenge "
    "at gitlab.com/shimorina/webnlg-dataset"
)

# The categories of the training data: ten in the authors' code and data, nine in the paper's text.
SEEN = frozenset(
    "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam University WrittenWork".split()
)

_FILES = {"train": ("train.json",), "valid": ("dev.json",), "test": ("test.json",)}
_HUB_CONFIG = "webnlg_challenge_2017"
_HUB_SPLITS = {"train": "train", "valid": "dev", "test": "test"}
_HUB_COLUMNS = {"category", "modified_triple_sets", "lex"}

Entry = tuple[list[str], list[str], str]  # triples, the good texts, category


def load(path: str | Path, split: str = "train") -> datasets.Dataset:
    """The pairs of a split, with the columns `context`, `completion`, `category` and `seen` (whether that is a category
    of the training data: S and U of the paper's Table 14).

    A context is an entry's modified triples, "subject : property : object" joined by " | ", in their own spelling. Each
    text commented "good" is a pair; an entry without one is left out (5 of train, 1 of dev).

    Args:
      path: a folder that holds train, dev and test.json (also .gz), one file, or the name of a dataset on the hub
          (`owner/name`) with the columns of web_nlg's configuration webnlg_challenge_2017. web_nlg itself is a script,
          which the package `datasets` no longer runs.
      split: "train", "valid" or "test"; a single file is taken as it is.

    Raises:
      FileNotFoundError: there is nothing there; names the public source.
      ValueError: the content is not of the form, with the path and the entry.
    """
    if hub.is_name(path):
        name = str(path)
        return _dataset(name, _hub_entries(name, hub.load(name, split, _HUB_SPLITS, SOURCE, config=_HUB_CONFIG)))
    file = find(path, split, _FILES, SOURCE)
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError(f'{file}: not of the form {{"entries": [...]}}; {SOURCE}')
    return _dataset(file, (_entry(file, number, entry) for number, entry in enumerate(content["entries"], 1)))


def _entry(file: Path, number: int, entry: Any) -> Entry:
    """One of the file's, {"1": {...}}; they are numbered from 1."""
    try:
        (fields,) = entry.values()
        triples = [" : ".join((t["subject"], t["property"], t["object"])) for t in fields["modifiedtripleset"]]
        texts = [text["lex"] for text in fields["lexicalisations"] if text["comment"] == "good"]
        category = fields["category"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file}: entry {number} is not of the form {{"{number}": {{"category", "modifiedtripleset", '
            f'"lexicalisations", ...}}}} of the 2017 challenge: {error!r}'
        ) from error
    if not triples or not all(isinstance(value, str) for value in (*texts, category)):
        raise ValueError(f"{file}: entry {number} has no triple, or something else where a text belongs")
    return triples, texts, category


def _hub_entries(name: str, data: datasets.Dataset) -> Iterable[Entry]:
    if not set(data.column_names) >= _HUB_COLUMNS:
        raise ValueError(f"{name}: the columns {sorted(_HUB_COLUMNS)} are wanted; it has {data.column_names}")
    for row in data:
        # its test split also holds the same test data without texts, and the unseen ones once more
        if row.get("test_category") in (None, "", "testdata_with_lex"):
            lex = zip(row["lex"]["text"], row["lex"]["comment"], strict=True)
            triples = [triple.replace(" | ", " : ") for triple in row["modified_triple_sets"]["mtriple_set"][0]]
            yield triples, [text for text, comment in lex if comment == "good"], row["category"]


def _dataset(source: str | Path, entries: Iterable[Entry]) -> datasets.Dataset:
    rows = [
        {
            "context": " | ".join(triples),
            "completion": text,
            "category": category,
            "seen": category in SEEN,
        }
        for triples, texts, category in entries
        for text in texts
    ]
    if not rows:
        raise ValueError(f'{source}: no entry has a text commented "good"')
    return datasets.Dataset.from_list(rows)
