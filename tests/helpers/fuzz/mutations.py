"""Ways to spoil a file: bytes of any, values of JSON, headers of safetensors."""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Files = dict[str, Any]  # bytes by their paths in a folder; None is a folder there

DEEP = "[" * 20_000 + "]" * 20_000
# What is put in the place of a value: JSON, or (from a string that begins with NUL) raw text.
VALUES: list[Any] = [0, 1, -1, 2, 3, 16, 10**9, 10**30, 0.5, 1e300, "", "x", "3", "false", "\ud800", "a" * 100_000]
VALUES += [True, False, None, [], {}, [[]], ["x"], [1, 2], {"a": 1}, "gelu", "F16", "F8_E4M3", "lora", "**", "../x"]
VALUES += ["\0NaN", "\0-Infinity", "\x001e400", "\0" + "9" * 5000, "\0" + DEEP, "\0" + '{"a":' * 300 + "1" + "}" * 300]
VALUES += ["\0{", "\0", "\0'x'", "\0\xff", [0] * 50, -(2**63), 2**64]


def flip(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.randrange(1, 4)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, content: bytearray) -> None:
    del content[rng.randrange(len(content)) :]


def take_out(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content))
    del content[at : at + rng.choice([1, 2, 4, 16])]


def insert(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = rng.choice([b"\0", b"{", b"}", b"[", b'"', b",", b"1", b"-", b"\xff", b"\n", rng.randbytes(8)])


def repeat(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content))
    content[at:at] = content[at : at + rng.choice([1, 8, 64, 1000])]


def zero(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content))
    part = content[at : at + rng.choice([1, 4, 64])]
    content[at : at + len(part)] = bytes(len(part))


def overwrite(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content))
    part = rng.randbytes(rng.choice([1, 2, 4, 8]))[: len(content) - at]
    content[at : at + len(part)] = part


BYTES = [flip, flip, cut, take_out, insert, repeat, zero, overwrite]


def spoil_bytes(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    if changed:
        rng.choice(BYTES)(rng, changed)
    return bytes(changed)


def spoil_json(rng: random.Random, content: bytes) -> bytes:
    """One or two changes of keys and values anywhere in a JSON object or list."""
    value = json.loads(content)
    raw: dict[str, str] = {}
    for _ in range(rng.choice([1, 1, 1, 2])):
        _change_node(rng, value, raw)
    text = json.dumps(value)
    for marker, replacement in raw.items():
        text = text.replace(json.dumps(marker), replacement)
    return text.encode(errors="surrogateescape")


def _change_node(rng: random.Random, value: Any, raw: dict[str, str]) -> None:
    nodes = [(container, key) for container in _containers(value) for key in _keys(container)]
    if not nodes:
        return
    container, key = rng.choice(nodes)
    how = rng.choice(["drop", "replace", "replace", "replace", "nudge", "nudge", "rename", "twice", "wrap", "swap"])
    old = container[key]
    if how == "drop":
        del container[key]
    elif how == "nudge" and type(old) in (int, float):
        container[key] = rng.choice([old + 1, old - 1, 2 * old, -old, float(old), str(old), old + 4, [old], 1 - old])
    elif how == "nudge" and isinstance(old, str) and old:
        container[key] = rng.choice([old[:-1], old + "x", old.upper(), [old], old[::-1], " " + old])
    elif how == "rename" and isinstance(container, dict):
        container[rng.choice([key.upper(), key + "_", key[:-1], "", "__metadata__"])] = container.pop(key)
    elif how == "twice" and isinstance(container, dict):
        marker = f"\0twice{len(raw)}"
        container[marker] = rng.choice([old, 1, None, "x"])
        raw[marker] = json.dumps(key)
    elif how == "wrap":
        container[key] = rng.choice([[old], {"a": old}])
    elif how == "swap":
        other, name = rng.choice(nodes)
        container[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(old)
    else:
        container[key] = new = copy.deepcopy(rng.choice(VALUES))
        if isinstance(new, str) and new.startswith("\0"):
            raw[f"\0raw{len(raw)}"] = new[1:]
            container[key] = f"\0raw{len(raw) - 1}"


def _containers(value: Any) -> list[Any]:
    listed = [value] if isinstance(value, dict | list) else []
    for one in listed:
        listed += [part for part in (one.values() if isinstance(one, dict) else one) if isinstance(part, dict | list)]
        if len(listed) > 300:
            break
    return listed


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def header_of(content: bytes) -> tuple[bytes, bytes]:
    """The header, as it is, and the data of a safetensors file."""
    size = struct.unpack("<Q", content[:8])[0]
    return content[8 : 8 + size], content[8 + size :]


def packed(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def spoil_safetensors(rng: random.Random, content: bytes) -> bytes:
    """The header's JSON, with its length kept right or not, or the data."""
    header, data = header_of(content)
    how = rng.random()
    if how < 0.6:
        return packed(spoil_json(rng, header), data)
    if how < 0.7:
        size = rng.choice([0, 1, 8, 2**63, 2**64 - 1, 100_000_001, len(header) - 1, len(header) + 1])
        return packed(header, data, size)
    if how < 0.9:
        at = 4 * rng.randrange(len(data) // 4)
        bad = rng.choice([float("nan"), float("inf"), -float("inf"), 1e30, 0.0, 1.5])
        return packed(header, data[:at] + struct.pack("<f", bad) + data[at + 4 :])
    return packed(spoil_bytes(rng, header), data)


def spoil_lines(rng: random.Random, content: bytes) -> bytes:
    """Lines of JSON: one of them, or their order."""
    lines = content.split(b"\n")
    at, other = (rng.randrange(len(lines)) for _ in range(2))
    if lines[at][:1] in (b"{", b"[") and rng.random() < 0.7:
        lines[at] = spoil_json(rng, lines[at])
    else:
        how = rng.randrange(4)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(other, lines[at])
        elif how == 2:
            lines[at], lines[other] = lines[other], lines[at]
        else:
            lines[at] = rng.choice([b"", b"{}", b"[]", b"null", b"\xff", b"\0", b"a\tb", b"||", b" " * 1000])
    return b"\n".join(lines)


BY_END: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".safetensors": spoil_safetensors,
    ".json": spoil_json,
    "/metadata": spoil_json,
    ".jsonl": spoil_lines,
    ".txt": spoil_lines,
    ".tsv": spoil_lines,
}


def spoil(rng: random.Random, files: Files) -> Files:
    """The files, one of them (rarely two) spoiled in one way, made empty, put in another's place, or gone."""
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 1, 2])):
        name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
        content, how = files[name] or b"", rng.random()
        structural = next((change for end, change in BY_END.items() if name.endswith(end)), None)
        if how < 0.55 and structural:
            try:
                files[name] = structural(rng, content)
            except (ValueError, IndexError, RecursionError, struct.error):  # it was spoiled already
                files[name] = spoil_bytes(rng, content)
        elif how < 0.93:
            files[name] = spoil_bytes(rng, content)
        elif how < 0.97:
            at = rng.randrange(len(content) + 1)
            files[name] = content[:at] + (files[other] or b"")[rng.randrange(len(content) + 1) :]
        elif how < 0.99:
            files[name] = rng.choice([b"", None])
        elif len(files) > 1:
            del files[name]
    return files
