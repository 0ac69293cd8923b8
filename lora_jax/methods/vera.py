"""VeRA: one frozen random pair of matrices for all weights, and trained vectors (Kopiczko et al. 2024, 2310.11454)."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.arrays import Adapted, Label, LowRank, adapted_array, map_adapted, static
from lora_jax.selection import Absent, Selection, flatten
from lora_jax.transforms import (
    Delta,
    ParamTransform,
    all_layers,
    need_factors,
    per_leaf,
    register,
    sizes,
    stable_hash,
    typed_key,
)

_SHARED = "@shared/vera"


@adapted_array
class Vera(Adapted):
    """base + scale * A diag(d) B diag(b): A `(s.., i.., r)`, B `(s.., r, o..)` frozen, d `(s.., r)`, b `(s.., o..)`."""

    layout: ClassVar = {"fixed_a": "sir", "fixed_b": "sro", "d": "sr", "b": "so", "scale": "s"}

    base: Array
    fixed_a: Array
    fixed_b: Array
    d: Array
    b: Array
    scale: Array
    core: str = static()
    path: str = static(default=Label())

    def ready(self) -> LowRank:
        # As a product of low rank, what is right for LoRA is right here.
        stacked = self.scale.ndim
        a = lax.stop_gradient(self.fixed_a) * lax.expand_dims(self.d, range(stacked, self.fixed_a.ndim - 1))
        b = lax.stop_gradient(self.fixed_b) * lax.expand_dims(self.b, [stacked])
        return LowRank(base=self.base, a=a, b=b, scale=self.scale, core=self.core, path=self.path)

    def materialize(self) -> Array:
        return self.ready().materialize()

    def remove(self) -> Array:
        return self.ready().remove()


def vera(selection: Selection, *, rank: int, d_initial: float = 0.1) -> ParamTransform:
    """`x W + x A diag(d) B diag(b)`: the vectors d and b train; A and B are random, frozen, and the same for all.

    A has the input and B the output of the largest weight; a weight takes the first rows of A and columns of B, as many
    as its input and output have. In the delta they are `@shared/vera`, as PEFT has them: `fixed_a` (rank, in) and
    `fixed_b` (out, rank), U(-sqrt(6/n), sqrt(6/n)) with n their second size. A chain has room for one VeRA.

    Args:
      selection: the weights; each needs named input and output axes.
      rank: that of A and B, 1 or more; above min(in, out) too (the paper takes up to 1024).
      d_initial: of every entry of d `(s.., rank)`; b `(s.., o..)` is zero at first.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> lj.check(lj.vera(lj.select("*"), rank=8), {"small": jnp.ones((3, 2)), "large": jnp.ones((5, 4))}).trained
    22
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r} must be a whole number from 1")

    def shapes(path: str, leaf: Any, axes: str) -> dict[str, tuple[int, ...]]:
        size = sizes(leaf, axes, selection.layers)
        if isinstance(leaf, Absent) or not size["i"] or not size["o"]:
            raise ValueError(f"{path} with axes {axes!r}: VeRA needs a weight with input and output axes")
        return {"b": (*size["s"], *size["o"]), "d": (*size["s"], rank)}

    def shared_shapes(params: Any) -> dict[str, tuple[int, ...]]:
        leaves = dict(flatten(params)[0])
        every = [sizes(leaves[path], axes) for path, axes in selection(params).items()]
        largest = {side: max(math.prod(size[side]) for size in every) for side in "io"}
        return {"fixed_a": (rank, largest["i"]), "fixed_b": (largest["o"], rank)}

    def init_leaf(key: Array, path: str, leaf: Any, axes: str) -> dict[str, Array]:
        shape = shapes(path, leaf, axes)
        return {"b": jnp.zeros(shape["b"], jnp.float32), "d": jnp.full(shape["d"], d_initial, jnp.float32)}

    def adapt(key: Array | None, path: str, leaf: Any, axes: str, factors: dict[str, Array], strength: Any) -> Vera:
        shared = {name: factors[name] for name in ("fixed_a", "fixed_b")}
        own = {name: factor for name, factor in factors.items() if name not in shared}
        need_factors(path, own, shapes(path, leaf, axes))
        size = sizes(leaf, axes)
        a = shared["fixed_a"][:, : math.prod(size["i"])].T.reshape(*size["i"], rank)
        b = shared["fixed_b"][: math.prod(size["o"])].T.reshape(rank, *size["o"])
        return Vera(
            base=leaf,
            # once a layer, so that an adapted stack can be indexed and scanned like any other
            fixed_a=jnp.broadcast_to(a, (*size["s"], *a.shape)),
            fixed_b=jnp.broadcast_to(b, (*size["s"], *b.shape)),
            **{name: all_layers(factor, selection.layers, size["s"]) for name, factor in own.items()},
            scale=jnp.broadcast_to(jnp.asarray(strength, jnp.float32), size["s"]),
            core=axes.lstrip("s"),
            path=Label(path),
        )

    spec = {"method": "vera", **selection.spec(), "rank": rank, "d_initial": d_initial}
    alone = per_leaf(spec, selection.__call__, init_leaf, adapt)

    def init(key: Array, params: Any) -> Delta:
        delta = alone.init(key, params)
        key = jax.random.fold_in(typed_key(key), stable_hash(_SHARED))
        delta[_SHARED] = {
            name: jax.random.uniform(each, shape, jnp.float32, -math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1]))
            for each, (name, shape) in zip(jax.random.split(key), shared_shapes(params).items(), strict=True)
        }
        return delta

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        if isinstance(params, Delta) or not isinstance(delta, Delta):
            return alone.apply(params, delta, key=key, strength=strength)  # which says what is wrong
        shared = delta.get(_SHARED, {})
        need_factors(_SHARED, shared, shared_shapes(map_adapted(lambda w: w.base, params)))
        each = Delta({path: factors | shared for path, factors in delta.items() if path != _SHARED})
        return alone.apply(params, each, key=key, strength=strength)

    return ParamTransform(init, apply, spec)


register("vera", vera)
