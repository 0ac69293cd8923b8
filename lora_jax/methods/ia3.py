"""IA3: learned vectors that scale what layers give or take (Liu et al. 2022, arXiv 2205.05638)."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from lora_jax.core.arrays import Adapted, Op, Tuned, Weight, adapted_array, factor_axes, scaled, widened
from lora_jax.core.globs import matches, matches_any
from lora_jax.core.selection import Absent, Selection, flatten, strings
from lora_jax.core.transforms import Factors, Params, ParamTransform, Target, Traits, per_target, register, targets_of
from lora_jax.methods.arguments import checked


@adapted_array
class Rescaled(Weight):
    """A weight or bias whose input or output axes are scaled, each entry by its own number."""

    layout: ClassVar = {"inputs": "si", "outputs": "so"}
    exact: ClassVar = ("inputs", "outputs")
    inputs: Array | None = None
    outputs: Array | None = None

    def product(self, x: Array, op: Op) -> Array:
        y = op(x, self.base) if self.inputs is None else op.scale_input(x, self.base, self.inputs)
        return y if self.outputs is None else scaled(y, self.outputs)

    def materialize(self) -> Array:
        wide, scale = self._wide()
        return (wide * scale).astype(self.dtype)

    def remove(self) -> Array:
        wide, scale = self._wide()
        if not isinstance(scale, jax.core.Tracer) and bool(jnp.any(scale == 0)):
            raise ValueError(f"{self.path}: a factor is 0, which cannot be undone; keep the base")
        return (wide / scale).astype(self.dtype)

    def transposed(self) -> "Rescaled":
        return self.replace(inputs=self.outputs, outputs=self.inputs, core=self.flipped)

    def ready(self) -> Adapted:
        if set(self.core) - {"s", "o"}:
            return self
        # A bias meets a sum and no product: lift may as well know its value.
        return Tuned(value=self.materialize(), path=self.path)

    def _wide(self) -> tuple[Array, Array]:
        """Base and factors, float32 (or wider); the factors with the base's axes, of size 1 where they are one."""
        wide = widened(self.dtype)
        scale = jnp.ones((1,) * self.ndim, wide)
        for name, layout in self.layout.items():
            if (factor := getattr(self, name)) is not None:
                where = [int(axis) for axis in factor_axes(layout, self.axes)]
                factor = factor.astype(wide).transpose(sorted(range(len(where)), key=where.__getitem__))
                scale = scale * lax.expand_dims(factor, [axis for axis in range(self.ndim) if axis not in where])
        return self.base.astype(wide), scale


@checked
def ia3(selection: Selection, *, feedforward: Iterable[str] = ()) -> ParamTransform:
    """IA3: trained vectors l that scale layers' outputs, `(x W + b) * l`, or their inputs, `(x * l) W + b`.

    The inputs are scaled of the weights that `feedforward` names. l is 1 at first; W and b are frozen.

    A bias is scaled with its weight, if the weight's module has a leaf named `bias`: the l of both stands once in the
    delta, under `@shared/<module>`; a bias of another shape, or of two selected weights, is a ValueError. Without one,
    and for `feedforward`, l is in the delta under the weight's path. Of a convolution's input l scales the channels,
    those of a group in every group. `merge` multiplies in; `unmerge` divides (a ValueError where an l is 0; NaN
    under `jit`, where this cannot be seen).

    Args:
      selection: the weights, each with input and output axes. The paper takes the keys and values of attention and the
        second matrix of the MLP, the latter as feedforward.
      feedforward: globs of the selected weights that are scaled on the input side; each must match one.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> method = lj.ia3(lj.select("*/kernel"), feedforward="down/*")
    >>> layers = {"key": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "down": {"kernel": jnp.ones((5, 3))}}
    >>> print(method.init(jax.random.key(0), layers))
    Delta: 2 paths, 7 numbers
      @shared/key: l float32(2,)
      down/kernel: l float32(5,)
    """
    feedforward = strings(feedforward)

    def shapes(target: Target) -> dict[str, tuple[int, ...]]:
        if isinstance(target.leaf, Absent):
            raise ValueError(f"{target.path} was taken out of these params (without_tuned); IA3 needs the base")
        feeds = matches_any(feedforward, target.path)
        return {"l": (*target.stacked, *(target.sizes("iv") if feeds else target.outputs))}

    def init(key: Array, target: Target) -> Factors:
        return {"l": jnp.ones(shapes(target)["l"], jnp.float32)}

    def adapt(target: Target, factors: Factors, key: Array | None, strength: Any) -> Rescaled:
        scale = target.all_layers(factors["l"], fill=1.0)
        if not (isinstance(strength, float | int) and strength == 1):
            scale = 1 + jnp.asarray(strength, scale.dtype) * (scale - 1)
        if not matches_any(feedforward, target.path):
            return Rescaled(**target.fields, outputs=scale)
        letters = [letter for letter in target.axes if letter in "ivk"]
        window = [len(target.stack) + n for n, letter in enumerate(letters) if letter == "k"]
        scale = jnp.broadcast_to(lax.expand_dims(scale, window), (*target.stack, *target.inputs))
        return Rescaled(**target.fields, inputs=scale)

    spec = {"method": "ia3", **selection.spec(), "feedforward": list(feedforward)}
    targets = functools.partial(_weights_and_biases, selection, feedforward)
    return per_target(spec, targets, init, adapt, shapes=shapes, globs=feedforward)


def _weights_and_biases(selection: Selection, feedforward: tuple[str, ...], params: Params) -> list[Target]:
    """The selected weights, and the biases that go with them."""
    leaves, weights = dict(flatten(params)[0]), targets_of(selection, params)
    for glob in feedforward:
        if not any(matches(glob, target.path) for target in weights):
            paths = [target.path for target in weights[:3]]
            raise ValueError(f"feedforward={glob!r} matches none of the selected weights, {paths} ...")
    pairs: dict[str, Target] = {}
    for weight in weights:
        if not weight.inputs or not weight.outputs:
            raise ValueError(f"{weight.path} with axes {weight.axes!r}: IA3 needs a weight with input and output axes")
        module = weight.path.rpartition("/")[0]
        path, shared = f"{module}/bias".lstrip("/"), f"@shared/{module}"
        if path not in leaves or matches_any(feedforward, weight.path):
            pairs[weight.path] = weight
        elif path in pairs:
            raise ValueError(f"{weight.path} is not the only selected weight beside {path}: exclude all but one")
        else:
            axes = _bias_axes(selection.axes, path, leaves[path], weight)
            pairs[weight.path] = dataclasses.replace(weight, shared=shared)
            pairs[path] = Target(path, leaves[path], axes, selection.layers, shared)
    return list(pairs.values())


def _bias_axes(named_axes: Any, path: str, leaf: Any, weight: Target) -> str:
    """The axes of a bias: those named for it, else those of its weight that are no input; the sizes must agree."""
    by_glob = named_axes if isinstance(named_axes, Mapping) else {}
    named = [axes for glob, axes in by_glob.items() if matches(glob, path)][:1]
    for axes in (*named, "".join(letter for letter in weight.axes if letter in "so")):
        if len(axes) == leaf.ndim and not set(axes) - {"s", "o"}:
            bias = Target(path, leaf, axes)
            if (bias.stack, bias.outputs) == (weight.stack, weight.outputs):
                return axes
    outputs = f"its weight with axes {weight.axes!r} has outputs {weight.stack + weight.outputs}"
    hint = "name the axes of both with select(..., axes={glob: ...})"
    raise ValueError(f"{path} has shape {tuple(leaf.shape)}, but {outputs}: {hint}")


not_additive = "it multiplies the base; merge it into the base"
# nothing decays: 1 is what changes nothing, not 0
register("ia3", ia3, Traits(not_additive=not_additive, decays=(), fast=(), sharding={"**/l": PartitionSpec()}))
