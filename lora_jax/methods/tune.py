"""Training the selected leaves themselves: full fine-tuning, BitFit, a head."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.arrays import Tuned, dense, is_adapted
from lora_jax.core.selection import Absent, Selection, flatten
from lora_jax.core.transforms import Delta, Factors, Params, ParamTransform, Target, Traits, per_target, register
from lora_jax.core.transforms.transform import need_params
from lora_jax.methods.arguments import checked


@checked
def tune(selection: Selection) -> ParamTransform:
    """Fine-tuning: the selected leaves train. They are copied into the delta, as factor `value`.

    In adapted params a `Tuned` stands in the place of each. The copy of a leaf of 16 bits has 32, so that small updates
    are not lost; it is rounded in adapted params.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    >>> lj.check(lj.tune(lj.select("bias")), params).trained  # BitFit
    2
    """

    def targets(params: Params) -> list[Target]:
        leaves = selection.leaves(params)
        if selection.layers and (stacks := [p for p, leaf in leaves.items() if "s" in selection.axes_of(p, leaf)]):
            raise ValueError(f"{stacks[0]}: tune takes whole leaves, not layers={selection.layers} of a stack")
        return [Target(path, leaf) for path, leaf in leaves.items()]

    def init(key: Array, target: Target) -> Factors:
        leaf = target.leaf
        if isinstance(leaf, Absent):
            raise ValueError(f"{target.path} was taken out of these params (without_tuned); init needs the whole base")
        return {"value": jnp.array(dense(leaf), jnp.float32 if leaf.dtype.itemsize < 4 else leaf.dtype, copy=True)}

    def adapt(target: Target, factors: Factors, key: Array | None, strength: Any) -> Tuned:
        leaf, value = target.leaf, factors["value"]
        if isinstance(strength, float | int) and strength == 1:
            return Tuned(value=value.astype(leaf.dtype), path=target.label)
        if isinstance(leaf, Absent):
            raise ValueError(f"{target.path}: strength={strength} needs the base, which was taken out (without_tuned)")
        s = jnp.asarray(strength, value.dtype)
        return Tuned(value=((1 - s) * leaf.astype(value.dtype) + s * value).astype(leaf.dtype), path=target.label)

    spec = {"method": "tune", **selection.spec()}
    return per_target(spec, targets, init, adapt, shapes=lambda target: {"value": tuple(target.leaf.shape)})


def without_tuned(params: Any, delta: Delta) -> Any:
    """Params with `Absent` for the leaves that the delta holds itself (`tune`), so that memory holds them once.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, method = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, lj.tune(lj.select("bias"))
    >>> delta = method.init(jax.random.key(0), params)
    >>> type(lj.without_tuned(params, delta)["bias"]).__name__
    'Absent'
    """
    need_params(params, "without_tuned")
    flat, treedef = flatten(params, is_adapted)
    absent = {path: Absent(leaf.shape, leaf.dtype) for path, leaf in flat if "value" in delta.get(path, ())}
    return jax.tree.unflatten(treedef, [absent.get(path, leaf) for path, leaf in flat])


register("tune", tune, Traits(decays=("**/{kernel,embedding}/value",), fast=()))
