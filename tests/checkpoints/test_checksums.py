"""Checksums of arrays: of every dtype, the same on every mesh, another for every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.checkpoints import checksums
from lora_jax.distributed.sharding import make_mesh

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint16", "bool", "complex64", "float8_e4m3fn")


def of(x: jax.Array) -> str:
    return checksums({"x": x})["x"]


def values(dtype: str, shape: tuple[int, ...] = (8, 4)) -> jax.Array:
    bits = jax.random.bits(jax.random.key(3), shape, jnp.uint8)
    return (bits > 127) if dtype == "bool" else bits.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_on_every_mesh(dtype: str) -> None:
    """Of each dtype on two meshes, of one on all."""
    x, sums = values(dtype), set()
    meshes: list[tuple[dict[str, int], P]] = [
        ({"data": 8}, P("data")),
        ({"fsdp": 2, "tensor": 4}, P("fsdp", "tensor")),
        ({}, P()),
        ({"fsdp": 2, "tensor": 4}, P("tensor")),
        ({"data": 2, "fsdp": 4}, P()),
    ]
    for sizes, spec in meshes if dtype == "complex64" else meshes[:2]:
        sums.add(of(jax.device_put(x, NamedSharding(make_mesh(sizes), spec))))
    assert sums == {of(x)} == {of(np.asarray(x))}


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_changed_bit_changes_it(dtype: str) -> None:
    before = np.asarray(values(dtype))
    at = 3 if dtype != "bool" else 0
    changed = before.copy()
    raw, sums = changed.reshape(-1).view(np.uint8), [of(jnp.asarray(before))]
    for byte in (len(raw) // 2, -1):
        raw[byte] ^= 1 << at
        sums.append(of(jnp.asarray(changed)))
    assert len(set(sums)) == 3


@given(st.permutations(range(6)))
def test_the_order_of_elements_counts(order: list[int]) -> None:
    x = jnp.arange(6.0)
    assert (of(x[jnp.array(order)]) == of(x)) == (order == sorted(order))


def test_shapes_and_zeros() -> None:
    zeros = [jnp.zeros(shape) for shape in ((4,), (2, 2), (4, 1), (5,), (0,), ())]
    assert len({of(x) for x in zeros}) == len(zeros)
    assert of(jnp.zeros(3)) != of(-jnp.zeros(3))
