"""Where data come from: local files of text and JSON, plain or gzip, and the datasets of the Hugging Face Hub."""

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.extras import extra
from lora_jax.data.json_files import parse_json

with extra("data"):
    import datasets


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, unzipped where its name ends in `.gz`; line ends are kept as they are.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, cut short, or no UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable UTF-8 file: {error}") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def read_lines(path: str | Path) -> list[str]:
    """The lines of `read_text`. Only a line feed (with a carriage return) ends one: texts hold other characters that
    `str.splitlines` takes for ends."""
    return read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds.

    Raises:
      FileNotFoundError, ValueError: as for `read_text`, or it is no JSON.
    """
    text = read_text(path)
    try:
        return json_value(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def json_value(text: str) -> Any:
    """The value of a JSON text; a ValueError where it is no JSON, or a string in it is no Unicode."""
    value = parse_json(text.encode(), strict=False)
    if "\\u" in text:  # half a surrogate pair can be written so
        json.dumps(value, ensure_ascii=False).encode()
    return value


@contextlib.contextmanager
def of_form(message: str) -> Iterator[None]:
    """Around reading an entry: what it lacks, or has of another type, is a ValueError with this message."""
    try:
        yield
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{message}: {error!r}") from error


def find(path: str | Path, split: str, names: Mapping[str, Sequence[str]], source: str) -> Path:
    """The file of a split: `path` itself where it is a file, else the first of the split's `names`, each also with
    `.gz`, that the folder `path` has. `source`, where the data can be had, is for the errors.

    Raises:
      FileNotFoundError: there is no such path, or the folder has none of the names.
      ValueError: another split.
    """
    path = Path(path)
    _check_split(split, names)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; {source}")
    tried = [name + end for name in names[split] for end in ("", ".gz")]
    files = [path / name for name in tried if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{path}: holds none of {', '.join(tried)}; {source}")
    return files[0]


def is_hub_name(path: str | Path) -> bool:
    """`owner/name`; not a path that exists, nor `folder/name` with a folder that exists, which is a misspelt path."""
    if Path(path).exists() or not re.fullmatch(r"\w[\w-]*/\w[\w-]*", str(path)):
        return False
    return not Path(str(path).partition("/")[0]).is_dir()


def load_from_hub(
    name: str | Path, split: str, splits: Mapping[str, str], source: str, config: str | None = None
) -> datasets.Dataset:
    """A split of a dataset, of a configuration where it has several. `splits`: how the dataset calls each split.

    Raises:
      FileNotFoundError: it is not to be had (no such name, no network, a dataset that is a script); names the source.
      ValueError: another split.
    """
    _check_split(split, splits)
    try:
        return datasets.load_dataset(str(name), config, split=splits[split])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(f"{name}: no such file or folder, nor on the hub ({error}); {source}") from error


def _check_split(split: str, splits: Mapping[str, Any]) -> None:
    if split not in splits:
        raise ValueError(f"split {split!r}: one of {', '.join(splits)}")


def check_unicode(texts: Iterable[str], what: str) -> None:
    """A ValueError for a text with half of a surrogate pair, which JSON can give (`"\\ud83d"`) and a command line, but
    no text in UTF-8; `what` the texts are."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!r}, half of a surrogate pair, at character {error.start}"
            raise ValueError(f"{what} {number} (counted from 0) has {half}: {text[:80]!r}") from None
