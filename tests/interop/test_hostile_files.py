"""Safetensors files that are broken or made to harm (check 24): the library's verdict, or a stricter one."""

import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from lora_jax.interop import tensor_files
from lora_jax.interop.tensor_files import read_file

MIB = 1 << 20


def entry(dtype: str, shape: list, begin: int, end: int, **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


ONE = {"a": entry("F32", [2], 0, 8)}
TEXT = json.dumps(ONE).encode()
TWO = {"a": entry("F32", [1], 0, 4), "b": entry("F16", [2], 4, 8)}


def packed(header, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A file with this header (JSON, or its bytes) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# What both refuse: peft_format 7.1.
BROKEN = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header longer than 100 MB": packed(TEXT, length=100_000_001),
    "header longer than any file": packed(TEXT, length=2**64 - 1),
    "header beyond the end": packed(TEXT, b"", length=len(TEXT) + 1),
    "invalid UTF-8": packed(b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "UTF-16": packed(TEXT.decode().encode("utf-16")),
    "byte order mark": packed(b"\xef\xbb\xbf" + TEXT),
    "half a surrogate": packed(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "list": packed(b"[]"),
    "number": packed(b"3"),
    "null": packed(b"null"),
    "not JSON": packed(b"{a}"),
    "NaN in JSON": packed({"a": entry("F32", [2], 0, 8, x=float("nan"))}),
    "number out of range": packed(TEXT[:-2] + b',"x":1e400}}'),
    "number of 5000 digits": packed(TEXT[:-2] + b',"x":' + b"9" * 5000 + b"}}"),
    "padded with NUL": packed(TEXT + bytes(7)),
    "two values": packed(TEXT + b"{}"),
    "lists nested deeply": packed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "objects nested deeply": packed(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "objects nested too deeply for the library": packed(b'{"__metadata__":' + b'{"a":' * 200 + b"1" + b"}" * 201),
    "entry is a number": packed({"a": 1}),
    "entry is null": packed({"a": None}),
    "no dtype": packed({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "unknown dtype": packed({"a": entry("F31", [2], 0, 8)}),
    "dtype in lower case": packed({"a": entry("f32", [2], 0, 8)}),
    "dtype is a number": packed({"a": entry(32, [2], 0, 8)}),  # type: ignore[arg-type]
    "no shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "shape is a number": packed({"a": entry("F32", 2, 0, 8)}),  # type: ignore[arg-type]
    "negative shape": packed({"a": entry("F32", [-2], 0, 8)}),
    "shape in floats": packed({"a": entry("F32", [2.0], 0, 8)}),
    "shape in booleans": packed({"a": entry("F32", [True, 2], 0, 8)}),
    "shape in strings": packed({"a": entry("F32", ["2"], 0, 8)}),
    "shape overflows": packed({"a": entry("F32", [2**32, 2**32, 2], 0, 8)}),
    "shape beyond 64 bits": packed({"a": entry("F32", [2**64], 0, 8)}),
    "bytes overflow": packed({"a": entry("F32", [2**62], 0, 8)}),
    "fewer bytes than the shape": packed({"a": entry("F32", [3], 0, 8)}),
    "more bytes than the shape": packed({"a": entry("F32", [1], 0, 8)}),
    "no offsets": packed({"a": {"dtype": "F32", "shape": [2]}}),
    "one offset": packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}),
    "negative offset": packed({"a": entry("F32", [2], -8, 0)}),
    "end before begin": packed({"a": entry("F32", [2], 8, 0)}),
    "offset overflows": packed({"a": entry("F32", [2], 2**64 - 8, 2**64)}),
    "first offset is not 0": packed({"a": entry("F32", [2], 4, 12)}, bytes(12)),
    "hole": packed(TWO | {"b": entry("F16", [2], 8, 12)}, bytes(12)),
    "overlap": packed(TWO | {"b": entry("F16", [2], 2, 6)}, bytes(6)),
    "alias": packed(TWO | {"b": entry("F32", [1], 0, 4)}, bytes(4)),
    "data cut off": packed(ONE, bytes(7)),
    "data trailing": packed(ONE, bytes(9)),
    "data without tensors": packed({}, bytes(1)),
    "half a byte": packed({"a": entry("F4", [3], 0, 2)}, bytes(2)),
    "metadata is a list": packed({"__metadata__": [], **ONE}),
    "metadata is a string": packed({"__metadata__": "x", **ONE}),
    "metadata holds a number": packed({"__metadata__": {"x": 1}, **ONE}),
    "metadata holds an object": packed({"__metadata__": {"x": {}}, **ONE}),
    "a key of an entry twice": packed(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
}

# What the library accepts and we do not, each with our reason: the rest of 7.2.
STRICTER = {
    "a tensor twice": (packed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' + TEXT[1:]), "'a' is there"),
    "twice, spelled differently": (packed(b'{"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' + TEXT[1:]),
                                   "'a' is there twice"),
    "a key of the metadata twice": (packed(b'{"__metadata__":{"x":"1","x":"2"},' + TEXT[1:]), "'x' is there twice"),
    "an unknown key of an entry twice": (packed(TEXT[:-2] + b',"x":1,"x":2}}'), "'x' is there twice"),
    "header of more than 16 MiB": (packed(TEXT + b" " * (16 * MIB)), f"a header of {16 * MIB + len(TEXT)} bytes"),
    "entry is a list": (packed(b'{"a":["F32",[2],[0,8]]}'), "the entry of a is no object"),
    "NaN": (packed(ONE, struct.pack("<2f", 1, np.nan)), "a has entries that are not finite"),
    "infinity": (packed(ONE, struct.pack("<2f", -np.inf, 1)), "a has entries that are not finite"),
    "infinity in float16": (packed({"a": entry("F16", [1], 0, 2)}, b"\0\x7c"), "a has entries that are not finite"),
    "boolean": (packed({"a": entry("BOOL", [2], 0, 2)}, b"\2\3"), "a is bool, not float32, float16 or bfloat16"),
    "float64": (packed({"a": entry("F64", [1], 0, 8)}), "a is float64"),
    "complex": (packed({"a": entry("C64", [1], 0, 8)}), "a is complex64"),
    **{kind: (packed({"a": entry(kind, [8 // size], 0, 8)}), f"a is {name}")
       for kind, name, size in [("I8", "int8", 1), ("U8", "uint8", 1), ("I16", "int16", 2), ("U16", "uint16", 2),
                                ("I32", "int32", 4), ("U32", "uint32", 4), ("I64", "int64", 8), ("U64", "uint64", 8)]},
}  # fmt: skip

# What numpy cannot hold, whatever the library says of the header.
NO_ARRAYS = {
    "zero-size, beyond memory": packed({"a": entry("F32", [0, 2**62, 2**62], 0, 0)}, b""),
    "zero-size, beyond 63 bits": packed({"a": entry("F32", [0, 2**63], 0, 0)}, b""),
    "more axes than numpy has": packed({"a": entry("F32", [1] * 100, 0, 4)}, bytes(4)),
    **{kind: packed({"a": entry(kind, [8 * 8 // bits], 0, 8)})
       for kind, bits in [("F8_E4M3", 8), ("F8_E5M2", 8), ("F8_E8M0", 8), ("F4", 4)]},
}  # fmt: skip

# What both accept: 7.2.
SOUND = {
    "plain": packed(ONE),
    "leading spaces": packed(b"  \n" + TEXT),
    "padded with newlines": packed(TEXT + b"\n\n\t "),
    "header of any length": packed(b" " * (7 - len(TEXT) % 8) + TEXT),
    "another field in an entry": packed({"a": entry("F32", [2], 0, 8, x={"y": [1.5, None]})}),
    "metadata is null": packed({"__metadata__": None, **ONE}),
    "metadata is empty": packed({"__metadata__": {}, **ONE}),
    "metadata": packed({"__metadata__": {"format": "pt", "": "\u00e9"}, **ONE}),
    "no tensors": packed({}, b""),
    "scalar": packed({"a": entry("F32", [], 0, 4)}, struct.pack("<f", 3)),
    "zero-size": packed({"a": entry("F32", [0, 3], 0, 0), "b": entry("F32", [2], 0, 8)}),
    "empty name": packed({"": ONE["a"]}),
    "name like a path": packed({"../../x": ONE["a"]}),
    "name with NUL": packed({"a\0b": ONE["a"]}),
    "out of order": packed({"b": TWO["b"], "a": TWO["a"]}, struct.pack("<f2e", 1, 2, 3)),
    "almost 16 MiB of header": packed(TEXT + b" " * (16 * MIB - len(TEXT))),
    "64 axes": packed({"a": entry("F32", [1] * 64, 0, 4)}, bytes(4)),
}


def write(folder: Path, content: bytes) -> Path:
    (folder / "x.safetensors").write_bytes(content)
    return folder / "x.safetensors"


def equal(tensors: dict, expected: dict) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors[name], tensor)


@pytest.mark.parametrize("case", BROKEN)
def test_what_the_library_refuses(tmp_path, case):
    with pytest.raises(SafetensorError):
        safetensors.numpy.load(BROKEN[case])
    with pytest.raises(ValueError, match=r"x.safetensors is cut off or damaged \(.+\): fetch it again"):
        read_file(write(tmp_path, BROKEN[case]))


@pytest.mark.parametrize("case", STRICTER)
def test_where_we_are_stricter(tmp_path, case):
    content, says = STRICTER[case]
    assert safetensors.numpy.load(content)
    with pytest.raises(ValueError, match=f"x.safetensors.*{says}"):
        read_file(write(tmp_path, content))


@pytest.mark.parametrize("case", NO_ARRAYS)
def test_what_numpy_cannot_hold(tmp_path, case):
    with pytest.raises((ValueError, KeyError)):
        safetensors.numpy.load(NO_ARRAYS[case])
    with pytest.raises(ValueError, match=r"x.safetensors(: a is F| is cut off or damaged \(a has shape)"):
        read_file(write(tmp_path, NO_ARRAYS[case]))


@pytest.mark.parametrize("case", SOUND)
def test_what_both_accept(tmp_path, case):
    tensors = read_file(write(tmp_path, SOUND[case]))
    equal(tensors, safetensors.numpy.load(SOUND[case]))


def test_types_stay_and_names_may_be_ignored(tmp_path):
    """numpy has no bfloat16; its bits are the upper half of float32's."""
    header = {"a": entry("BF16", [2], 0, 4), "b": entry("F16", [2], 4, 8), "mask": entry("U8", [1], 8, 9)}
    file = write(tmp_path, packed(header, b"\x80\x3f\x49\x40" + struct.pack("<2e", 1.5, -2) + b"\1"))
    tensors = read_file(file, ignored=re.compile("mask|b"))
    assert list(tensors) == ["a"] and tensors["a"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(tensors["a"].astype(np.float32), [1, 3.140625])
    assert [x.dtype.name for x in read_file(file, ignored=re.compile("mask")).values()] == ["bfloat16", "float16"]
    with pytest.raises(ValueError, match="mask is uint8, not float32, float16 or bfloat16"):
        read_file(file)
    infinite = write(tmp_path, packed({"a": entry("BF16", [1], 0, 2)}, b"\x80\x7f"))
    with pytest.raises(ValueError, match="a has entries that are not finite"):
        read_file(infinite)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name in ("nowhere", "", "pipe"):
        with pytest.raises(FileNotFoundError, match="is missing"):
            read_file(tmp_path / name)


def test_no_memory(tmp_path, monkeypatch):
    """A file with holes may claim a terabyte; the library would panic."""

    def fails(*args):
        raise MemoryError("Unable to allocate 1.00 TiB")

    file = write(tmp_path, packed(ONE))
    monkeypatch.setattr(tensor_files.np, "empty", fails)
    with pytest.raises(ValueError, match=r"a has shape \[2\]: Unable to allocate"):
        read_file(file)


VALID = safetensors.numpy.save(
    {
        "h.0.weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
        "h.0.bias": np.array([1, 2, 3], np.float16),
        "scale": np.array(3, np.float32),
    },
    {"format": "pt"},
)
HEADER = 8 + int.from_bytes(VALID[:8], "little")


def test_cut_off_anywhere(tmp_path):
    read_file(write(tmp_path, VALID))
    for kept in range(len(VALID)):
        with pytest.raises(ValueError, match="is cut off or damaged"):
            read_file(write(tmp_path, VALID[:kept]))


PLACES = st.one_of(st.integers(8, HEADER - 1), st.integers(8, HEADER - 1), st.integers(0, len(VALID)))
# Bytes that mean something in a header come up often.
BYTES = st.one_of(
    st.binary(min_size=1, max_size=3), st.sampled_from([bytes([byte]) for byte in b'{}[]":,0123459-.eF '])
)
CHANGES = st.tuples(st.sampled_from(["set", "insert", "delete", "cut", "repeat"]), PLACES, BYTES, st.booleans())


def changed(content: bytes, how: str, place: int, new: bytes, mend: bool) -> bytes:
    """`mend` keeps the header's length right where the change is in the header."""
    end = place + len(new)
    content = {
        "set": content[:place] + new + content[end:],
        "insert": content[:place] + new + content[place:],
        "delete": content[:place] + content[end:],
        "cut": content[:place],
        "repeat": content[:end] + content[place:],
    }[how]
    if mend and how != "set" and 8 <= place < len(content):
        grown = {"insert": len(new), "delete": -len(new), "repeat": len(new)}.get(how, 0)
        length = int.from_bytes(content[:8], "little") + grown
        content = struct.pack("<Q", length % 2**64) + content[8:]
    return content


def refused_or_read_as_the_library_does(file: Path) -> None:
    try:
        tensors = read_file(file)
    except ValueError as error:
        assert str(file) in str(error)
        return
    equal(tensors, safetensors.numpy.load(file.read_bytes()))
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


@settings(max_examples=500)
@given(changes=st.lists(CHANGES, min_size=1, max_size=2))
def test_random_bytes(tmp_path_factory, changes):
    content = VALID
    for change in changes:
        content = changed(content, *change)
    refused_or_read_as_the_library_does(write(tmp_path_factory.getbasetemp(), content))


NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 4, 6, 8, 12, 24, 2.0, 1e300, 2**31, 2**32, 2**62, 2**63, 2**64, True, None, "2"]
)
VALUES = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=3),
    st.sampled_from(["F32", "F16", "I16", "U8", "F4", "f32", "", "\0", {}, [[]]]),
)


@settings(max_examples=500)
@given(
    name=st.sampled_from(["h.0.weight", "h.0.bias", "scale", "__metadata__", "new"]),
    key=st.sampled_from(["dtype", "shape", "data_offsets", "more", None]),
    value=VALUES,
    data=st.integers(0, 60),
)
def test_random_headers(tmp_path_factory, name, key, value, data):
    """One value in the header is another, or the data are of another length."""
    header = json.loads(VALID[8:HEADER])
    if key is None:
        header[name] = value
    else:
        header.setdefault(name, {})[key] = value
    content = packed(header, VALID[HEADER:] if data == 60 else bytes(data))
    refused_or_read_as_the_library_does(write(tmp_path_factory.getbasetemp(), content))


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_by_another_name(tmp_path, protocol):
    """Bare and in the zip that torch.save makes; it would have worked."""
    bare = pickle.dumps(Evil(tmp_path / "ran"), protocol)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", bare)
    for content in (bare, (tmp_path / "zip").read_bytes()):
        with pytest.raises(ValueError, match=r"x.safetensors is cut off or damaged"):
            read_file(write(tmp_path, content))
    assert not (tmp_path / "ran").exists()
    pickle.loads(bare)
    assert (tmp_path / "ran").is_dir()
