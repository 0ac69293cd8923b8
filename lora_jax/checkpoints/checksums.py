"""Checksums of arrays, computed where the arrays are: equal on every mesh, and nothing is gathered.

Each element's bits are mixed with a hash of its position in the array, and the results added up modulo 2^32: a sum does
not depend on how the elements are spread over devices. A change of one element always changes the first sum (the
mixing is one-to-one); for all else two sums leave a chance of 2^-64.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P


def checksums(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Of each array 16 hex digits that its values, bit by bit, and their positions determine; of any dtype but keys.

    Each is computed on its array's devices, in one pass. With several processes all of them call it.
    """
    hexes = {}
    for name, x in arrays.items():
        # one after the other: CPU devices of several processes deadlock in many small programs at once
        pair = jax.device_get(_compiled(_everywhere(x))(x))
        hexes[name] = "".join(f"{part:08x}" for part in pair.tolist())
    return hexes


def _everywhere(x: Array) -> Sharding | None:
    sharding = getattr(x, "sharding", None)
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None


@functools.cache
def _compiled(sharding: Sharding | None) -> Any:
    return jax.jit(_sums, out_shardings=sharding)


def _sums(x: Array) -> Array:
    """(2,) uint32."""
    words = _words(x)
    position = jnp.full(words.shape, 0x9E3779B9, jnp.uint32)
    for axis in range(words.ndim):
        position = _mixed(position + lax.broadcasted_iota(jnp.uint32, words.shape, axis))
    one, other = _mixed(words + position), _mixed((words ^ position) * np.uint32(0x2C1B3C6D))
    return jnp.stack([jnp.sum(one, dtype=jnp.uint32), jnp.sum(other, dtype=jnp.uint32)])


def _words(x: Array) -> Array:
    """The bits of the elements as uint32, of wider ones as several along a last axis."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
    if bits < 8:  # a float32 holds them all
        return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    if bits < 32:
        return lax.bitcast_convert_type(x, jnp.uint8 if bits == 8 else jnp.uint16).astype(jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.uint32)


def _mixed(x: Array) -> Array:
    """MurmurHash3's finalizer (Appleby 2011), which is one-to-one."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
