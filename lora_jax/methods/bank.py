"""A bank of adapters: each row of a batch has its own, none, or a mixture, and nothing is compiled anew for others.

Rows that say which adapter they have get its factors, gathered. For mixtures the factors of all adapters stand side by
side, and behind x A a gate weighs for each row the columns of each. Of 8 x 128 tokens and a kernel of 768 x 768 (6.5
ms) that takes 7.0 ms with 8 adapters of rank 4, and 18.6 with 64 of rank 8; gathered factors 6.7 and 6.6.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lora_jax.core.arrays import LowRank, adapted_array, einsum, is_adapted, is_changed, ready, widened
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.selection import flatten
from lora_jax.core.transforms import Delta, Params, ParamTransform, from_spec, keys_of, register
from lora_jax.methods.arguments import checked

_NONE, _NO_ID = -1, -2  # among the ids


@adapted_array
class Gated(LowRank):
    """base + A gate B: of the batch's row n, along x's first axis, column r of A counts `scale[n, r]` times; with one
    row, of every row of the batch."""

    layout: ClassVar = {"a": "sir", "b": "sro", "scale": "snr", "key": "s"}
    exact: ClassVar = ("scale",)

    def branch(self, x: Array, op: Any) -> Array:
        z, gate = op.down(x, self.a), self.scale
        if len(gate) not in (1, len(z)):
            raise ValueError(f"{self.path}: a batch of {len(z)} rows, but a strength of {len(gate)} rows")
        gate = lax.expand_dims(gate, range(1, z.ndim - 1)) if z.ndim > 1 else gate[0]
        return op.up(z * gate.astype(z.dtype), self.b)

    def delta(self) -> Array:
        if (n := self.scale.shape[-2]) != 1:
            raise ValueError(f"{self.path}: {n} rows have adapters of their own, which no one weight has; choose one")
        wide = widened(self.dtype)
        chosen = einsum("sir,sr->sir", self.axes, self.a.astype(wide), self.scale[..., 0, :].astype(wide))
        ones = jnp.ones(self.scale.shape[:-2], wide)
        return LowRank(base=self.base, a=chosen, b=self.b, scale=ones, core=self.core, path=self.path).delta()


@adapted_array
class Chosen(LowRank):
    """base + A_k B_k, of the batch's row n, along x's first axis, with k = `ids[n]`; of -1 the base, of less NaN."""

    layout: ClassVar = {"a": "smir", "b": "smro", "scale": "sm", "ids": "sn", "key": "s"}
    frozen: ClassVar = (*LowRank.frozen, "ids")
    exact: ClassVar = ("scale",)
    ids: Array

    def branch(self, x: Array, op: Any) -> Array:
        if len(self.ids) != len(x):
            raise ValueError(f"{self.path}: a batch of {len(x)} rows, but ids of {len(self.ids)} rows")

        def row(x: Array, a: Array, b: Array, scale: Array) -> Array:
            z = op.down(x, a)
            return op.up(z * scale.astype(z.dtype), b)

        def of_rows(factor: Array) -> Array:  # the gradient of a factor is summed over its rows in float32
            return factor.astype(widened(factor.dtype))[k].astype(factor.dtype)

        k = jnp.maximum(self.ids, 0)
        unscaled = jnp.where(self.ids == _NONE, 0.0, jnp.nan)
        scale = jnp.where(self.ids < 0, unscaled, self.scale[k])
        return jax.vmap(row)(x[:, None], of_rows(self.a), of_rows(self.b), scale)[:, 0]

    def delta(self) -> Array:
        raise ValueError(f"{self.path}: rows have adapters of their own, which no one weight has; choose one")


@checked
def bank(methods: Sequence[ParamTransform]) -> ParamTransform:
    """A bank: K adapters of one base, of any ranks and targets, as one transform, of which each row of a batch has one.

    The `strength` of `apply` says which. For a batch of n rows, along the first axis of every input, it is

    - (n,) integers: the adapter of each row, -1 for none. (Not on explicit meshes; an embedding's factors are copied
      for each row.)
    - (n, K) numbers: how strong each adapter is in each row.
    - (1, K) numbers, or one number: the same for all rows; 1 is the sum of all adapters.

    It may be traced; a row whose traced id is below -1 or not below K is NaN.

    The delta has the entries of adapter k under `@k/`; `methods.bank.pack` makes it from the adapters' deltas, and
    `take` takes one out. In training each row trains its own adapter. The methods must be of low rank: LoRA and its
    scalings, PiSSA, `token_rows`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, lora = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> bank = lj.bank([lora, lora])
    >>> delta = jax.tree.map(jnp.ones_like, bank.init(jax.random.key(0), params))
    >>> adapted = bank.apply(params, delta, strength=jnp.array([1, -1]))
    >>> lj.lift(lambda p, x: x @ p["kernel"])(adapted, jnp.ones((2, 3))).tolist()
    [[6.0, 6.0], [3.0, 3.0]]

    Raises:
      ValueError: of `apply`, for an id below -1 or not below K that is no traced one.
    """
    methods = list(methods)
    if not methods:
        raise ValueError("a bank of no adapters")

    def init(key: Array, params: Any) -> Delta:
        keys = jax.random.split(key, len(methods))
        return pack([method.init(keys[k], params) for k, method in enumerate(methods)])

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        strength = _strength(strength, len(methods))
        by_leaf: dict[int, list[tuple[int, LowRank]]] = {}
        flat, treedef = flatten(params)
        for k, method in enumerate(methods):
            adapted, taps = untapped(method.apply(params, take(delta, k), key=key))
            if taps:
                raise ValueError(f"{method.spec['method']} changes activations: a bank is of changes of low rank")
            for at, (path, leaf) in enumerate(flatten(adapted, is_adapted)[0]):
                if is_changed(leaf):
                    if type(change := ready(leaf)) is not LowRank:
                        raise ValueError(f"{path}: a {type(leaf).__name__} is no change of low rank; a bank is of such")
                    by_leaf.setdefault(at, []).append((k, change))
        join = _stacked if strength.ndim == 1 else _joined
        joined = [join(by_leaf[at], strength) if at in by_leaf else leaf for at, (_, leaf) in enumerate(flat)]
        return jax.tree.unflatten(treedef, joined)

    def keys(params: Params) -> set[str]:
        return {f"@{k}/{path}" for k, method in enumerate(methods) for path in keys_of(method, params)}

    return ParamTransform(init, apply, {"method": "bank", "of": [method.spec for method in methods]}, keys)


def pack(deltas: Sequence[Delta]) -> Delta:
    """The delta of a bank, of its adapters' deltas."""
    return Delta({f"@{k}/{path}": factors for k, delta in enumerate(deltas) for path, factors in delta.items()})


def take(delta: Delta, k: int) -> Delta:
    """The delta of a bank's adapter k."""
    head = f"@{k}/"
    return Delta({path.removeprefix(head): factors for path, factors in delta.items() if path.startswith(head)})


def _strength(strength: Any, count: int) -> Array:
    """(n,) integers with _NO_ID for what is no id, all else as (n or 1, count) float32."""
    given, strength = strength, jnp.asarray(strength)
    if strength.ndim == 1 and jnp.issubdtype(strength.dtype, jnp.integer):
        _check_ids(given, count)
        least = 0 if jnp.issubdtype(strength.dtype, jnp.unsignedinteger) else _NONE
        strength = strength.astype(jnp.int32)
        return jnp.where((strength < least) | (strength >= count), _NO_ID, strength)
    if strength.ndim not in (0, 2) or (strength.ndim == 2 and strength.shape[1] != count):
        kinds = f"a number, (rows, {count}) for as many adapters, or (rows,) whole numbers"
        raise ValueError(f"strength {strength.shape}: {kinds}")
    strength = strength.astype(jnp.float32)
    return jnp.broadcast_to(strength, (strength.shape[0] if strength.ndim else 1, count))


def _check_ids(ids: Any, count: int) -> None:
    """A ValueError for what is no adapter of a bank of so many, where it can be seen."""
    hidden = lambda x: isinstance(x, jax.core.Tracer) or (isinstance(x, Array) and not x.is_fully_addressable)  # noqa: E731
    if not any(map(hidden, jax.tree.leaves(ids))):
        ids = np.asarray(ids)
        if len(wrong := np.flatnonzero((ids < _NONE) | (ids >= count))):
            adapters = f"the bank has {count}, from 0, and -1 is none"
            raise ValueError(f"row {wrong[0]} has the adapter {ids[wrong[0]]}, but {adapters}")


def _joined(adapters: list[tuple[int, LowRank]], strength: Array) -> Gated:
    """The adapters of one leaf side by side; (n, K) strengths."""
    gates = []
    for k, w in adapters:
        gate = w.scale[..., None] * jnp.broadcast_to(strength[:, k], (*w.scale.shape, len(strength)))  # (s.., n)
        gates.append(jnp.broadcast_to(gate[..., None], (*gate.shape, w.a.shape[-1])))
    a, b = [w.a for _, w in adapters], [w.b for _, w in adapters]
    joined_b, scale = jnp.concatenate(b, w.scale.ndim), jnp.concatenate(gates, -1)
    return Gated(a=jnp.concatenate(a, -1), b=joined_b, scale=scale, **_common_fields(adapters))


def _stacked(adapters: list[tuple[int, LowRank]], ids: Array) -> Chosen:
    """The adapters of one leaf one behind the other, each filled up to the largest rank; (n,) ids."""
    common, stacked = _common_fields(adapters), adapters[0][1].scale.ndim
    rank = max(w.a.shape[-1] for _, w in adapters)

    def filled(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, rank - n if at == axis % x.ndim else 0) for at, n in enumerate(x.shape)])

    here = jnp.array([k for k, _ in adapters], jnp.int32)[None] == ids[:, None]  # an adapter may leave this leaf alone
    at = jnp.arange(len(adapters), dtype=jnp.int32)[None]
    ids = jnp.where(here, at, jnp.minimum(ids, _NONE)[:, None]).max(1)
    ids = jnp.broadcast_to(ids, (*adapters[0][1].scale.shape, len(ids)))
    parts = zip(*((filled(w.a, -1), filled(w.b, stacked), w.scale) for _, w in adapters), strict=True)
    a, b, scale = (jnp.stack(x, stacked) for x in parts)
    return Chosen(a=a, b=b, scale=scale, ids=ids, **common)


def _common_fields(adapters: list[tuple[int, LowRank]]) -> dict[str, Any]:
    """The fields that one leaf's adapters have in common."""
    first = adapters[0][1]
    if len({(w.core, w.dropout) for _, w in adapters}) > 1:
        raise ValueError(f"{first.path}: the adapters of a bank have one dropout, and name its axes alike")
    return {name: getattr(first, name) for name in ("base", "key", "core", "dropout", "path")}


register("bank", lambda of: bank(list(map(from_spec, of))))
