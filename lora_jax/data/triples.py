"""WebNLG 2017 and DART 1.1.1: say the facts of a set of triples (paper, Tables 14 and 13).

Read are their JSON files, prepared as the authors do (microsoft/LoRA, examples/NLG, format_converting_webnlg.py and
format_converting_dart.py), or WebNLG of the Hugging Face hub.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data.files import find, is_hub_name, load_from_hub, of_form, read_json
from lora_jax.data.pairs import contexts

with extra("data"):
    import datasets

WEBNLG = (
    "the JSON files are public at github.com/microsoft/LoRA (examples/NLG/data/webnlg_challenge_2017), the challenge "
    "at gitlab.com/shimorina/webnlg-dataset"
)
DART = "the JSON files are public at github.com/Yale-LILY/dart (data/v1.1.1)"

# The categories of WebNLG's training data: ten in the authors' code and data, nine in the paper's text.
SEEN = frozenset(
    "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam University WrittenWork".split()
)

_HUB_COLUMNS = {"category", "modified_triple_sets", "lex"}
_SPLITS = {"train": "train", "valid": "dev", "test": "test"}
_WEBNLG_FILES = {split: (f"{name}.json",) for split, name in _SPLITS.items()}
_DART_FILES = {split: (f"dart-v1.1.1-full-{name}.json",) for split, name in _SPLITS.items()}

Entry = tuple[list[str], list[str], str]  # triples, the good texts, category


def webnlg(path: str | Path, split: str = "train") -> datasets.Dataset:
    """The pairs of a split, with the columns `context`, `completion`, `category` and `seen` (whether that is a category
    of the training data: S and U of the paper's Table 14).

    A context is an entry's modified triples, "subject : property : object" joined by " | ", in their own spelling. Each
    text commented "good" is a pair; an entry without one is left out (5 of train, 1 of dev).

    The split, "train", "valid" or "test", is that of a folder that holds train, dev and test.json (also .gz), or of a
    dataset on the hub (`owner/name`) with the columns of web_nlg's configuration webnlg_challenge_2017 (web_nlg itself
    is a script, which the package `datasets` no longer runs); a single file is taken as it is.

    Raises:
      FileNotFoundError: there is nothing there; names the public source.
      ValueError: the content is not of the form, with the path and the entry.
    """
    if is_hub_name(path):
        source: str | Path = path
        entries = _hub_entries(path, load_from_hub(path, split, _SPLITS, WEBNLG, "webnlg_challenge_2017"))
    else:
        source = file = find(path, split, _WEBNLG_FILES, WEBNLG)
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
            raise ValueError(f'{file}: not of the form {{"entries": [...]}}; {WEBNLG}')
        entries = (_webnlg_entry(file, number, entry) for number, entry in enumerate(content["entries"], 1))
    rows = [
        {"context": " | ".join(triples), "completion": text, "category": category, "seen": category in SEEN}
        for triples, texts, category in entries
        for text in texts
    ]
    if not rows:
        raise ValueError(f'{source}: no entry has a text commented "good"')
    return datasets.Dataset.from_list(rows)


def dart(path: str | Path, split: str = "train") -> datasets.Dataset:
    """The pairs of a split, with the columns `context` and `completion`.

    A context is an entry's triples, "subject : relation : object" joined by " | ", the relation lower-cased. Every
    annotation is a pair; one of the test set has no text and stands with an empty one. The folder holds
    dart-v1.1.1-full-train, -dev and -test.json (also .gz); one file and errors are as for `webnlg`.
    """
    file = find(path, split, _DART_FILES, DART)
    content = read_json(file)
    if not isinstance(content, list):
        raise ValueError(f'{file}: not a list of {{"tripleset", "annotations"}}; {DART}')
    rows = [row for number, entry in enumerate(content) for row in _dart_rows(file, number, entry)]
    if not rows:
        raise ValueError(f"{file}: no entry has an annotation")
    return datasets.Dataset.from_list(rows)


def dart_dev(path: str | Path, split: str = "train") -> datasets.Dataset:
    """As `dart` of a folder, but training and validation pairs are both of the dev file: a stand-in where the train
    file is not at hand. What is trained on it does not compare with the paper.

    The contexts are parted, by a fixed seed, 90 to 10; no context is in both parts. "test" is the test file.
    """
    if Path(path).is_file():
        raise ValueError(f"{path}: a file; the folder of the dev and the test file is wanted")
    if split not in ("train", "valid"):
        return dart(path, split)
    pairs = dart(path, "valid")
    names = np.array(list(contexts(pairs)), object)
    order = np.random.default_rng(0).permutation(len(names))
    held_out = set(names[order[: round(0.1 * len(names))]])
    rows = [row for row, context in enumerate(pairs["context"]) if (context in held_out) == (split == "valid")]
    return pairs.select(rows)


def _webnlg_entry(file: Path, number: int, entry: Any) -> Entry:
    """One of the file's, {"1": {...}}; they are numbered from 1."""
    form = f'{{"{number}": {{"category", "modifiedtripleset", "lexicalisations", ...}}}} of the 2017 challenge'
    with of_form(f"{file}: entry {number} is not of the form {form}"):
        (fields,) = entry.values()
        triples = [" : ".join((t["subject"], t["property"], t["object"])) for t in fields["modifiedtripleset"]]
        texts = [text["lex"] for text in fields["lexicalisations"] if text["comment"] == "good"]
        category = fields["category"]
    if not triples or not all(isinstance(value, str) for value in (*texts, category)):
        raise ValueError(f"{file}: entry {number} has no triple, or something else where a text belongs")
    return triples, texts, category


def _hub_entries(name: str | Path, data: datasets.Dataset) -> Iterable[Entry]:
    if not set(data.column_names) >= _HUB_COLUMNS:
        raise ValueError(f"{name}: the columns {sorted(_HUB_COLUMNS)} are wanted; it has {data.column_names}")
    for row in data:
        # its test split also holds the same test data without texts, and the unseen ones once more
        if row.get("test_category") in (None, "", "testdata_with_lex"):
            lex = zip(row["lex"]["text"], row["lex"]["comment"], strict=True)
            triples = [triple.replace(" | ", " : ") for triple in row["modified_triple_sets"]["mtriple_set"][0]]
            yield triples, [text for text, comment in lex if comment == "good"], row["category"]


def _dart_rows(file: Path, number: int, entry: Any) -> list[dict[str, str]]:
    where = f"{file}: entry {number} (counted from 0)"
    form = '{"tripleset": [[subject, relation, object], ...], "annotations": [{"text"}, ...]}'
    with of_form(f"{where} is not of the form {form}"):
        triples = [" : ".join((head, relation.lower(), tail)) for head, relation, tail in entry["tripleset"]]
        texts = [annotation["text"] for annotation in entry["annotations"]]
    if not triples or not all(isinstance(text, str | None) for text in texts):
        raise ValueError(f"{where} has no triple, or something else where a text belongs")
    return [{"context": " | ".join(triples), "completion": text or ""} for text in texts]
