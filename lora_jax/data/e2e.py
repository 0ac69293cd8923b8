"""The E2E NLG challenge: describe a restaurant from its attributes (paper, Table 3).

Three forms of the data are read: the authors' lines `context||completion`, the official csv (columns `mr` and `ref`,
converted to the authors' contexts) and a dataset of the Hugging Face hub. Completions are left as they stand: the
authors' files are tokenized (`isn 't`), the official are not.
"""

import csv
import io
import re
from pathlib import Path

from lora_jax.core.extras import extra
from lora_jax.data.files import find, is_hub_name, load_from_hub, read_lines, read_text

with extra("data"):
    import datasets

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
    """The pairs of a split ("train", "valid" or "test"), with the columns `context` and `completion`: of a folder that
    holds them in any of the local forms, of one file, whatever the split, or of a dataset on the hub (`owner/name`).

    Raises:
      FileNotFoundError: there is nothing there; names the public source.
      ValueError: the content is not of the form, with the path and the line.
    """
    if is_hub_name(path):
        rows = _hub_rows(path, load_from_hub(path, split, _HUB_SPLITS, SOURCE))
    else:
        file = find(path, split, _FILES, SOURCE)
        rows = _csv_rows(file) if ".csv" in file.suffixes else _line_rows(file)
    return datasets.Dataset.from_list(rows)


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


def _line_rows(path: Path) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        parts = [part.strip() for part in line.split("||")]
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{path}:{number}: not a line `context||completion`: {line[:80]!r}")
        rows.append({"context": parts[0], "completion": parts[1]})
    return rows


def _csv_rows(path: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if not {"mr", "ref"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{path}: the columns mr and ref are wanted, it has {reader.fieldnames}")
    rows = []
    for row in reader:
        try:
            if not row["ref"]:
                raise ValueError("no text in the column ref")
            rows.append(_row(row["mr"], row["ref"]))
        except ValueError as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: the file is empty but for its header")
    return rows


def _hub_rows(name: str | Path, data: datasets.Dataset) -> list[dict[str, str]]:
    """The hub's copies name the csv's columns in two ways."""
    for columns in (("mr", "ref"), ("meaning_representation", "human_reference")):
        if set(columns) <= set(data.column_names):
            return [_row(*values) for values in zip(*(data[column] for column in columns), strict=True)]
    wanted = "mr and ref, or meaning_representation and human_reference,"
    raise ValueError(f"{name}: the columns {wanted} are wanted; it has {data.column_names}")


def _row(meaning: str, text: str) -> dict[str, str]:
    return {"context": context(meaning), "completion": " ".join(text.split())}  # official texts are broken over lines
