"""W + A diag(d) B: the parametrization of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512), without its pruning."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

import lora_jax as lj


def diagonal(selection: lj.Selection, *, rank: int) -> lj.ParamTransform:
    """A and B begin with normal numbers, d with zeros."""

    def shapes(target: lj.Target) -> dict[str, tuple[int, ...]]:
        a, b = (*target.stacked, *target.inputs, rank), (*target.stacked, rank, *target.outputs)
        return {"a": a, "d": (*target.stacked, rank), "b": b}

    def init(key: Array, target: lj.Target) -> lj.Factors:
        keys = dict(zip("ab", jax.random.split(key), strict=True))
        sizes = shapes(target)
        normal = {name: 0.3 * jax.random.normal(keys[name], sizes[name]) for name in "ab"}
        return normal | {"d": jnp.zeros(sizes["d"])}

    def adapt(target: lj.Target, factors: lj.Factors, key: Array | None, strength: Any) -> lj.LowRank:
        a, d, b = (target.all_layers(factors[name]) for name in "adb")
        b = jnp.expand_dims(d, range(d.ndim, b.ndim)) * b
        return lj.LowRank(**target.fields, a=a, b=b, scale=target.scale(strength))

    spec = {"method": "diagonal", **selection.spec(), "rank": rank}
    return lj.per_target(spec, selection, init, adapt, shapes=shapes)


lj.register(
    "diagonal",
    diagonal,
    lj.Traits(
        at_rank=lambda spec, rank: spec | {"rank": rank},
        fast=("d",),
        sharding={"**/d": PartitionSpec()},
    ),
)
