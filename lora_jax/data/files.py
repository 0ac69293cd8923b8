"""Local files: text and JSON, plain or gzip, and the file of a split."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, unzipped where its name ends in `.gz`; line ends are kept as they
    are.

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
    except (EOFError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable UTF-8 file: {error}") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds.

    Raises:
      FileNotFoundError, ValueError: as for `read_text`, or it is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def find(path: str | Path, split: str, names: Mapping[str, Sequence[str]], source: str) -> Path:
    """The file of a split.

    Args:
      path: a folder, or a file, which is taken as it is.
      split: a key of `names`.
      names: the file names of each split, tried in this order, each also with `.gz`.
      source: where the data can be had, for the errors.

    Raises:
      FileNotFoundError: there is no such path, or the folder has none of the names.
      ValueError: another split.
    """
    path = Path(path)
    if split not in names:
        raise ValueError(f"split {split!r}: one of {', '.join(names)}")
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; {source}")
    tried = [name + end for name in names[split] for end in ("", ".gz")]
    files = [path / name for name in tried if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{path}: holds none of {', '.join(tried)}; {source}")
    return files[0]
