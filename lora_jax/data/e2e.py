"""The E2E NLG challenge: describe a restaurant from its attributes (paper, Table 3).

Three forms of the data are read: the authors' lines `context||completion`, the official csv
(columns `mr` and `ref`, converted to the authors' contexts) and a dataset of the Hugging Face hub.
Completions are left as they stand: the authors' files are tokenized (`isn 't`), the official are
not.
"""

import csv
import io
import re
from pathlib import Path

from lora_jax.core.extras import extra
from lora_jax.data import hub
from lora_jax.data.files import find, read_text
from lora_jax.data.pairs import Encoded, contexts, encode, prompts

with extra("data"):
    import datasets

__all__ = ["SOURCE", "Encoded", "context", "contexts", "encode", "load", "prompts"]

SOURCE = (
    "the official csv files are public at github.com/tuetschek/e2e-dataset, the authors' lines at "
    "github.com/microsoft/LoRA (examples/NLG/data/e2e)"
)

_FILES = {
    "train": ("train.txt", "train.csv", "trainset.csv"),
    "valid": ("valid.txt", "valid.csv", "devset.csv"),
    "test": ("test.txt", "test.csv", "testset_w_refs.csv"),
}
_HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_SLOTS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_SLOT = re.compile(r"\s*([^\[\],]+?)\s*\[([^\[\]]*)\]\s*(?:,|$)")


def load(path: str | Path, split: str = "train") -> datasets.Dataset:
    """The pairs of a split, as a dataset with the columns `context` and `completion`.

    Local files are read into memory; nothing is cached and no network is used.

    Args:
      path: a folder that holds train, valid and test in any of the local forms, one file, or the
          name of a dataset on the hub (`owner/name`).
      split: "train", "valid" or "test"; a single file is taken as it is.

    Raises:
      FileNotFoundError: there is nothing there; names the public source.
      ValueError: the content is not of the form, with the path and the line.
    """
    if hub.is_name(path):
        return _from_columns(str(path), hub.load(str(path), split, _HUB_SPLITS, SOURCE))
    file = find(path, split, _FILES, SOURCE)
    text = read_text(file)
    rows = _csv_rows(file, text) if ".csv" in file.suffixes else _lines(file, text)
    return datasets.Dataset.from_dict({"context": [row[0] for row in rows], "completion": [row[1] for row in rows]})


def context(meaning: str) -> str:
    """The authors' form of an official meaning representation.

    >>> context("name[Blue Spice], eatType[coffee shop], priceRange[less than £20]")
    'name : Blue Spice | Type : coffee shop | price : less than £ 20'
    """
    slots = []
    end = 0
    while end < len(meaning) and (slot := _SLOT.match(meaning, end)):
        name, value = slot.groups()
        value = re.sub(r"(?<=\d)-(?=\d)", " - ", re.sub(r"£(?=\d)", "£ ", value))
        slots.append(f"{_SLOTS.get(name, name)} : {value}")
        end = slot.end()
    if not slots or end < len(meaning):
        raise ValueError(f"not of the form name[value], ...: {meaning!r}")
    return " | ".join(slots)


def _lines(path: Path, text: str) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        parts = tuple(part.strip() for part in line.split("||"))
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{path}:{number}: not a line `context||completion`: {line[:80]!r}")
        rows.append((parts[0], parts[1]))
    return rows


def _csv_rows(path: Path, text: str) -> list[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"mr", "ref"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{path}: the columns mr and ref are wanted, it has {reader.fieldnames}")
    rows = []
    for row in reader:
        try:
            if not row["ref"]:
                raise ValueError("no text in the column ref")
            # two official texts are broken over lines
            rows.append((context(row["mr"]), " ".join(row["ref"].split())))
        except ValueError as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: the file is empty but for its header")
    return rows


def _from_columns(name: str, data: datasets.Dataset) -> datasets.Dataset:
    """The hub's copies name the csv's columns in two ways."""
    for meaning, text in (("mr", "ref"), ("meaning_representation", "human_reference")):
        if {meaning, text} <= set(data.column_names):
            return datasets.Dataset.from_dict(
                {
                    "context": [context(value) for value in data[meaning]],
                    "completion": [" ".join(value.split()) for value in data[text]],
                }
            )
    raise ValueError(
        f"{name}: the columns mr and ref, or meaning_representation and human_reference, are "
        f"wanted; it has {data.column_names}"
    )
