"""A trained shift of a bias, scaled as LoRA's product is: PEFT's `lora_bias`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.arrays import Adapted, Label, Tuned, adapted_array, rounded_sum, static, widened
from lora_jax.core.selection import Absent, Selection, look_up
from lora_jax.core.transforms import ParamTransform, Traits, need_factors, per_leaf, register


@adapted_array
class Shift(Adapted):
    """base + scale * shift, all of one shape."""

    base: Array
    shift: Array
    scale: Array
    path: str = static(default=Label())

    @property
    def axes(self) -> str:
        return ""

    def materialize(self) -> Array:
        return rounded_sum(self.base, self._change(), self.dtype)

    def remove(self) -> Array:
        return rounded_sum(self.base, -self._change(), self.dtype)

    def ready(self) -> Adapted:
        # A bias meets a sum and no product: lift may as well know the sum.
        return Tuned(value=self.replace(base=lax.stop_gradient(self.base)).materialize(), path=self.path)

    def _change(self) -> Array:
        wide = widened(self.dtype)
        return self.scale.astype(wide) * self.shift.astype(wide)


def shift(selection: Selection, *, scale: float | Mapping[str, float] = 1.0) -> ParamTransform:
    """`b + scale * shift` for the selected biases, with the shift zero at first and b frozen.

    LoRA with a bias in its B adds `scale * bias` to a layer's output; with `scale` equal to LoRA's this is that bias.

    Args:
      selection: the biases (any leaves; the whole leaf is shifted, in the scanned layout too).
      scale: one number, or a mapping glob -> number (first match wins; no match is an error).

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax.methods.shift import shift
    >>> lj.check(shift(lj.select("bias")), {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}).trained
    2
    """

    def init(key: Array, path: str, leaf: Any, axes: str) -> dict[str, Array]:
        return {"shift": jnp.zeros(leaf.shape, jnp.float32)}

    def adapt(key: Array | None, path: str, leaf: Any, axes: str, factors: dict[str, Array], strength: Any) -> Shift:
        need_factors(path, factors, {"shift": tuple(leaf.shape)})
        if isinstance(leaf, Absent):
            raise ValueError(f"{path} was taken out of these params (without_tuned); a shift needs the base")
        whole = jnp.asarray(strength * look_up(scale, path, "scale"), jnp.float32)
        return Shift(base=leaf, shift=factors["shift"], scale=jnp.broadcast_to(whole, leaf.shape), path=Label(path))

    def targets(params: Any) -> dict[str, str]:
        if selection.layers:
            raise ValueError(f"shift takes whole leaves: name the layers in the globs, not layers={selection.layers}")
        return dict.fromkeys(selection.leaves(params), "")

    return per_leaf({"method": "shift", **selection.spec(), "scale": scale}, targets, init, adapt)


register("shift", shift, Traits(decays=(), fast=()))
