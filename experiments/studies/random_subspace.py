"""Training in a fixed random subspace, for the study `intrinsic`: one vector for all weights, each entry of which gets
one of the vector's numbers with a random sign."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

import lora_jax as lj
from lora_jax.core.transforms import stable_hash


def random_subspace(selection: lj.Selection, *, dimension: int) -> lj.ParamTransform:
    """W + P z, with z (dimension,) for all selected weights together, zero at first.

    P has one entry, 1 or -1, in each row: its columns are orthogonal, and it is made anew from the path, never kept.
    """

    def shared(key: Array, targets: Sequence[Any]) -> lj.Factors:
        return {"z": jnp.zeros((dimension,), jnp.float32)}

    def adapt(target: lj.Target, factors: lj.Factors, key: Array | None, strength: Any) -> lj.Tuned:
        leaf = target.leaf
        count = jnp.uint32(stable_hash(target.path)) + lax.iota(jnp.uint32, leaf.size)
        mixed = _mixed(count)
        sign = 1 - 2 * (mixed >> 31).astype(jnp.float32)
        change = (sign * factors["z"][mixed % dimension]).reshape(leaf.shape)
        return lj.Tuned(value=leaf + (strength * change).astype(leaf.dtype), path=target.label)

    spec = {"method": "random_subspace", **selection.spec(), "dimension": dimension}
    return lj.per_target(spec, selection, lambda key, target: {}, adapt, common=shared)


def _mixed(x: Array) -> Array:
    """The end of MurmurHash3, which spreads numbers over 32 bits."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


lj.register("random_subspace", random_subspace, lj.Traits(decays=(), fast=()))
