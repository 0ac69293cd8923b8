"""VeRA: one frozen random pair of matrices for all weights, and trained vectors (Kopiczko et al. 2024, 2310.11454)."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core import transforms
from lora_jax.core.arrays import LowRank, Summed, adapted_array
from lora_jax.core.globs import matches
from lora_jax.core.selection import Selection, strings
from lora_jax.core.transforms import Factors, Params, ParamTransform, Target
from lora_jax.methods.arguments import checked
from lora_jax.methods.ranges import COUNT, FINITE


@adapted_array
class Vera(Summed):
    """base + scale * A diag(d) B diag(b): A `(s.., i.., r)`, B `(s.., r, o..)` frozen, d `(s.., r)`, b `(s.., o..)`."""

    layout: ClassVar = {"fixed_a": "sir", "fixed_b": "sro", "d": "sr", "b": "so", "scale": "s"}
    fixed_a: Array
    fixed_b: Array
    d: Array
    b: Array
    scale: Array

    def ready(self) -> LowRank:
        stacked = self.scale.ndim
        a = self.fixed_a * lax.expand_dims(self.d, range(stacked, self.fixed_a.ndim - 1))
        b = self.fixed_b * lax.expand_dims(self.b, [stacked])
        return LowRank(base=self.base, a=a, b=b, scale=self.scale, core=self.core, path=self.path)


@dataclasses.dataclass(frozen=True)
class Part(Target):
    """A weight whose columns of B begin at `start`."""

    start: int = 0


@checked
def vera(selection: Selection, *, rank: int, d_initial: float = 0.1, fused: Iterable[str] = ()) -> ParamTransform:
    """VeRA: two trained vectors a weight, d and b, between random matrices that all weights share.

    A layer computes `x W + x A diag(d) B diag(b)`; A and B are frozen.

    A has the input and B the output of the largest weight; a weight takes the first rows of A and columns of B, as many
    as its input and output have. In the delta they are `@shared/vera`, as PEFT has them: `fixed_a` (rank, in) and
    `fixed_b` (out, rank), U(-sqrt(6/n), sqrt(6/n)) with n their second size. A chain can have one VeRA.

    Args:
      selection: the weights; each needs named input and output axes.
      rank: that of A and B, 1 or more; above min(in, out) too (the paper takes up to 1024).
      d_initial: of every entry of d `(s.., rank)`; b `(s.., o..)` is zero at first.
      fused: globs like `**/attn/{query,key,value}/kernel`: what the last braces name in a module are a layer's outputs
        side by side, in that order, as in PEFT's adapters of GPT-2's c_attn. They have one d, `@shared/h_0/attn` in
        the delta, and B's columns one after the other.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> lj.check(lj.vera(lj.select("*"), rank=8), {"small": jnp.ones((3, 2)), "large": jnp.ones((5, 4))}).trained
    22
    """
    rank, d_initial = COUNT("rank", rank), FINITE("d_initial", d_initial)
    fused = strings(fused)

    def targets(params: Params) -> list[Part]:
        plain = transforms.targets_of(selection, params)
        parts = _parts(fused, {target.path: math.prod(target.outputs) for target in plain})
        return [Part(t.path, t.leaf, t.axes, t.layers, *parts[t.path]) for t in plain]

    def shapes(target: Target) -> dict[str, tuple[int, ...]]:
        target.need_weight("VeRA")
        return {"b": (*target.stacked, *target.outputs), "d": (*target.stacked, rank)}

    def init(key: Array, target: Target) -> Factors:
        shape = shapes(target)
        return {"b": jnp.zeros(shape["b"], jnp.float32), "d": jnp.full(shape["d"], d_initial, jnp.float32)}

    def projections(key: Array, targets: Sequence[Any]) -> Factors:
        rows = max(math.prod(part.inputs) for part in targets)
        columns = max(part.start + math.prod(part.outputs) for part in targets)
        key_a, key_b = jax.random.split(jax.random.fold_in(key, transforms.stable_hash("@shared/vera")))
        return {"fixed_a": _uniform(key_a, (rank, rows)), "fixed_b": _uniform(key_b, (columns, rank))}

    def adapt(target: Any, factors: Factors, key: Array | None, strength: Any) -> Vera:
        inputs, outputs = math.prod(target.inputs), math.prod(target.outputs)
        a = factors["fixed_a"][:, :inputs].T.reshape(*target.inputs, rank)
        b = factors["fixed_b"][target.start : target.start + outputs].T.reshape(rank, *target.outputs)
        # once a layer, so that an adapted stack can be indexed and scanned like any other
        a, b = (jnp.broadcast_to(x, (*target.stack, *x.shape)) for x in (a, b))
        vectors = {name: target.all_layers(factors[name]) for name in ("d", "b")}
        return Vera(**target.fields, **vectors, fixed_a=a, fixed_b=b, scale=target.scale(strength))

    spec = {"method": "vera", **selection.spec(), "rank": rank, "d_initial": d_initial}
    spec |= {"fused": list(fused)} if fused else {}
    return transforms.per_target(spec, targets, init, adapt, shapes=shapes, common=projections)


def _uniform(key: Array, shape: tuple[int, int]) -> Array:
    bound = math.sqrt(6 / shape[1])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _parts(fused: tuple[str, ...], outputs: dict[str, int]) -> dict[str, tuple[dict[str, str], int]]:
    """`{path: ({"d": shared key}, first column of B)}` of weights with so many outputs; `({}, 0)` where not fused."""
    parts: dict[str, tuple[dict[str, str], int]] = {path: ({}, 0) for path in outputs}
    for glob in fused:
        before, opened, rest = glob.rpartition("{")
        inner, _, after = rest.partition("}")
        ends: dict[str, list[int]] = {}  # of the columns of a module's parts so far
        for name in inner.split(","):
            for path in (path for path in outputs if matches(before + name + after, path)):
                module = "/".join(path.split("/")[:-2])
                starts = ends.setdefault(module, [0])
                parts[path] = {"d": f"@shared/{module}"}, starts[-1]
                starts.append(starts[-1] + outputs[path])
        if not opened or not ends:
            shown = f"{list(outputs)[:3]} ..."
            raise ValueError(f"fused={glob!r} names no parts in braces, or none of the selected {shown}")
        if wrong := [module for module, starts in ends.items() if len(starts) != 2 + inner.count(",")]:
            raise ValueError(f"fused={glob!r}: not all of {inner} are selected in {wrong[0]}")
    return parts


traits = transforms.Traits(at_rank=lambda spec, rank: spec | {"rank": rank}, decays=(), fast=())
transforms.register("vera", vera, traits)
