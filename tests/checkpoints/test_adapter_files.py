"""Adapters as files: exact, strict on reading, equal bytes for equal adapters."""

import functools
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import checkpoints
from lora_jax.checkpoints import files

PARAMS = {
    "h_0": {"attn": {"query": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}}},
    "h_1": {"attn": {"query": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}}},
}
BASE = checkpoints.identity(PARAMS, "ones")
METHOD = lj.chain(
    lj.lora(lj.select("**/kernel"), rank=2, alpha={"h_0/**": 4, "**": 2}),
    lj.tune(lj.select("**/bias")),
)


@functools.cache
def delta() -> lj.Delta:
    random, fresh = np.random.default_rng(0), jax.jit(METHOD.init)(jax.random.key(0), PARAMS)
    return jax.tree.map(
        lambda x: jnp.asarray(x + random.normal(size=x.shape).astype(np.float32)), jax.device_get(fresh)
    )


def equal(a: lj.Delta, b: lj.Delta) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def test_round_trip(tmp_path: Path) -> None:
    file = checkpoints.save_adapter(tmp_path / "adapter", METHOD, delta(), BASE)
    assert file == tmp_path / "adapter/adapter.safetensors"
    for path in (file, file.parent):
        method, loaded, info = checkpoints.load_adapter(path)
        assert equal(loaded, delta()) and isinstance(loaded, lj.Delta)
        assert info["base"] == BASE and info["spec"] == method.spec == METHOD.spec
        before, after = METHOD.apply(PARAMS, delta()), method.apply(PARAMS, loaded)
        assert equal(*jax.jit(lambda *adapted: [lj.merge(one) for one in adapted])(before, after))  # type: ignore[arg-type]
    names = safetensors.numpy.load_file(file).keys()
    assert "h_0/attn/query/kernel:a" in names and "h_1/attn/query/bias:value" in names
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_equal_adapters_are_equal_bytes(tmp_path: Path) -> None:
    a = checkpoints.save_adapter(tmp_path / "a.safetensors", METHOD, delta(), BASE)
    shuffled = lj.Delta(dict(reversed(delta().items())))
    b = checkpoints.save_adapter(tmp_path / "b.safetensors", METHOD, shuffled, BASE)
    assert a.read_bytes() == b.read_bytes()
    header = json.loads(a.read_bytes()[8 : 8 + struct.unpack("<Q", a.read_bytes()[:8])[0]])
    assert list(header["__metadata__"]) == ["lora_jax"]


def test_bfloat16_factors(tmp_path: Path) -> None:
    method = lj.lora(lj.select("**/kernel"), rank=1, dtype=jnp.bfloat16)
    made = method.init(jax.random.key(0), PARAMS)
    file = checkpoints.save_adapter(tmp_path, method, made, BASE)
    assert equal(checkpoints.load_adapter(file)[1], made)


@given(data=st.data())
def test_every_damage_is_an_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("damaged") / "adapter.safetensors"
    content = bytearray(checkpoints.save_adapter(file, METHOD, delta(), BASE).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        _, loaded, info = checkpoints.load_adapter(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:  # nothing is lost with a space of the header
        assert equal(loaded, delta()) and info["base"] == BASE


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors does not exist"):
        checkpoints.load_adapter(tmp_path)
    other = tmp_path / "other.safetensors"
    other.write_bytes(safetensors.numpy.save({"a": np.ones(2, np.float32)}))
    with pytest.raises(ValueError, match="was not written by save_adapter"):
        checkpoints.load_adapter(other)
    file = checkpoints.save_adapter(tmp_path / "good.safetensors", METHOD, delta(), BASE)
    arrays = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    for change, message in (
        ({"h_0/attn/query/bias:value": np.ones(6, np.int32)}, "is I32; an adapter is floating"),
        ({"h_0/attn/query/bias:value": np.full(6, np.nan, np.float32)}, "is not finite"),
        ({"h_0/attn/query/bias:value": np.ones(6, np.float32)}, "differs from its digest"),
        ({"h_7/attn/query/bias:value": np.ones(6, np.float32)}, "differs from its digest"),
    ):
        file.write_bytes(safetensors.numpy.save(arrays | change, metadata=metadata))
        with pytest.raises(ValueError, match=message):
            checkpoints.load_adapter(file)


def packed(arrays: bytes, header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + arrays


TYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I8", "I32", "U64", "BOOL", "C64")


@pytest.mark.parametrize("dtype", TYPES)
def test_a_type_that_no_adapter_has(tmp_path: Path, dtype: str) -> None:
    """numpy has no name for some of them."""
    file, size = tmp_path / "adapter.safetensors", {"F4": 48, "F6_E2M3": 64, "I32": 24, "U64": 48, "C64": 48}
    count = {"F4": 96, "F6_E2M3": 512 // 6 // 4 * 4}.get(dtype, 6)
    nbytes = {"F6_E2M3": count * 6 // 8}.get(dtype, size.get(dtype, 6))
    entry = {"dtype": dtype, "shape": [count], "data_offsets": [0, nbytes]}
    file.write_bytes(packed(bytes(nbytes), {"__metadata__": {"lora_jax": "{}"}, "a:b": entry}))
    with pytest.raises(ValueError, match=rf"adapter.safetensors is no adapter.*a:b is {dtype}; an adapter is floating"):
        checkpoints.load_adapter(file)


def test_shapes_that_numpy_has_not(tmp_path: Path) -> None:
    for shape in ([0, 2**62, 2**62], [0, 2**63], [1] * 100):
        nbytes = 0 if 0 in shape else 4
        header = {"a:b": {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}}
        (tmp_path / "adapter.safetensors").write_bytes(packed(bytes(nbytes), header))
        with pytest.raises(ValueError, match=r"adapter.safetensors is no adapter, or not all of one"):
            checkpoints.load_adapter(tmp_path)


SPEC = METHOD.spec
VALUES: list = [None, ..., 3, "x", []]
FORGED: list[tuple[dict, str]] = [
    ({"format": 2}, "is of format 2; this version reads format 1"),
    ({"format": None}, "is of format None"),
    ({"format": ...}, "is of format None"),
    *(
        ({name: value}, "lacks its method's spec or its base's identity")
        for name in ("spec", "base")
        for value in VALUES
    ),
    ({"spec": {}}, "the spec's method None is not known"),
    ({"spec": {"method": ["lora"]}}, r"the spec's method \['lora'\] is not known"),
    ({"spec": {"method": "lora", "select": 3}}, ""),
    ({"spec": {"method": "lora", "select": ["**"], "rank": 2, "x": 1}}, "does not fit"),
    ({"spec": {"method": "chain", "of": 3}}, ""),
    ({"spec": {"method": "chain", "of": [3]}}, ""),
    ({"spec": {"method": "chain", "of": {"a": 1}}}, ""),
]


@pytest.mark.parametrize(("change", "says"), FORGED, ids=str)
def test_metadata_with_the_right_digest(tmp_path: Path, change: dict, says: str) -> None:
    """A digest is no secret: what it is of may be anything."""
    file = checkpoints.save_adapter(tmp_path, METHOD, delta(), BASE)
    arrays = safetensors.numpy.load_file(file)
    info = {name: x for name, x in ({"format": 1, "spec": SPEC, "base": BASE} | change).items() if x is not ...}
    info["digest"] = files.digest(json.dumps([info, files.table_of(arrays)]))
    file.write_bytes(safetensors.numpy.save(arrays, metadata={"lora_jax": json.dumps(info)}))
    with pytest.raises(ValueError, match=rf"adapter.safetensors.*{says}"):
        checkpoints.load_adapter(file)


def test_metadata_that_are_no_json(tmp_path: Path) -> None:
    file = checkpoints.save_adapter(tmp_path, METHOD, delta(), BASE)
    arrays = safetensors.numpy.load_file(file)
    for text in ("", "{", "[]", "null", "[" * 100_000, '{"digest": ' + '{"a":' * 100_000, '{"digest": 3}'):
        file.write_bytes(safetensors.numpy.save(arrays, metadata={"lora_jax": text}))
        with pytest.raises(ValueError, match=r"adapter.safetensors differs from its digest"):
            checkpoints.load_adapter(file)


def test_a_non_finite_adapter_is_not_saved_and_the_old_file_stays(tmp_path: Path) -> None:
    file = checkpoints.save_adapter(tmp_path, METHOD, delta(), BASE)
    before = file.read_bytes()
    bad = jax.tree.map(lambda x: x * np.float32(np.inf), jax.device_get(delta()))
    with pytest.raises(ValueError, match="is not finite"):
        checkpoints.save_adapter(tmp_path, METHOD, bad, BASE)
    assert file.read_bytes() == before


def test_check_base(tmp_path: Path) -> None:
    file = checkpoints.save_adapter(tmp_path, METHOD, delta(), BASE)
    info = checkpoints.load_adapter(file)[2]
    checkpoints.check_base(info["base"], BASE, file)
    changed = checkpoints.identity(jax.tree.map(lambda x: np.asarray(x) + 1, PARAMS), "changed")
    with pytest.raises(ValueError, match=r"belongs to the base 'ones'.*'changed' has other weights"):
        checkpoints.check_base(info["base"], changed, file)
