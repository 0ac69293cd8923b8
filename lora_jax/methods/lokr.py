"""LoKr: a change that is a Kronecker product of two small matrices (Yeh et al. 2023, arXiv 2309.14859)."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.arrays import Op, Summed, adapted_array, sides, static, widened
from lora_jax.core.lifting.rules import Dot, LookUp
from lora_jax.core.selection import Selection, glob_keys, look_up
from lora_jax.core.transforms import Factors, ParamTransform, Target, Traits, per_target, register
from lora_jax.methods.arguments import checked
from lora_jax.methods.lora import ALPHA, Ranks
from lora_jax.methods.ranges import COUNT, Range

Matrices = list[Array]  # (in, out) each, to be multiplied


@adapted_array
class Kronecker(Summed):
    """base + scale * (w1 x w2), with outputs (p, m) and inputs (q, n), the window of a convolution after n.

    w1 `(s.., p, q)` may be the product of w1_a `(s.., p, r)` and w1_b `(s.., r, q)`, and so may w2 `(s.., m, n)`.
    """

    layout: ClassVar = {
        "w1": "spq",
        "w1_a": "spr",
        "w1_b": "srq",
        "w2": "smn",
        "w2_a": "smr",
        "w2_b": "srn",
        "scale": "s",
    }
    indivisible: ClassVar = True
    w1: Array | None = None
    w1_a: Array | None = None
    w1_b: Array | None = None
    w2: Array | None = None
    w2_a: Array | None = None
    w2_b: Array | None = None
    scale: Array
    window: int = static(default=1)

    def product(self, x: Array, op: Op) -> Array:
        (first, second), y = self._matrices(), super().product(x, op)
        if isinstance(op, LookUp):
            change = _looked_up(op, x, first, second)
        elif isinstance(op, Dot) and "k" not in self.core:
            change = _multiplied(op, x, first, second)
        else:
            return y + op(x, self.delta().astype(x.dtype)).astype(y.dtype)
        change = change * self.scale.astype(change.dtype)
        return y + change.astype(y.dtype).reshape(y.shape)

    def delta(self) -> Array:
        first, second = ([w.astype(widened(self.dtype)) for w in ws] for ws in self._matrices())
        product = functools.partial(jnp.matmul, precision="highest")
        w1, w2 = functools.reduce(product, first), functools.reduce(product, second)
        w2 = w2.reshape(*w2.shape[:-2], -1, self.window, w2.shape[-1])
        w1 = w1 * lax.expand_dims(self.scale.astype(w1.dtype), [-2, -1])
        dense = jnp.einsum("...qp,...nwm->...qnwpm", w1, w2, precision="highest")
        order = [axis for side in ("s", "iv", "k", "o") for axis, letter in enumerate(self.axes) if letter in side]
        dense = dense.reshape([self.shape[axis] for axis in order])
        return dense.transpose(sorted(range(self.ndim), key=order.__getitem__))

    def transposed(self) -> "Kronecker | None":
        if self.window > 1:
            return None
        exchanged = {"w1": self.w1, "w1_a": self.w1_b, "w1_b": self.w1_a}
        exchanged |= {"w2": self.w2, "w2_a": self.w2_b, "w2_b": self.w2_a}
        factors = {name: None if w is None else w.swapaxes(-1, -2) for name, w in exchanged.items()}
        return self.replace(core=self.flipped, **factors)

    def _matrices(self) -> tuple[Matrices, Matrices]:
        """w1 and w2 from input to output, each one matrix or two to be multiplied."""
        w1, w2 = ([getattr(self, name + end) for end in ("_b", "_a", "")] for name in ("w1", "w2"))
        w1, w2 = ([w.swapaxes(-1, -2) for w in ws if w is not None] for ws in (w1, w2))
        inputs = w1[0].shape[-2] * w2[0].shape[-2] // self.window
        if sides(self) != (self.window, inputs, w1[-1].shape[-1] * w2[-1].shape[-1]):
            raise ValueError(f"{self.path}: {self.shape} is a part of a weight, of which no Kronecker product is known")
        return w1, w2


def _multiplied(op: Dot, x: Array, first: Matrices, second: Matrices) -> Array:
    """x times the Kronecker product of two matrices, ending in one axis for all outputs."""
    op = dataclasses.replace(op, out_sharding=None)  # which is the whole product's
    z = x.reshape(*x.shape[: x.ndim - op.count], first[0].shape[0], second[0].shape[0])
    z = functools.reduce(op.up, second, z).swapaxes(-1, -2)
    z = functools.reduce(op.up, first, z).swapaxes(-1, -2)
    return z.reshape(*z.shape[:-2], -1)


def _looked_up(op: LookUp, ids: Array, first: Matrices, second: Matrices) -> Array:
    """Rows of the Kronecker product of two matrices, ending in one axis for all outputs."""
    promises = {"unique_indices": False, "indices_are_sorted": False}  # which do not hold for the parts of the ids
    op = dataclasses.replace(op, how=tuple((dict(op.how) | promises).items()))
    q, n = first[0].shape[0], second[0].shape[0]
    high = op(ids // n, first[0])  # no row where the id is none
    low = op(jnp.clip(ids, 0, q * n - 1) % n, second[0])
    high, low = functools.reduce(op.up, first[1:], high), functools.reduce(op.up, second[1:], low)
    return (high[..., :, None] * low[..., None, :]).reshape(*ids.shape, -1)


@checked
def lokr(
    selection: Selection, *, rank: Ranks, alpha: Any = None, decompose_both: bool = False, decompose_factor: int = -1
) -> ParamTransform:
    """LoKr: a trained Kronecker product beside each weight, `W + alpha/rank * (w1 x w2)`; W is frozen.

    w1 is (out_1, in_1) and w2 (out_2, in_2).

    The sizes and the initialization are PEFT's: `out = out_1 * out_2` and `in = in_1 * in_2` by `factorization`. A side
    is low-rank, w2 = w2_a w2_b, where rank is less than half its longer size; w1 only with `decompose_both`. w1 (or
    w1_a) is zero, the others U(-1/sqrt(n), 1/sqrt(n)), with n their second size. Several input or output axes count as
    one; the window of a convolution goes with in_2. The delta's factors are `(s.., out, in)` whatever the base's axes.
    A product or embedding lookup becomes two small ones; the change of a convolution is made dense. What cuts
    an input or output axis or changes the order of several (the split of a fused kernel) gets the weight dense.

    Args:
      selection: the weights; each needs named input and output axes.
      rank: 1 or more, or a mapping glob -> rank (first match wins; no match is an error).
      alpha: scale = alpha / rank, also where no side is low-rank; a number (it may be traced) or a mapping; the rank
        where None.
      decompose_both: whether w1 may be low-rank too.
      decompose_factor: the size of out_1 and in_1 where it divides; -1: the nearest to a square root.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> lj.lokr(lj.select("kernel"), rank=2).init(jax.random.key(0), {"kernel": jnp.ones((120, 64))})
    Delta: 1 paths, 120 numbers
      kernel: w1 float32(8, 10), w2_a float32(8, 2), w2_b float32(2, 12)
    """
    rank, alpha = COUNT("rank", rank), ALPHA("alpha", alpha)
    decompose_factor = Range(least=1, whole=True, other=-1)("decompose_factor", decompose_factor)

    def shapes(target: Target) -> dict[str, tuple[int, ...]]:
        return _shapes(target, look_up(rank, target.path, "rank"), decompose_both, decompose_factor)

    def init(key: Array, target: Target) -> Factors:
        factors = {}
        for name, shape in shapes(target).items():
            if name in ("w1", "w1_a"):
                factors[name] = jnp.zeros(shape, jnp.float32)
                continue
            key, factor_key = jax.random.split(key)
            bound = 1 / math.sqrt(math.prod(shape[len(target.stack) + 1 :]))
            factors[name] = jax.random.uniform(factor_key, shape, jnp.float32, -bound, bound)
        return factors

    def adapt(target: Target, factors: Factors, key: Array | None, strength: Any) -> Kronecker:
        scale = 1.0 if alpha is None else look_up(alpha, target.path, "alpha") / look_up(rank, target.path, "rank")
        matrices = {name: w.reshape(*w.shape[: len(target.stack) + 1], -1) for name, w in factors.items()}
        every_layer: dict[str, Any] = {name: target.all_layers(w) for name, w in matrices.items()}
        window = math.prod(target.sizes("k"))
        return Kronecker(**target.fields, **every_layer, scale=target.scale(strength * scale), window=window)

    spec = {"method": "lokr", **selection.spec(), "rank": rank, "alpha": alpha}
    spec |= {"decompose_both": decompose_both, "decompose_factor": decompose_factor}
    return per_target(spec, selection, init, adapt, shapes=shapes, globs=glob_keys(rank, alpha))


def _shapes(target: Target, r: int, decompose_both: bool, factor: int) -> dict[str, tuple[int, ...]]:
    target.need_weight("LoKr")
    p, m = factorization(math.prod(target.outputs), factor)
    q, n = factorization(math.prod(target.sizes("iv")), factor)
    w1 = {"w1_a": (p, r), "w1_b": (r, q)} if decompose_both and r < max(p, q) / 2 else {"w1": (p, q)}
    low_rank = {"w2_a": (m, r), "w2_b": (r, n * math.prod(target.sizes("k")))}
    w2 = low_rank if r < max(m, n) / 2 else {"w2": (m, n, *target.sizes("k"))}
    return {name: (*target.stacked, *shape) for name, shape in {**w1, **w2}.items()}


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """`(m, n)` with m * n = size: m is `factor` where it divides, else the largest m <= n that is not above it.

    >>> factorization(128), factorization(127), factorization(128, 4), factorization(128, 5)
    ((8, 16), (1, 127), (4, 32), (4, 32))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = next(m for m in range(most, 0, -1) if size % m == 0)
    return m, size // m


register("lokr", lokr, Traits(decays=("**/{w1,w1_a,w1_b,w2,w2_a,w2_b}",), fast=()))
