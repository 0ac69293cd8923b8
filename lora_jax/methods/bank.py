"""A bank of adapters: each row of a batch has its own, or none, in one product of low rank.

The factors of all adapters stand side by side, and behind x A a gate keeps for each row the columns of its adapter: one
thin product of all ranks together, whatever the rows ask for, and nothing is compiled anew when they ask for others.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.arrays import Adapted, LowRank, adapted_array, subscripts, widened
from lora_jax.selection import flatten
from lora_jax.taps import untapped
from lora_jax.transforms import Delta, ParamTransform, from_spec, register


@adapted_array
class Gated(LowRank):
    """base + A gate B: of the batch's row n, along x's first axis, column r of A counts `scale[n, r]` times; with one
    row, of every row of the batch."""

    layout: ClassVar = {"a": "sir", "b": "sro", "scale": "snr", "key": "s"}

    def branch(self, x: Array, op: Any) -> Array:
        z, gate = op.thin(x, self.a), lax.stop_gradient(self.scale)
        if len(gate) not in (1, len(z)):
            raise ValueError(f"{self.path}: a batch of {len(z)} rows, but a strength of {len(gate)} rows")
        gate = lax.expand_dims(gate, range(1, z.ndim - 1)) if z.ndim > 1 else gate[0]
        return op.then(z * gate.astype(z.dtype), self.b)

    def delta(self) -> Array:
        rows = self.scale.shape[-2]
        if rows != 1:
            raise ValueError(
                f"{self.path}: {rows} rows have adapters of their own, which no one weight has; choose one"
            )
        a, gate = subscripts("sir", self.axes), subscripts("sr", self.axes)
        wide = widened(self.dtype)
        chosen = jnp.einsum(f"{a},{gate}->{a}", self.a.astype(wide), self.scale[..., 0, :].astype(wide))
        ones = jnp.ones(self.scale.shape[:-2], wide)
        return LowRank(base=self.base, a=chosen, b=self.b, scale=ones, core=self.core, path=self.path).delta()


def bank(methods: Sequence[ParamTransform]) -> ParamTransform:
    """K adapters of one base, of any ranks and targets, as one transform; `strength` says which row has which.

    `strength` of `apply` is (n, K), for a batch of n rows along the first axis of every input that an adapted weight
    meets: how strong each adapter is in each row. `jax.nn.one_hot(ids, K)` gives each row one, and an id of -1 none.
    One number, or (1, K), holds for all rows; strength 1 is the sum of all adapters. It may be traced.

    The delta has the entries of adapter k under `@k/`: `pack` and `take` go from deltas to it and back. With gradients
    each row trains its own adapter. For methods whose change has low rank: LoRA with its scales, PiSSA, rows.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, lora = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> bank = lj.bank([lora, lora])
    >>> delta = jax.tree.map(jnp.ones_like, bank.init(jax.random.key(0), params))
    >>> adapted = bank.apply(params, delta, strength=jax.nn.one_hot(jnp.array([1, -1]), 2))
    >>> lj.lift(lambda p, x: x @ p["kernel"])(adapted, jnp.ones((2, 3))).tolist()
    [[6.0, 6.0], [3.0, 3.0]]
    """
    methods = list(methods)
    if not methods:
        raise ValueError("a bank of no adapters")

    def init(key: Array, params: Any) -> Delta:
        keys = jax.random.split(key, len(methods))
        return pack([method.init(keys[k], params) for k, method in enumerate(methods)])

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        strength = jnp.asarray(strength, jnp.float32)
        if strength.ndim not in (0, 2) or (strength.ndim == 2 and strength.shape[1] != len(methods)):
            raise ValueError(f"strength {strength.shape}: a number, or (rows, {len(methods)}) for as many adapters")
        strength = jnp.broadcast_to(strength, (strength.shape[0] if strength.ndim else 1, len(methods)))
        found: dict[int, list[tuple[int, LowRank]]] = {}
        flat, treedef = flatten(params)
        for k, method in enumerate(methods):
            adapted, taps = untapped(method.apply(params, take(delta, k), key=key))
            leaves = [leaf for _, leaf in flatten(adapted, lambda leaf: isinstance(leaf, Adapted))[0]]
            if taps:
                raise ValueError(f"{method.spec['method']} changes activations: a bank is of changes of low rank")
            for at, leaf in enumerate(leaves):
                if isinstance(leaf, Adapted):
                    found.setdefault(at, []).append((k, _low_rank(leaf)))
        joined = [_joined(found[at], strength) if at in found else leaf for at, (_, leaf) in enumerate(flat)]
        return jax.tree.unflatten(treedef, joined)

    return ParamTransform(init, apply, {"method": "bank", "of": [method.spec for method in methods]})


def pack(deltas: Sequence[Delta]) -> Delta:
    """The delta of a bank, of its adapters' deltas."""
    return Delta({f"@{k}/{path}": factors for k, delta in enumerate(deltas) for path, factors in delta.items()})


def take(delta: Delta, k: int) -> Delta:
    """The delta of a bank's adapter k."""
    head = f"@{k}/"
    return Delta({path.removeprefix(head): factors for path, factors in delta.items() if path.startswith(head)})


def _low_rank(leaf: Adapted) -> LowRank:
    ready = leaf.ready()
    if not isinstance(ready, LowRank):
        raise ValueError(f"{leaf.path}: a {type(leaf).__name__} is no change of low rank; a bank is of such")
    return ready


def _joined(adapters: list[tuple[int, LowRank]], strength: Array) -> Gated:
    """The adapters of one leaf side by side; (n, K) strengths."""
    first = adapters[0][1]
    stacked = first.scale.ndim
    if len({(w.core, w.dropout) for _, w in adapters}) > 1:
        raise ValueError(f"{first.path}: the adapters of a bank have one dropout, and see its axes alike")
    gates = []
    for k, w in adapters:
        gate = w.scale[..., None] * jnp.broadcast_to(strength[:, k], (*w.scale.shape, len(strength)))  # (s.., n)
        gates.append(jnp.broadcast_to(gate[..., None], (*gate.shape, w.a.shape[-1])))
    return Gated(
        base=first.base,
        a=jnp.concatenate([w.a for _, w in adapters], -1),
        b=jnp.concatenate([w.b for _, w in adapters], stacked),
        scale=jnp.concatenate(gates, -1),
        key=first.key,
        core=first.core,
        dropout=first.dropout,
        path=first.path,
    )


register("bank", lambda of: bank(list(map(from_spec, of))))
