"""JSON of unknown origin, read strictly and in bounded time and memory: a file is valid as a whole, or an error names
it."""

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

LARGEST = 16 << 20  # bytes; the headers of models with 100,000 tensors are smaller
DEEPEST = 100  # arrays and objects in one another

_NO_BRACKETS = bytes(set(range(256)) - set(b'"[]{}'))


def parse_json(data: bytes, *, strict: bool = True) -> Any:
    """A value from JSON in UTF-8, nested at most DEEPEST deep. All else is a ValueError.

    Args:
      strict: as RFC 8259 defines it: no NaN, no infinities, no key twice. Without it as Python's `json` reads: what
        this library wrote itself may hold a NaN.
    """
    # Before the parser, which recurses; few brackets, as in most files, are not nested deep.
    if data.count(b"[") + data.count(b"{") > DEEPEST and (depth := _depth(data)) > DEEPEST:
        raise ValueError(f"nested {depth} deep, more than {DEEPEST}")
    if not strict:
        return json.loads(data.decode())
    return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)


def read_json(path: str | os.PathLike, *, strict: bool = True, largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object that a file holds, as `parse_json` reads it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is larger than `largest` bytes, cut off, or holds no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path} is no JSON that is read here: {size} bytes, more than {largest}")
    try:
        value = parse_json(path.read_bytes(), strict=strict)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): is it cut off?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _depth(data: bytes) -> int:
    """How deeply arrays and objects are nested, up to where the text ends or is no JSON any more."""
    if b"\\" in data:
        data = re.sub(rb"\\.", b"", data, flags=re.DOTALL)
    outside_strings = b"".join(data.translate(None, delete=_NO_BRACKETS).split(b'"')[::2])
    brackets = np.frombuffer(outside_strings, np.uint8)
    return int(np.cumsum(np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)).max(initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return dict(pairs)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits} is no number of JSON, or too large to be held")
    return number
