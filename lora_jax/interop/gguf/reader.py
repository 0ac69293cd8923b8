"""The container: metadata and the table of tensors of a GGUF file, read strictly and without the tensors.

The `gguf` package's own reader takes 20 times as long for a vocabulary, and reads past the end of a file that is cut
off; its tables of types and its dequantization are used.
"""

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.extras import extra

with extra("hf"):
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")  # of tensors
_TYPE_NAMES = {member.value: member.name for member in GGMLQuantizationType}
_VERSIONS = (2, 3)
_NUMBERS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


class Entry(NamedTuple):
    """A tensor of the file."""

    shape: tuple[int, ...]  # the last axis is the fastest
    type: str  # one of TYPES
    start: int  # in bytes, from the file's beginning
    row_bytes: int  # of one row of the last axis


class Contents(NamedTuple):
    """What a file holds."""

    metadata: dict[str, Any]  # arrays of numbers as numpy arrays, of strings as lists
    tensors: dict[str, Entry]


def read_contents(path: Path) -> Contents:
    """Metadata and tensors of a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no GGUF file, cut off, damaged, big-endian, or one of several parts; a tensor is of another type
        than TYPES.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(path, data, size).contents()
            except UnicodeDecodeError as error:
                raise damaged(path, f"a text is not UTF-8: {error}") from error


def damaged(path: Path, why: Any) -> ValueError:
    """The error of a file that is not what its writer wrote."""
    return ValueError(f"{path} is cut off or damaged ({why}): fetch it again")


class _Reader:
    """One pass through the header."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 4

    def contents(self) -> Contents:
        version = self.number("<u4")
        if not version & 0xFFFF:
            raise ValueError(
                f"{self.path} is a big-endian GGUF file; convert it to little-endian (gguf-convert-endian)"
            )
        if version not in _VERSIONS:
            raise ValueError(
                f"{self.path} is GGUF version {version}; versions 2 and 3 are read: convert the model again"
            )
        count, pairs = self.number("<u8"), self.number("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.text("a key")
            if key in metadata:
                raise damaged(self.path, f"{key} is there twice")
            metadata[key] = self.value(key, self.number("<u4"))
        if (parts := metadata.get("split.count", 0)) > 1:
            raise ValueError(f"{self.path} is one of {parts} parts; join them with llama-gguf-split --merge")
        table = [self.entry() for _ in range(count)]
        return Contents(metadata, self.placed(table, metadata.get("general.alignment", 32)))

    def bytes(self, length: int, what: str) -> bytes:
        """The next bytes of the file."""
        start, self.at = self.at, self.at + length
        if self.at > self.size:
            raise damaged(self.path, f"{what} ends at byte {self.at}, the file at {self.size}")
        return self.data[start : self.at]

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.bytes(dtype.itemsize, "the header"), dtype)[0].item()

    def text(self, what: str) -> str:
        return self.bytes(self.number("<u8"), what).decode()

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY:
            return self.number(self.numbers(key, kind))
        kind, count = self.number("<u4"), self.number("<u8")
        if kind != _STRING:
            dtype = np.dtype(self.numbers(key, kind))
            return np.frombuffer(self.bytes(count * dtype.itemsize, key), dtype)
        unpack, data, at, texts = struct.Struct("<Q").unpack_from, self.data, self.at, []
        for _ in range(count):  # a vocabulary: 100,000 short texts
            if at + 8 > self.size or (end := at + 8 + unpack(data, at)[0]) > self.size:
                raise damaged(self.path, f"{key} ends behind byte {at}, the file at {self.size}")
            texts.append(data[at + 8 : end].decode())
            at = end
        self.at = at
        return texts

    def numbers(self, key: str, kind: int) -> str:
        if kind not in _NUMBERS:
            raise damaged(self.path, f"{key} is of type {kind}, which GGUF does not have, or an array of arrays")
        return _NUMBERS[kind]

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text("the name of a tensor")
        axes = self.number("<u4")
        if not 1 <= axes <= 4:
            raise damaged(self.path, f"{name} has {axes} axes")
        shape = tuple(self.number("<u8") for _ in range(axes))[::-1]
        return name, shape, self.number("<u4"), self.number("<u8")

    def placed(self, table: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, Entry]:
        """The tensors by name, each within the file and apart from the others."""
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise damaged(self.path, f"general.alignment is {alignment!r}, not a power of two")
        begin, end = -(-self.at // alignment) * alignment, 0
        tensors: dict[str, Entry] = {}
        for name, shape, kind, offset in sorted(table, key=lambda row: row[3]):
            if name in tensors:
                raise damaged(self.path, f"{name} is there twice")
            tensors[name] = entry = self.typed(name, shape, kind, begin + offset)
            last = entry.start + math.prod(shape[:-1]) * entry.row_bytes
            if offset % alignment or entry.start < end:
                raise damaged(self.path, f"{name} begins at byte {entry.start}, within another tensor or not aligned")
            if last > self.size:
                raise damaged(self.path, f"{name} ends at byte {last}, the file at {self.size}")
            end = last
        return tensors

    def typed(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> Entry:
        type_name = _TYPE_NAMES.get(kind, str(kind))
        if type_name not in TYPES:
            raise ValueError(
                f"{self.path}: {name} is of type {type_name}; {', '.join(TYPES)} are read: quantize the model anew "
                "(llama-quantize)"
            )
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
        if 0 in shape or shape[-1] % per_block:
            raise damaged(self.path, f"{name} has shape {shape}, but {type_name} is in blocks of {per_block}")
        return Entry(shape, type_name, start, shape[-1] // per_block * block_bytes)
