"""Which factors of a delta are the A and B of one product, and how they and the rest are told apart."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from lora_jax.core.arrays import widened
from lora_jax.core.globs import matches_any
from lora_jax.core.selection import look_up
from lora_jax.core.transforms import Delta, Spec, traits_of

Rate = Any  # a number, which may be traced, or an optax.Schedule
Factors = dict[str, dict[str, Array]]  # {key: {factor: array}}
Mask = Callable[[Any], Any] | None  # tree -> tree of bools: what decays; None: all


class Pair(NamedTuple):
    """Where a pair is in a delta: the keys of its A and of its B's, and its number of stacked axes."""

    a: str
    bs: tuple[str, ...]
    stacked: int

    def of(self, delta: Mapping[str, Any]) -> tuple[Array, Array]:
        """x `(s.., m, r)` and y `(s.., n, r)`, in float32 or wider; several B's are one behind the other."""
        x, n = delta[self.a]["a"], self.stacked
        ys = [b.reshape(*b.shape[: n + 1], -1).swapaxes(-1, -2) for b in (delta[key]["b"] for key in self.bs)]
        wide = widened(jnp.result_type(x, *ys))
        return x.reshape(*x.shape[:n], -1, x.shape[-1]).astype(wide), jnp.concatenate(ys, -2).astype(wide)

    def put(self, into: Factors, like: Mapping[str, Any], both: tuple[Array, Array], dtype: Any = None) -> None:
        """The inverse: x and y into `{key: {factor: array}}`, with the axes of a delta, and its dtypes where none is
        given."""
        (x, y), a, n = both, like[self.a]["a"], self.stacked
        into.setdefault(self.a, {})["a"] = x.reshape(*a.shape[:-1], -1).astype(dtype or a.dtype)
        start = 0
        for b, key in ((like[key]["b"], key) for key in self.bs):
            size = math.prod(b.shape[n + 1 :])
            part = lax.slice_in_dim(y, start, start := start + size, axis=n).swapaxes(-1, -2)
            part = part.reshape(*part.shape[: n + 1], *b.shape[n + 1 :])
            into.setdefault(key, {})["b"] = part.astype(dtype or b.dtype)


def pairs_of(delta: Delta, spec: Spec | None = None) -> list[Pair]:
    """The pairs of a delta, which may lack factors; `spec`, the method's, says which axes are stacked.

    Raises:
      ValueError: the shapes leave open which axes are stacked.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> delta = lj.Delta({"w": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 5))}, "bias": {"value": jnp.ones(5)}})
    >>> pairs_of(delta)
    [Pair(a='w', bs=('w',), stacked=0)]
    """
    pairs = []
    has = {key: {name for name, x in factors.items() if hasattr(x, "shape")} for key, factors in delta.items()}
    for key in (key for key in delta if "a" in has[key]):
        head, path = bank_head(key)
        if path.startswith("@shared/"):
            others = {other: bank_head(other) for other in delta if "b" in has[other] and "a" not in has[other]}
            module = path.removeprefix("@shared/")
            bs = tuple(o for o, (h, p) in others.items() if h == head and "/".join(p.split("/")[:-2]) == module)
        else:
            bs = (key,) if "b" in has[key] and not path.startswith("@") else ()
        stacked = {_stacked(bank_head(b)[1], delta[key]["a"].shape, delta[b]["b"].shape, spec) for b in bs}
        if len(stacked) == 1 and (n := stacked.pop()) is not None:
            pairs.append(Pair(key, bs, n))
    return pairs


def bank_head(key: str) -> tuple[str, str]:
    """`@k/` of an adapter in a bank, or "", and the rest of the key."""
    number = re.match(r"(?:@\d+/)?", key)
    head = number[0] if number else ""
    return head, key.removeprefix(head)


def named_axes(path: str, spec: Spec | None) -> str | None:
    """The axes that the spec names for a path."""
    for part, _ in traits_of(spec or {}):
        selected, excluded = (matches_any(part.get(name) or (), path) for name in ("select", "exclude"))
        if selected and not excluded:
            axes = part.get("axes")
            return look_up({**axes, "**": axes.get("**")}, path, "axes") if isinstance(axes, Mapping) else axes
    return None


def _stacked(path: str, a: tuple[int, ...], b: tuple[int, ...], spec: Spec | None) -> int | None:
    """The number of stacked axes of A and B of these shapes; None where they are no pair."""
    fits = [n for n in range(min(len(a), len(b)) - 1) if a[:n] == b[:n] and a[-1] == b[n]]
    if axes := named_axes(path, spec):
        fits = [n for n in fits if n == axes.count("s")]
    if len(fits) > 1:
        problem = f"a {a} and b {b} may be stacked along their first {' or '.join(map(str, fits))} axes"
        raise ValueError(f"{path}: {problem}: name the weight's in select(..., axes=...), and pass spec=method.spec")
    return fits[0] if fits else None


def delta_of(tree: Any) -> Delta:
    """The one Delta in a tree."""
    deltas = [node for node in jax.tree.leaves(tree, is_leaf=_is_delta) if _is_delta(node)]
    if len(deltas) != 1:
        raise ValueError(f"an optimizer made for LoRA takes a Delta, or a tree with one: there are {len(deltas)} here")
    return deltas[0]


def _is_delta(node: Any) -> bool:
    return isinstance(node, Delta)


def with_factors(tree: Any, factors: Mapping[str, Mapping[str, Any]]) -> Any:
    """The tree with these factors in its Delta."""
    new = {key: {**old, **factors.get(key, {})} for key, old in delta_of(tree).items()}
    return jax.tree.map(lambda node: Delta(new) if _is_delta(node) else node, tree, is_leaf=_is_delta)


def need_pairs(tree: Any, spec: Spec | None) -> list[Pair]:
    """The pairs of the tree's Delta; a ValueError where there are none."""
    if not (pairs := pairs_of(delta_of(tree), spec)):
        raise ValueError("an optimizer made for LoRA needs paths with an A and a B: there are none in this delta")
    return pairs


def labelled(tree: Any, spec: Spec | None, label: Callable[[str], str], other: str) -> Any:
    """A tree of labels: `label("a")` and `label("b")` for the factors of pairs, `other` for the rest."""
    labels: dict[str, dict[str, str]] = {}
    for pair in need_pairs(tree, spec):
        labels.setdefault(pair.a, {})["a"] = label("a")
        for key in pair.bs:
            labels.setdefault(key, {})["b"] = label("b")
    return with_factors(jax.tree.map(lambda _: other, tree), labels)


def with_adam(for_pairs: optax.GradientTransformation, rest: optax.GradientTransformation, spec: Spec | None) -> Any:
    """One optimizer for the pairs and another for the rest."""
    labels = partial(labelled, spec=spec, label=lambda _: "pair", other="rest")
    return optax.partition({"pair": for_pairs, "rest": rest}, labels)


def need_params(params: Any) -> Delta:
    """The Delta of an update's params, which optax leaves out where the caller does."""
    if params is None:
        raise ValueError("an optimizer made for LoRA needs the params: tx.update(gradients, state, params)")
    return delta_of(params)


def rounding(x: Array) -> float:
    """Singular or eigenvalues below so many of the largest are rounding."""
    return float(x.shape[-1] * jnp.finfo(x.dtype).eps)
