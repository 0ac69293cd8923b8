"""JSON of unknown origin: what is read, what is refused, and in what time."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.json_files import DEEPEST, parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=VALUES)
def test_what_json_writes_is_read(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")) == value


def nested(depth: int, opening: str = "[", closing: str = "]", inside: str = "1") -> bytes:
    return (opening * depth + inside + closing * depth).encode()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}"), ('[{"a":[', "]}]"), ('["\\"[[",', "]")])
def test_how_deep(opening: str, closing: str, strict: bool) -> None:
    each = opening.replace("[[", "").count("[") + opening.count("{")
    parse_json(nested(DEEPEST // each, opening, closing), strict=strict)
    for depth in (DEEPEST // each + 1, 1000, 100_000):
        with pytest.raises(ValueError, match=f"nested {depth * each} deep, more than {DEEPEST}"):
            parse_json(nested(depth, opening, closing), strict=strict)
        with pytest.raises(ValueError, match="nested"):  # cut off in the middle
            parse_json(nested(depth, opening, closing)[: depth * len(opening)], strict=strict)


def test_brackets_side_by_side_or_in_strings_are_not_deep() -> None:
    for text in (b"[" + b"[{}]," * 10_000 + b"1]", json.dumps(["[" * 1000, '\\"[{' * 1000, "\\"]).encode()):
        assert parse_json(text) == json.loads(text)


def test_only_strict_reading_refuses_what_python_writes() -> None:
    for text, says in ((b'{"a": NaN}', "NaN is no number"), (b'{"a": 1e999}', "1e999"), (b'{"a": 1, "a": 2}', "twice")):
        parse_json(text, strict=False)
        with pytest.raises(ValueError, match=says):
            parse_json(text)


def test_every_error_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError, match=r"x.json is missing"):
        read_json(file)
    for content in (b"", b"{", b'{"a"', b"\xff{}", b'{"\xff": 1}', nested(200), b"9" * 5000, b"\0", b"{}{}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.json is no JSON \(.+\): is it cut off"):
            read_json(file, strict=False)
    for content in (b"[]", b"null", b"3", b'"a"'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.json holds no JSON object"):
            read_json(file)
    file.write_bytes(b"{" + b" " * 1000 + b"}")
    assert read_json(file) == {}
    with pytest.raises(ValueError, match=r"x.json is no JSON that is read here: 1002 bytes, more than 1000"):
        read_json(file, largest=1000)


@pytest.mark.parametrize("unit", [b"[", b'["', b'{"a":[', b"\\\\", b'\\"', b'"'])
def test_sixteen_megabytes_take_no_time(unit: bytes) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError):
        parse_json(unit * ((16 << 20) // len(unit)))
    assert time.perf_counter() - start < 5
