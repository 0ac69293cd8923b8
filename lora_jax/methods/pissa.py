"""PiSSA: LoRA that begins as the weight's principal part (Meng et al. 2024, arXiv 2404.02948)."""

import math
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from lora_jax.core.arrays import LowRank, Summed, adapted_array
from lora_jax.core.selection import Selection
from lora_jax.core.transforms import Factors, ParamTransform, Target, Traits, per_target, register
from lora_jax.methods.arguments import checked
from lora_jax.methods.changes import weight_matrix
from lora_jax.methods.lora import Options, Ranks, at_rank


@adapted_array
class Pissa(Summed):
    """base + scale * (A B - A0 B0), with A0 and B0 the frozen `fixed_a` and `fixed_b`."""

    layout: ClassVar = {"a": "sir", "b": "sro", "fixed_a": "sir", "fixed_b": "sro", "scale": "s"}
    a: Array
    b: Array
    fixed_a: Array
    fixed_b: Array
    scale: Array

    def ready(self) -> LowRank:
        # A B - A0 B0 = (A - A0) B + A0 (B - B0): exactly zero at first, and no small difference of large products
        a0, b0 = self.fixed_a, self.fixed_b
        a = jnp.concatenate([self.a - a0, a0], -1)
        b = jnp.concatenate([self.b, self.b - b0], self.scale.ndim)
        return LowRank(base=self.base, a=a, b=b, scale=self.scale, core=self.core, path=self.path)


@checked
def pissa(
    selection: Selection, *, rank: Ranks, alpha: Any = None, scale_rule: str = "alpha/r", dtype: Any = jnp.float32
) -> ParamTransform:
    """PiSSA: LoRA whose A and B begin as the weight's first `rank` singular triples.

    The weight becomes `W - scale * A0 B0 + scale * A B`, where A0 and B0 are what A and B begin as.

    With `W = U S V` (inputs times outputs), `A0 = U sqrt(S / scale)` and `B0 = sqrt(S / scale) V`, each cut to the
    rank (the paper's section 3); of each triple, the entry of U that is largest in size is positive. W itself is not
    rewritten: A0 and B0 stay in the delta, frozen, as `fixed_a` and `fixed_b`, so that the change is exactly zero at
    first, can be undone, and is a LoRA of twice the rank. There is no dropout: it would drop from the principal part.

    The options are those of `lora`; the scale must be above zero. `init` needs the values of the weights.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> lj.check(lj.pissa(lj.select("kernel"), rank=2), {"kernel": jnp.ones((100, 70))}).trained
    340
    """
    low = Options(selection=selection, rank=rank, alpha=alpha, scale_rule=scale_rule, dtype=dtype)

    def shapes(target: Target) -> dict[str, tuple[int, ...]]:
        start = low.shapes(target)
        return start | {f"fixed_{name}": shape for name, shape in start.items()}

    def init(key: Array, target: Target) -> Factors:
        shape, scale = low.shapes(target), low.scale(target.path)
        if isinstance(scale, int | float) and scale <= 0:
            raise ValueError(f"{target.path}: PiSSA divides singular values by scale = {scale}; take an alpha above 0")
        matrices = weight_matrix(target.leaf, target.axes).reshape(*target.stack, math.prod(target.inputs), -1)
        start = _principal(target.adapted_layers(matrices), shape["a"][-1], scale)
        factors = {name: x.reshape(shape[name]).astype(dtype) for name, x in zip("ab", start, strict=True)}
        return factors | {f"fixed_{name}": jnp.array(x, copy=True) for name, x in factors.items()}

    def adapt(target: Target, factors: Factors, key: Array | None, strength: Any) -> Pissa:
        every_layer: dict[str, Any] = {name: target.all_layers(factor) for name, factor in factors.items()}
        return Pissa(**target.fields, **every_layer, scale=target.scale(strength * low.scale(target.path)))

    spec = {"method": "pissa", **selection.spec(), "rank": low.rank, "alpha": low.alpha}
    spec |= {"scale_rule": scale_rule, "dtype": jnp.dtype(dtype).name}
    return per_target(spec, selection, init, adapt, shapes=shapes, globs=low.globs)


def _principal(w: Array, rank: int, scale: Any) -> tuple[Array, Array]:
    """A `(s.., in, r)` and B `(s.., r, out)`, with scale * A B the best approximation of w of that rank."""
    u, values, v = jnp.linalg.svd(w, full_matrices=False)
    u, v = u[..., :rank], v[..., :rank, :]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), -2)[..., None, :], -2)
    root = jnp.sqrt(values[..., None, :rank] / jnp.asarray(scale, w.dtype)) * jnp.where(largest < 0, -1, 1)
    return u * root, root.swapaxes(-1, -2) * v


register("pissa", pissa, Traits(at_rank=at_rank))
