"""DART 1.1.1: say the facts of a set of triples from tables of many domains (paper, Table 13).

Read are the official JSON files, prepared as the authors do (microsoft/LoRA, examples/NLG,
format_converting_dart.py).
"""

from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data.files import find, read_json
from lora_jax.data.pairs import contexts

with extra("data"):
    import datasets

SOURCE = "the JSON files are public at github.com/Yale-LILY/dart (data/v1.1.1)"

_FILES = {
    split: (f"dart-v1.1.1-full-{name}.json",)
    for split, name in {"train": "train", "valid": "dev", "test": "test"}.items()
}
_HELD_OUT = 0.1
_SEED = 0


def load(path: str | Path, split: str = "train") -> datasets.Dataset:
    """The pairs of a split, with the columns `context` and `completion`.

    A context is an entry's triples, "subject : relation : object" joined by " | ", the relation lower-cased. Every
    annotation is a pair; one of the test set has no text and stands with an empty one.

    Args:
      path: a folder that holds dart-v1.1.1-full-train, -dev and -test.json (also .gz), or one file.
      split: "train", "valid" or "test"; a single file is taken as it is.

    Raises:
      FileNotFoundError: there is nothing there; names the public source.
      ValueError: the content is not of the form, with the path and the entry.
    """
    file = find(path, split, _FILES, SOURCE)
    content = read_json(file)
    if not isinstance(content, list):
        raise ValueError(f'{file}: not a list of {{"tripleset", "annotations"}}; {SOURCE}')
    rows = [row for number, entry in enumerate(content) for row in _entry(file, number, entry)]
    if not rows:
        raise ValueError(f"{file}: no entry has an annotation")
    return datasets.Dataset.from_list(rows)


def load_dev(path: str | Path, split: str = "train") -> datasets.Dataset:
    """As `load` of a folder, but training and validation pairs are both of the dev file: a stand-in where the train
    file is not at hand. What is trained on it does not compare with the paper.

    The contexts are parted, by a fixed seed, 90 to 10; no context is in both parts. "test" is the test file.
    """
    if Path(path).is_file():
        raise ValueError(f"{path}: a file; the folder of the dev and the test file is wanted")
    if split not in ("train", "valid"):
        return load(path, split)
    pairs = load(path, "valid")
    names = np.array(list(contexts(pairs)), object)
    order = np.random.default_rng(_SEED).permutation(len(names))
    held_out = set(names[order[: round(_HELD_OUT * len(names))]])
    return pairs.select(
        [row for row, context in enumerate(pairs["context"]) if (context in held_out) == (split == "valid")]
    )


def _entry(file: Path, number: int, entry: Any) -> list[dict[str, str]]:
    try:
        triples = [" : ".join((head, relation.lower(), tail)) for head, relation, tail in entry["tripleset"]]
        texts = [annotation["text"] for annotation in entry["annotations"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file}: entry {number} (counted from 0) is not of the form {{"tripleset": [[subject, relation, object], '
            f'...], "annotations": [{{"text"}}, ...]}}: {error!r}'
        ) from error
    if not triples or not all(isinstance(text, str | None) for text in texts):
        raise ValueError(
            f"{file}: entry {number} (counted from 0) has no triple, or something else where a text belongs"
        )
    return [{"context": " | ".join(triples), "completion": text or ""} for text in texts]
