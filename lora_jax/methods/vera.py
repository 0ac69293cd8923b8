"""VeRA: one frozen random pair of matrices for all weights, and trained vectors (Kopiczko et al. 2024, 2310.11454)."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.arrays import Adapted, Label, LowRank, adapted_array, map_adapted, static
from lora_jax.core.selection import Absent, Selection, flatten, matches
from lora_jax.core.transforms import (
    Delta,
    ParamTransform,
    Traits,
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


def vera(selection: Selection, *, rank: int, d_initial: float = 0.1, fused: Iterable[str] = ()) -> ParamTransform:
    """`x W + x A diag(d) B diag(b)`: the vectors d and b train; A and B are random, frozen, and the same for all.

    A has the input and B the output of the largest weight; a weight takes the first rows of A and columns of B, as many
    as its input and output have. In the delta they are `@shared/vera`, as PEFT has them: `fixed_a` (rank, in) and
    `fixed_b` (out, rank), U(-sqrt(6/n), sqrt(6/n)) with n their second size. A chain has room for one VeRA.

    Args:
      selection: the weights; each needs named input and output axes.
      rank: that of A and B, 1 or more; above min(in, out) too (the paper takes up to 1024).
      d_initial: of every entry of d `(s.., rank)`; b `(s.., o..)` is zero at first.
      fused: globs like `**/attn/{query,key,value}/kernel`. The weights that the last braces of one name in a module are
        one layer's outputs side by side, in that order, as in PEFT's adapters of GPT-2's c_attn: they have one d,
        `@shared/h_0/attn` in the delta, and B's columns one after the other.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> lj.check(lj.vera(lj.select("*"), rank=8), {"small": jnp.ones((3, 2)), "large": jnp.ones((5, 4))}).trained
    22
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r} must be a whole number from 1")
    fused = (fused,) if isinstance(fused, str) else tuple(fused)

    def places(params: Any) -> dict[str, tuple[str, int]]:
        leaves, chosen = dict(flatten(params)[0]), selection(params)
        return _places(fused, {path: math.prod(sizes(leaves[path], axes)["o"]) for path, axes in chosen.items()})

    def shapes(path: str, leaf: Any, axes: str) -> dict[str, tuple[int, ...]]:
        size = sizes(leaf, axes, selection.layers)
        if isinstance(leaf, Absent) or not size["i"] or not size["o"]:
            raise ValueError(f"{path} with axes {axes!r}: VeRA needs a weight with input and output axes")
        return {"b": (*size["s"], *size["o"]), "d": (*size["s"], rank)}

    def shared_shapes(params: Any) -> dict[str, tuple[int, ...]]:
        leaves = dict(flatten(params)[0])
        chosen, where = selection(params), places(params)
        every = {path: sizes(leaves[path], axes) for path, axes in chosen.items()}
        rows = max(math.prod(size["i"]) for size in every.values())
        columns = max(where[path][1] + math.prod(size["o"]) for path, size in every.items())
        return {"fixed_a": (rank, rows), "fixed_b": (columns, rank)}

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
    spec |= {"fused": list(fused)} if fused else {}
    alone = per_leaf(spec, selection.__call__, init_leaf, adapt)

    def init(key: Array, params: Any) -> Delta:
        delta = alone.init(key, params)
        for path, (owner, _) in places(params).items():
            if owner != path:
                delta[owner] = {"d": delta[path].pop("d")}
        key = jax.random.fold_in(typed_key(key), stable_hash(_SHARED))
        delta[_SHARED] = {
            name: jax.random.uniform(each, shape, jnp.float32, -math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1]))
            for each, (name, shape) in zip(jax.random.split(key), shared_shapes(params).items(), strict=True)
        }
        return delta

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        if isinstance(params, Delta) or not isinstance(delta, Delta):
            return alone.apply(params, delta, key=key, strength=strength)  # which says what is wrong
        base, shared = map_adapted(lambda w: w.base, params), delta.get(_SHARED, {})
        need_factors(_SHARED, shared, shared_shapes(base))
        where = places(base)
        if wrong := set(delta) ^ {_SHARED, *where, *(owner for owner, _ in where.values())}:
            raise ValueError(f"the delta is not this method's: it lacks, or has besides, {sorted(wrong)[:3]}")
        each = Delta()
        for path, (owner, start) in where.items():
            if owner != path and "d" in delta[path]:
                raise ValueError(f"{path} has a d of its own, but its d is that of {owner}")
            each[path] = delta[owner] | delta[path] | shared | {"fixed_b": shared["fixed_b"][start:]}
        return alone.apply(params, each, key=key, strength=strength)

    return ParamTransform(init, apply, spec)


def _places(fused: tuple[str, ...], outputs: dict[str, int]) -> dict[str, tuple[str, int]]:
    """`{path: (key of its d, where its columns of B begin)}` of the selected weights, with that many outputs."""
    found = {path: (path, 0) for path in outputs}
    for glob in fused:
        before, opened, rest = glob.rpartition("{")
        inner, _, after = rest.partition("}")
        ends: dict[str, list[int]] = {}
        for name in inner.split(","):
            for path in (path for path in outputs if matches(before + name + after, path)):
                owner = "@shared/" + "/".join(path.split("/")[:-2])
                starts = ends.setdefault(owner, [0])
                found[path] = owner, starts[-1]
                starts.append(starts[-1] + outputs[path])
        if not opened or not ends:
            raise ValueError(
                f"fused={glob!r} names no parts in braces, or none of the selected {list(outputs)[:3]} ..."
            )
        if wrong := [owner for owner, starts in ends.items() if len(starts) != 2 + inner.count(",")]:
            raise ValueError(f"fused={glob!r}: not all of {inner} are selected in {wrong[0].removeprefix('@shared/')}")
    return found


register("vera", vera, Traits(at_rank=lambda spec, rank: spec | {"rank": rank}, decays=(), fast=()))
