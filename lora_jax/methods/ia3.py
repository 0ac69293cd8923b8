"""IA3: learned vectors that scale what layers give or take (Liu et al. 2022, arXiv 2205.05638)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from lora_jax.core.arrays import (
    Adapted,
    Label,
    Op,
    Tuned,
    adapted_array,
    factor_axes,
    map_adapted,
    scaled,
    static,
    widened,
)
from lora_jax.core.selection import CLASS, Absent, Selection, flatten, matches
from lora_jax.core.transforms import Delta, ParamTransform, Traits, all_layers, need_factors, per_leaf, register, sizes

_SHARED = "@shared/"


@adapted_array
class Rescaled(Adapted):
    """A weight or bias whose input or output axes are scaled, each entry by its own number."""

    layout: ClassVar = {"inputs": "si", "outputs": "so"}
    exact: ClassVar = ("inputs", "outputs")

    base: Array
    inputs: Array | None = None
    outputs: Array | None = None
    core: str = static()
    path: str = static(default=Label())

    def product(self, x: Array, op: Op) -> Array:
        base = lax.stop_gradient(self.base)
        y = op(x, base) if self.inputs is None else op.scale_input(x, base, self.inputs)
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
        flipped = self.core.translate(str.maketrans("ivko", "oooi"))
        return self.replace(inputs=self.outputs, outputs=self.inputs, core=flipped)

    def ready(self) -> Adapted:
        if set(self.core) - {"s", "o"}:
            return self
        # A bias meets a sum and no product: lift may as well know its value.
        return Tuned(value=self.replace(base=lax.stop_gradient(self.base)).materialize(), path=self.path)

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


def ia3(selection: Selection, *, feedforward: Iterable[str] = ()) -> ParamTransform:
    """`(x W + b) * l`, or `(x * l) W + b` for the weights that feed a layer back: l trains, 1 at first, W and b do not.

    A bias is scaled with its weight, if the weight's module has a leaf named `bias`: the l of both stands once in the
    delta, under `@shared/<module>`. Without one, and for `feedforward`, l is in the delta under the weight's path. Of a
    convolution's input l scales the channels, those of a group in every group. `merge` multiplies in; `unmerge`
    divides (a ValueError where an l is 0; under `jit`, where this cannot be seen, NaN).

    Args:
      selection: the weights, each with input and output axes. The paper takes the keys and values of attention and the
        second matrix of the MLP, the latter as feedforward.
      feedforward: globs. The selected weights that one of them matches are scaled on the input side.

    Raises:
      ValueError: a bias does not have the shape of its weight's output, two selected weights of a module would share
        it, or a glob of feedforward matches no selected weight.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> method = lj.ia3(lj.select("*/kernel"), feedforward="down/*")
    >>> layers = {"key": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "down": {"kernel": jnp.ones((5, 3))}}
    >>> print(method.init(jax.random.key(0), layers))
    Delta: 2 paths, 7 numbers
      @shared/key: l float32(2,)
      down/kernel: l float32(5,)
    """
    feedforward = (feedforward,) if isinstance(feedforward, str) else tuple(feedforward)

    def feeds(path: str) -> bool:
        return any(matches(glob, path) for glob in feedforward)

    def found(params: Any) -> dict[str, tuple[str, str]]:
        """`{path: (axes, key in the delta)}` of the selected weights and of the biases that go with them."""
        leaves, chosen = dict(flatten(params)[0]), selection(params)
        for glob in feedforward:
            if not any(matches(glob, path) for path in chosen):
                raise ValueError(f"feedforward={glob!r} matches none of the selected weights, {list(chosen)[:3]} ...")
        pairs: dict[str, tuple[str, str]] = {}
        for path, axes in chosen.items():
            size = sizes(leaves[path], axes)
            if not size["i"] or not size["o"]:
                raise ValueError(f"{path} with axes {axes!r}: IA3 needs a weight with input and output axes")
            module = path.rpartition("/")[0]
            bias = f"{module}/bias".lstrip("/")
            if bias not in leaves or feeds(path):
                pairs[path] = axes, path
            elif bias in pairs:
                raise ValueError(f"{path} is not the only selected weight beside {bias}: exclude all but one")
            else:
                bias_axes = _bias_axes(selection.axes, bias, leaves[bias], axes, size)
                pairs |= {path: (axes, _SHARED + module), bias: (bias_axes, _SHARED + module)}
        return pairs

    def shape(path: str, leaf: Any, axes: str) -> tuple[int, ...]:
        if isinstance(leaf, Absent):
            raise ValueError(f"{path} was taken out of these params (without_tuned); IA3 needs the base")
        size = sizes(leaf, axes, selection.layers)
        channels = tuple(n for n, letter in zip(leaf.shape, axes, strict=True) if letter in "iv")
        return (*size["s"], *(channels if feeds(path) else size["o"]))

    def init(key: Array, path: str, leaf: Any, axes: str) -> dict[str, Array]:
        return {"l": jnp.ones(shape(path, leaf, axes), jnp.float32)}

    def adapt(key: Array | None, path: str, leaf: Any, axes: str, factors: dict[str, Array], strength: Any) -> Rescaled:
        need_factors(path, factors, {"l": shape(path, leaf, axes)})
        size = sizes(leaf, axes)
        scale = all_layers(factors["l"], selection.layers, size["s"], fill=1.0)
        if not (isinstance(strength, float | int) and strength == 1):
            scale = 1 + jnp.asarray(strength, scale.dtype) * (scale - 1)
        if not feeds(path):
            return Rescaled(base=leaf, outputs=scale, core=axes.lstrip("s"), path=Label(path))
        letters = [letter for letter in axes if letter in "ivk"]
        window = [len(size["s"]) + n for n, letter in enumerate(letters) if letter == "k"]
        scale = jnp.broadcast_to(lax.expand_dims(scale, window), (*size["s"], *size["i"]))
        return Rescaled(base=leaf, inputs=scale, core=axes.lstrip("s"), path=Label(path))

    spec = {"method": "ia3", **selection.spec(), "feedforward": list(feedforward)}
    alone = per_leaf(spec, lambda params: {path: axes for path, (axes, _) in found(params).items()}, init, adapt)
    return _with_owners(alone, lambda params: {path: name for path, (_, name) in found(params).items()})


def _bias_axes(said: Any, bias: str, leaf: Any, axes: str, size: dict[str, tuple[int, ...]]) -> str:
    """The axes of a bias: those named for it, else those of its weight that are no input; the sizes must agree."""
    named = [a for glob, a in said.items() if matches(glob, bias)][:1] if isinstance(said, Mapping) else []
    for found in (*named, "".join(letter for letter in axes if CLASS[letter] != "i")):
        if len(found) == leaf.ndim and not set(found) - {"s", "o"}:
            if sizes(leaf, found) == size | {"i": ()}:
                return found
    raise ValueError(
        f"{bias} has shape {tuple(leaf.shape)}, but its weight with axes {axes!r} has outputs {size['s'] + size['o']}: "
        "name the axes of both with select(..., axes={glob: ...})"
    )


def _with_owners(alone: ParamTransform, owners: Callable[[Any], dict[str, str]]) -> ParamTransform:
    """The same transform, with the factors that a weight and its bias share once in the delta."""

    def init(key: Array, params: Any) -> Delta:
        each = alone.init(key, params)
        return Delta({name: each[path] for path, name in owners(params).items()})

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        if isinstance(params, Delta) or not isinstance(delta, Delta):
            return alone.apply(params, delta, key=key, strength=strength)  # which says what is wrong
        names = owners(map_adapted(lambda w: w.base, params))
        if wrong := set(names.values()) ^ set(delta):
            raise ValueError(f"the delta is not this method's: it lacks, or has besides, {sorted(wrong)[:3]}")
        each = Delta({path: delta[name] for path, name in names.items()})
        return alone.apply(params, each, key=key, strength=strength)

    return ParamTransform(init, apply, alone.spec)


register(
    "ia3",
    ia3,
    Traits(
        not_additive="it multiplies the base; merge it into the base",
        decays=(),  # 1 is what changes nothing, not 0
        fast=(),
        sharding={"**/l": PartitionSpec()},
    ),
)
