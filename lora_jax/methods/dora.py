"""DoRA: magnitude and direction of a weight train apart, the direction as in LoRA (Liu et al., arXiv 2402.09353)."""

from collections.abc import Iterable
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.arrays import (
    Adapted,
    LowRank,
    Op,
    Weight,
    adapted_array,
    dense,
    einsum,
    is_adapted,
    static,
    widened,
)
from lora_jax.core.selection import Selection
from lora_jax.core.transforms import Factors, ParamTransform, Target, Traits, per_target, register
from lora_jax.methods.arguments import checked
from lora_jax.methods.lora import Options, Ranks, at_rank


@adapted_array
class Dora(Weight):
    """m V / ||V|| with V = base + scale * A B; m and the norm have one number an output unit."""

    layout: ClassVar = LowRank.layout | {"m": "so", "fixed_norm": "so", "strength": "s"}
    frozen: ClassVar = (*Adapted.frozen, "strength")
    a: Array
    b: Array
    m: Array
    fixed_norm: Array
    scale: Array
    strength: Array
    key: Array | None = None
    dropout: float = static(default=0.0)

    def ready(self) -> "Scaled":
        rise = self._rise()
        b, strength = self.b.astype(rise.dtype), self.strength.astype(rise.dtype)
        gain, outputs = (einsum("so,s->so", self.axes, x, strength) for x in (1 + rise, rise))
        b = einsum("sro,so->sro", self.axes, b, gain)
        same = {name: getattr(self, name) for name in ("base", "a", "scale", "key", "core", "dropout", "path")}
        return Scaled(**same, b=b, outputs=outputs)

    def materialize(self) -> Array:
        return self.ready().materialize()

    def _rise(self) -> Array:
        """m / ||V|| - 1, as a sum of differences that begin as zeros; ||V|| is a constant for the gradient."""
        wide = widened(self.dtype)
        a, b, scale = (lax.stop_gradient(x.astype(wide)) for x in (self.a, self.b, self.scale))
        b = einsum("sro,s->sro", self.axes, b, scale)
        gram = einsum("sir,siq->srq", self.axes, a, a)
        turned, squares = _with_base(self.base, a, self.axes, wide)
        twice = 2 * turned + einsum("srq,sqo->sro", self.axes, gram, b)
        grown = einsum("sro,sro->so", self.axes, twice, b)  # <2 W + A B, A B> = ||V||^2 - ||W||^2, nothing dense
        norm, after = jnp.sqrt(squares), jnp.sqrt(jnp.maximum(squares + grown, 0))
        safe = jnp.where(after > 0, after, 1)  # a unit without weights keeps its gain of 1
        change = self.m.astype(wide) - self.fixed_norm.astype(wide) - grown / (norm + safe)
        return jnp.where(after > 0, change / safe, 0)


def _with_base(base: Any, a: Array, axes: str, dtype: Any) -> tuple[Array, Array]:
    """W^T A and the squares of W's columns; of a stack that is encoded, one entry after the other is made dense."""
    if is_adapted(base) and axes[0] == "s":
        return lax.map(lambda entry: _with_base(entry[0], entry[1], axes[1:], dtype), (base, a))
    w = base.astype(dtype)
    return einsum("W,sir->sro", axes, w, a), einsum("W->so", axes, w * w)


@adapted_array
class Scaled(LowRank):
    """(1 + rise) * base + scale * A B: what DoRA is in a product. The gain is in A or B; `rise`, gain - 1, is that of
    the output axes or, seen from the other side (a tied head), of the input axes."""

    layout: ClassVar = LowRank.layout | {"outputs": "so", "inputs": "si"}
    exact: ClassVar = ("outputs", "inputs")
    outputs: Array | None = None
    inputs: Array | None = None

    def product(self, x: Array, op: Op) -> Array:
        dropped = self.dropped(x, op)
        y = op(x, self.base)
        wide = widened(y.dtype)
        change = self.branch(dropped, op).astype(wide)
        if self.outputs is not None:
            again = y if dropped is x else op(dropped, self.base)
            change += jnp.broadcast_to(self.outputs.astype(wide), y.shape) * again.astype(wide)
        if self.inputs is not None:
            change += op.scale_input(dropped, self.base, self.inputs).astype(wide)
        return y + change.astype(y.dtype)

    def delta(self) -> Array:
        change = super().delta()
        for layout, rise in (("so", self.outputs), ("si", self.inputs)):
            if rise is not None:
                change += einsum(f"{layout},W->W", self.axes, rise, self.base.astype(change.dtype))
        return change

    def remove(self) -> Array:
        return Adapted.remove(self)

    def transposed(self) -> "Scaled":
        return super().transposed().replace(outputs=self.inputs, inputs=self.outputs)


@checked
def dora(
    selection: Selection,
    *,
    rank: Ranks,
    alpha: Any = None,
    dropout: float = 0.0,
    a_init: str = "kaiming_uniform",
    scale_rule: str = "alpha/r",
    dtype: Any = jnp.float32,
    shared: Iterable[str] = (),
    strict: bool = True,
) -> ParamTransform:
    """DoRA: trains a weight's magnitude m and, by LoRA, its direction: `m V / ||V||`, `V = W + scale * A B`.

    A and B are as in `lora`; m is `(s.., o..)` and begins as the norm of W.

    The norm is over a weight's input axes (one number an output unit; of an embedding, over the vocabulary, one a
    feature), and a constant for the gradient (the paper's section 4.3). Dropout is on the input of all that changes:
    `x W + (m/||V|| - 1) drop(x) W + m/||V|| scale drop(x) A B`, as in PEFT. A step takes one more product of W, with A,
    for the norm. Merging cannot be undone. The options are those of `lora`; m and the frozen `fixed_norm`, the norm of
    W, are float32 whatever the dtype of A and B.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> lj.check(lj.dora(lj.select("kernel"), rank=2), {"kernel": jnp.ones((100, 70))}).trained
    410
    """
    low = Options(selection, rank, alpha, dropout, a_init, scale_rule, dtype, shared, strict)

    def shapes(target: Target) -> dict[str, tuple[int, ...]]:
        units = (*target.stacked, *target.outputs)
        return low.shapes(target) | {"m": units, "fixed_norm": units}

    def init(key: Array, target: Target) -> Factors:
        wide = jnp.asarray(dense(target.leaf)).astype(jnp.float32)
        norm = target.adapted_layers(jnp.sqrt(einsum("W->so", target.axes, wide * wide)))
        return low.init(key, target) | {"m": norm, "fixed_norm": jnp.array(norm, copy=True)}

    def adapt(target: Target, factors: Factors, key: Array | None, strength: Any) -> Dora:
        return Dora(**low.fields(target, factors, key, 1.0), strength=target.scale(strength))

    return per_target({"method": "dora", **low.spec()}, low.targets, init, adapt, shapes=shapes, globs=low.globs)


not_additive = "a norm of base and change together divides both; merge it into the base"
register("dora", dora, Traits(not_additive=not_additive, at_rank=at_rank))
