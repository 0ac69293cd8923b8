"""A trained change of a bias, scaled as LoRA's product is: PEFT's `lora_bias`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from lora_jax.core.arrays import Adapted, Summed, Tuned, adapted_array, widened
from lora_jax.core.selection import Absent, Selection, glob_keys, look_up
from lora_jax.core.transforms import Factors, Params, ParamTransform, Target, Traits, per_target, register
from lora_jax.methods.arguments import checked
from lora_jax.methods.ranges import FINITE


@adapted_array
class BiasDelta(Summed):
    """base + scale * shift, all of one shape."""

    shift: Array
    scale: Array

    @property
    def axes(self) -> str:
        return ""

    def ready(self) -> Adapted:
        # A bias meets a sum and no product: lift may as well know the sum.
        return Tuned(value=self.materialize(), path=self.path)

    def delta(self) -> Array:
        wide = widened(self.dtype)
        return self.scale.astype(wide) * self.shift.astype(wide)


@checked
def bias_delta(selection: Selection, *, scale: float | Mapping[str, float] = 1.0) -> ParamTransform:
    """A trained change of the selected biases: `b + scale * shift`, where the shift is zero at first and b is frozen.

    LoRA with a bias in its B adds `scale * bias` to a layer's output; with `scale` equal to LoRA's this is that bias.

    Args:
      selection: the biases, or any leaves; every layer of a stack: one that names layers is a ValueError.
      scale: one number, or a mapping glob -> number (first match wins; no match is an error).

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> lj.check(lj.bias_delta(lj.select("bias")), {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}).trained
    2
    """

    def targets(params: Params) -> list[Target]:
        if selection.layers:
            hint = f"name the layers in the globs, not layers={selection.layers}"
            raise ValueError(f"bias_delta takes all of a leaf: {hint}")
        return [Target(path, leaf) for path, leaf in selection.leaves(params).items()]

    def init(key: Array, target: Target) -> Factors:
        return {"shift": jnp.zeros(target.leaf.shape, jnp.float32)}

    def adapt(target: Target, factors: Factors, key: Array | None, strength: Any) -> BiasDelta:
        leaf = target.leaf
        if isinstance(leaf, Absent):
            raise ValueError(f"{target.path} was taken out of these params (without_tuned); bias_delta needs the base")
        number = jnp.asarray(strength * look_up(scale, target.path, "scale"), jnp.float32)
        return BiasDelta(**target.fields, shift=factors["shift"], scale=jnp.broadcast_to(number, leaf.shape))

    scale = FINITE("scale", scale)
    spec = {"method": "bias_delta", **selection.spec(), "scale": scale}
    shapes = lambda target: {"shift": tuple(target.leaf.shape)}  # noqa: E731
    return per_target(spec, targets, init, adapt, shapes=shapes, globs=glob_keys(scale))


shift = bias_delta  # its name before
register("bias_delta", bias_delta, Traits(decays=(), fast=(), aliases=("shift",)))
