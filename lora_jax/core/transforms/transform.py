"""Adapting a model as a transform of its parameter tree: `init` makes a small Delta, `apply` puts it on the base."""

import zlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.core.arrays import Adapted, is_adapted
from lora_jax.core.lifting.taps import Tap, Tapped, untapped
from lora_jax.core.selection import Absent, flatten

Params = Any  # a pytree of arrays, plain or adapted
Axes = str  # one letter an axis, see `lora_jax.select`
Factors = dict[str, Array]  # of one key of a delta
Spec = dict[str, Any]  # a transform as JSON


class Delta(dict):
    """What trains: `{path: {factor: array}}`, a pytree. Keys are paths of adapted leaves, or begin with "@".

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> lj.Delta({"kernel": {"a": jnp.ones((3, 1)), "b": jnp.zeros((1, 2))}})
    Delta: 1 paths, 5 numbers
      kernel: a float32(3, 1), b float32(1, 2)
    """

    def __repr__(self) -> str:
        def shown(leaf: Any) -> str:
            return f"{leaf.dtype}{tuple(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf)

        by_path = {path: factors for path, factors in sorted(self.items()) if isinstance(factors, dict)}
        rows = {path: ", ".join(f"{n} {shown(x)}" for n, x in sorted(by_path[path].items())) for path in by_path}
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self) if hasattr(leaf, "shape"))
        head = f"Delta: {len(self)} paths, {count:,} numbers"
        lines = [head, *(f"  {path}: {row}" for path, row in rows.items())]
        return "\n".join(lines if len(lines) < 30 else [*lines[:20], f"  ... {len(lines) - 20} more"])


jax.tree_util.register_pytree_with_keys(
    Delta,
    lambda delta: ([(jax.tree_util.DictKey(path), delta[path]) for path in sorted(delta)], tuple(sorted(delta))),
    lambda paths, factors: Delta(zip(paths, factors, strict=True)),
)


class Init(Protocol):
    """`init` of a transform: what trains at first."""

    def __call__(self, key: Array, params: Params) -> Delta: ...


class Apply(Protocol):
    """`apply` of a transform: adapted params."""

    def __call__(self, params: Params, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Params: ...


class ParamTransform(NamedTuple):
    """A method of adaptation. Pure: works under jit, vmap, eval_shape and on sharded arrays.

    Attributes:
      init: `(key, params) -> Delta`. Keys are folded with the path: order and mesh do not matter.
      apply: `(params, delta, *, key=None, strength=1.0) -> adapted params`; without a key there is no dropout; strength
        0 is the base, 1 the trained adapter, and may be traced.
      spec: JSON; `from_spec(spec)` gives an equal transform.
      keys: `params -> the keys of the delta`, without computing it. Where None, `keys_of` traces `init` instead.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, method = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> delta = method.init(jax.random.key(0), params)
    >>> adapted = method.apply(params, delta, strength=0.5)
    >>> method.spec["method"], method.spec["select"], method.spec["rank"]
    ('lora', ['kernel'], 1)
    """

    init: Init
    apply: Apply
    spec: Spec
    keys: Callable[[Params], Collection[str]] | None = None

    def __repr__(self) -> str:
        spec = {name: value for name, value in self.spec.items() if name != "peft"}  # PEFT's config is long
        return f"ParamTransform({spec})"

    def __copy__(self) -> "ParamTransform":
        return self

    def __deepcopy__(self, memo: dict) -> "ParamTransform":
        return self


def keys_of(method: ParamTransform, params: Params) -> set[str]:
    """The keys of a method's delta on these params, of which shapes suffice."""
    return set(method.keys(params) if method.keys else shapes_of(method, params)[0])


def stable_hash(name: str) -> int:
    """A hash that does not change between runs: 31 bits, for `jax.random.fold_in`.

    >>> import jax, lora_jax as lj
    >>> key = jax.random.fold_in(jax.random.key(0), lj.stable_hash("h_0/attn/query/kernel"))
    """
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def typed_key(key: Array) -> Array:
    """A typed key of `jax.random.key` or a raw one of `jax.random.PRNGKey`, as a typed key."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def need_params(params: Params, what: str) -> None:
    """A TypeError for what is no params of a base."""
    if isinstance(params, Delta):
        raise TypeError(f"{what} takes the base's params here, got a Delta")
    if isinstance(params, Tapped):
        raise TypeError(f"{what} takes params here, got tapped ones: put transforms together with chain")


def need_delta(delta: Any, keys: set[str] | None = None) -> None:
    """A TypeError for what is no Delta, a ValueError for one with other keys."""
    if not isinstance(delta, Delta):
        raise TypeError(f"apply takes a Delta (from init) as second argument, got {type(delta).__name__}")
    if keys is not None and keys != set(delta):
        lacks, besides = sorted(keys - set(delta))[:3], sorted(set(delta) - keys)[:3]
        raise ValueError(f"the delta is not this method's: it lacks {lacks} and has besides {besides}")


def shapes_of(method: ParamTransform, params: Params) -> tuple[Delta, dict[str, Adapted]]:
    """Delta and adapted leaves as shapes, without touching a weight."""
    flat, treedef = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, Absent))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in flat]
    arrays = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in enumerate(flat) if is_array[n]}

    def both(key: Array, arrays: dict[int, Any]) -> tuple[Delta, dict[str, Adapted]]:
        params = jax.tree.unflatten(treedef, [arrays.get(n, leaf) for n, leaf in enumerate(flat)])
        delta = method.init(key, params)
        adapted, _ = flatten(untapped(method.apply(params, delta))[0], is_adapted)
        return delta, {path: leaf for path, leaf in adapted if is_adapted(leaf)}

    return jax.eval_shape(both, jax.random.key(0), arrays)


def chain(*methods: ParamTransform) -> ParamTransform:
    """Several transforms with disjoint targets; their deltas are united.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> method = lj.chain(lj.lora(lj.select("kernel"), rank=1), lj.tune(lj.select("bias")))
    >>> lj.check(method, {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}).trained
    7
    """

    def init(key: Array, params: Params) -> Delta:
        united = Delta()
        for method in methods:
            part = method.init(key, params)
            if both := sorted(set(part) & set(united)):
                raise ValueError(f"{both[0]} is the target of two transforms of the chain")
            united.update(part)
        return united

    def apply(params: Params, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Params:
        need_params(params, "apply")
        need_delta(delta)
        base, rest = params, Delta(delta)
        taps: tuple[Tap, ...] = ()
        for method in methods:
            part = Delta({path: rest.pop(path) for path in keys_of(method, base) if path in rest})
            params, method_taps = untapped(method.apply(params, part, key=key, strength=strength))
            taps += method_taps
        if rest:
            raise ValueError(f"the delta is not this method's: it has besides {sorted(rest)[:3]}")
        return Tapped(params, taps) if taps else params

    def keys(params: Params) -> set[str]:
        return set().union(*(keys_of(method, params) for method in methods))

    return ParamTransform(init, apply, {"method": "chain", "of": [method.spec for method in methods]}, keys)
