"""LoKr: a change that is a Kronecker product of two small matrices (Yeh et al. 2023, arXiv 2309.14859)."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.arrays import Adapted, Label, Op, adapted_array, rounded_sum, sides, static, widened
from lora_jax.core.lifting.rules import Dot, LookUp
from lora_jax.core.selection import Absent, Selection, look_up
from lora_jax.core.transforms import ParamTransform, Traits, all_layers, need_factors, per_leaf, register, sizes

Chain = list[Array]  # matrices (in, out), to be multiplied


@adapted_array
class Kronecker(Adapted):
    """base + scale * (w1 x w2), with outputs (p, m) and inputs (q, n), the window of a convolution after n.

    w1 `(s.., p, q)` may be the product of w1_a `(s.., p, r)` and w1_b `(s.., r, q)`, and so may w2 `(s.., m, n)`.
    """

    layout: ClassVar = {
        **{"w1": "spq", "w1_a": "spr", "w1_b": "srq"},
        **{"w2": "smn", "w2_a": "smr", "w2_b": "srn"},
        "scale": "s",
    }
    whole: ClassVar = True

    base: Array
    w1: Array | None = None
    w1_a: Array | None = None
    w1_b: Array | None = None
    w2: Array | None = None
    w2_a: Array | None = None
    w2_b: Array | None = None
    scale: Array
    window: int = static(default=1)
    core: str = static()
    path: str = static(default=Label())

    def product(self, x: Array, op: Op) -> Array:
        first, second = self._chains()
        y = op(x, lax.stop_gradient(self.base))
        if isinstance(op, LookUp):
            change = _looked_up(op, x, first, second)
        elif isinstance(op, Dot) and "k" not in self.core:
            change = _multiplied(op, x, first, second)
        else:
            return y + op(x, self.delta().astype(x.dtype)).astype(y.dtype)
        change = change * lax.stop_gradient(self.scale).astype(change.dtype)
        return y + change.astype(y.dtype).reshape(y.shape)

    def delta(self) -> Array:
        """The change in the base's axes, float32 (or wider)."""
        first, second = ([w.astype(widened(self.dtype)) for w in ws] for ws in self._chains())
        product = functools.partial(jnp.matmul, precision="highest")
        w1, w2 = functools.reduce(product, first), functools.reduce(product, second)
        w2 = w2.reshape(*w2.shape[:-2], -1, self.window, w2.shape[-1])
        w1 = w1 * lax.expand_dims(self.scale.astype(w1.dtype), [-2, -1])
        dense = jnp.einsum("...qp,...nwm->...qnwpm", w1, w2, precision="highest")
        order = [axis for side in ("s", "iv", "k", "o") for axis, letter in enumerate(self.axes) if letter in side]
        dense = dense.reshape([self.shape[axis] for axis in order])
        return dense.transpose(sorted(range(self.ndim), key=order.__getitem__))

    def materialize(self) -> Array:
        return rounded_sum(self.base, self.delta(), self.dtype)

    def remove(self) -> Array:
        return rounded_sum(self.base, -self.delta(), self.dtype)

    def transposed(self) -> "Kronecker | None":
        if self.window > 1:
            return None
        names = {"w1": "w1", "w1_a": "w1_b", "w1_b": "w1_a", "w2": "w2", "w2_a": "w2_b", "w2_b": "w2_a"}
        turned = {new: getattr(self, old) for new, old in names.items()}
        turned = {name: None if w is None else w.swapaxes(-1, -2) for name, w in turned.items()}
        return self.replace(core=self.core.translate(str.maketrans("ivko", "oooi")), **turned)

    def _chains(self) -> tuple[Chain, Chain]:
        """w1 and w2, each from input to output: one matrix, or two."""
        chains = [
            [w.swapaxes(-1, -2) for end in ("_b", "_a", "") if (w := getattr(self, name + end)) is not None]
            for name in ("w1", "w2")
        ]
        first, second = chains
        inputs = first[0].shape[-2] * second[0].shape[-2] // self.window
        if sides(self) != (self.window, inputs, first[-1].shape[-1] * second[-1].shape[-1]):
            raise ValueError(f"{self.path}: {self.shape} is a part of a weight, of which no Kronecker product is known")
        return first, second


def _multiplied(op: Dot, x: Array, first: Chain, second: Chain) -> Array:
    """x times the Kronecker product of two matrices, ending in one axis for all outputs."""
    op = dataclasses.replace(op, out_sharding=None)  # which is the whole product's
    z = x.reshape(*x.shape[: x.ndim - op.count], first[0].shape[0], second[0].shape[0])
    z = functools.reduce(op.then, second, z).swapaxes(-1, -2)
    z = functools.reduce(op.then, first, z).swapaxes(-1, -2)
    return z.reshape(*z.shape[:-2], -1)


def _looked_up(op: LookUp, ids: Array, first: Chain, second: Chain) -> Array:
    """Rows of the Kronecker product of two matrices, ending in one axis for all outputs."""
    promises = {"unique_indices": False, "indices_are_sorted": False}  # which do not hold for the parts of the ids
    op = dataclasses.replace(op, how=tuple((dict(op.how) | promises).items()))
    q, n = first[0].shape[0], second[0].shape[0]
    high = op(ids // n, first[0])  # no row where the id is none
    low = op(jnp.clip(ids, 0, q * n - 1) % n, second[0])
    high, low = functools.reduce(op.then, first[1:], high), functools.reduce(op.then, second[1:], low)
    return (high[..., :, None] * low[..., None, :]).reshape(*ids.shape, -1)


def lokr(
    selection: Selection,
    *,
    rank: int | Mapping[str, int],
    alpha: Any = None,
    decompose_both: bool = False,
    decompose_factor: int = -1,
) -> ParamTransform:
    """`W + alpha/rank * (w1 x w2)`, the Kronecker product of w1 (out_1, in_1) and w2 (out_2, in_2); W is frozen.

    The sizes and the initialization are PEFT's: `out = out_1 * out_2` and `in = in_1 * in_2` by `factorization`. A side
    is low-rank, w2 = w2_a w2_b, where rank is less than half its longer size; w1 only with `decompose_both`. w1 (or
    w1_a) is zero, the others U(-1/sqrt(n), 1/sqrt(n)), with n their second size. Several input or output axes count as
    one; the window of a convolution goes with in_2. The delta's factors are `(s.., out, in)` whatever the base's axes.

    Products and look-ups are two thin ones. The change of a convolution is made dense, which is small. What cuts an
    input or output axis or changes the order of several (the split of a fused kernel) gets the weight dense, as `lift`
    reports; heads made of one axis, or joined, do not.

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
    if decompose_factor != -1 and decompose_factor < 1:
        raise ValueError(f"decompose_factor={decompose_factor!r}: a whole number from 1, or -1 for the square root")

    def shapes(path: str, leaf: Any, axes: str) -> dict[str, tuple[int, ...]]:
        size, r = sizes(leaf, axes, selection.layers), look_up(rank, path, "rank")
        if isinstance(leaf, Absent) or not size["i"] or not size["o"]:
            raise ValueError(f"{path} with axes {axes!r}: LoKr needs a weight with input and output axes")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"{path}: rank={r!r} must be a whole number from 1")
        window = _window(leaf, axes)
        (p, m), (q, n) = (
            factorization(count, decompose_factor)
            for count in (math.prod(size["o"]), math.prod(size["i"]) // math.prod(window))
        )
        found: dict[str, tuple[int, ...]] = {"w1": (p, q)}
        if decompose_both and r < max(p, q) / 2:
            found = {"w1_a": (p, r), "w1_b": (r, q)}
        low = {"w2_a": (m, r), "w2_b": (r, n * math.prod(window))}
        found |= low if r < max(m, n) / 2 else {"w2": (m, n, *window)}
        return {name: (*size["s"], *shape) for name, shape in found.items()}

    def init(key: Array, path: str, leaf: Any, axes: str) -> dict[str, Array]:
        factors, stacked = {}, len(sizes(leaf, axes)["s"])
        for name, shape in shapes(path, leaf, axes).items():
            if name in ("w1", "w1_a"):
                factors[name] = jnp.zeros(shape, jnp.float32)
                continue
            key, own = jax.random.split(key)
            bound = 1 / math.sqrt(math.prod(shape[stacked + 1 :]))
            factors[name] = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
        return factors

    def adapt(
        key: Array | None, path: str, leaf: Any, axes: str, factors: dict[str, Array], strength: Any
    ) -> Kronecker:
        need_factors(path, factors, shapes(path, leaf, axes))
        stacked, r = sizes(leaf, axes)["s"], look_up(rank, path, "rank")
        scale = strength * (1.0 if alpha is None else look_up(alpha, path, "alpha") / r)
        matrices = {name: w.reshape(*w.shape[: len(stacked) + 1], -1) for name, w in factors.items()}
        return Kronecker(
            base=leaf,
            **{name: all_layers(w, selection.layers, stacked) for name, w in matrices.items()},
            scale=jnp.broadcast_to(jnp.asarray(scale, jnp.float32), stacked),
            window=math.prod(_window(leaf, axes)),
            core=axes.lstrip("s"),
            path=Label(path),
        )

    spec = {"method": "lokr", **selection.spec(), "rank": rank, "alpha": alpha}
    spec |= {"decompose_both": decompose_both, "decompose_factor": decompose_factor}
    return per_leaf(spec, selection.__call__, init, adapt)


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


def _window(leaf: Any, axes: str) -> tuple[int, ...]:
    return tuple(n for n, letter in zip(leaf.shape, axes, strict=True) if letter == "k")


register("lokr", lokr, Traits(decays=("**/{w1,w1_a,w1_b,w2,w2_a,w2_b}",), fast=()))
