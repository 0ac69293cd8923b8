"""Text files, plain or gzip."""

import gzip
from pathlib import Path


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 file, unzipped where its name ends in `.gz`; line ends are kept as they
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
