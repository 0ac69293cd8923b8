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
