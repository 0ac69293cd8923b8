"""Adapting a model as a transform of its parameter tree: `init` makes a small Delta, `apply` puts it on the base."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.core.arrays import Adapted, is_adapted, map_adapted
from lora_jax.core.lifting.taps import Tap, Tapped, untapped
from lora_jax.core.selection import CLASS, Absent, flatten


class Delta(dict):
    """What trains: `{path: {factor: array}}`, a pytree. Keys are paths of adapted leaves, or begin with "@"."""

    def __repr__(self) -> str:
        rows = [
            f"  {path}: " + ", ".join(f"{name} {_shown(x)}" for name, x in sorted(factors.items()))
            for path, factors in sorted(self.items())
            if isinstance(factors, dict)
        ]
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self) if hasattr(leaf, "shape"))
        return "\n".join([f"Delta: {len(self)} paths, {count:,} numbers", *rows])


def _shown(leaf: Any) -> str:
    return f"{leaf.dtype}{tuple(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf)


jax.tree_util.register_pytree_with_keys(
    Delta,
    lambda delta: (
        [(jax.tree_util.DictKey(path), delta[path]) for path in sorted(delta)],
        tuple(sorted(delta)),
    ),
    lambda paths, factors: Delta(zip(paths, factors, strict=True)),
)


class ParamTransform(NamedTuple):
    """A method of adaptation. Pure: works under jit, vmap, eval_shape and on sharded arrays.

    init: `(key, params) -> Delta`. Keys are folded with the path: order and mesh do not matter.
    apply: `(params, delta, *, key=None, strength=1.0) -> adapted params`; without a key there is no dropout; strength 0
      is the base, 1 the trained adapter, and may be traced.
    spec: JSON; `from_spec(spec)` gives an equal transform.
    """

    init: Callable[[Array, Any], Delta]
    apply: Callable[..., Any]
    spec: dict[str, Any]


def need_factors(path: str, factors: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """A ValueError unless the factors of a path have these names and shapes."""
    have = {name: tuple(factor.shape) for name, factor in factors.items()}
    if have != shapes:
        raise ValueError(f"{path}: the delta's factors are {have}, but the base and the method need {shapes}")


def sizes(leaf: Any, axes: str, layers: tuple[int, ...] | None = None) -> dict[str, tuple[int, ...]]:
    """The sizes of a leaf's stacked, input and output axes: `{"s": .., "i": .., "o": ..}`; of a stack, `layers` only.

    >>> import numpy as np
    >>> sizes(np.zeros((12, 4, 3)), "sio", layers=(10, 11))
    {'s': (2,), 'i': (4,), 'o': (3,)}
    """
    found = {c: tuple(n for n, x in zip(leaf.shape, axes, strict=True) if CLASS[x] == c) for c in "sio"}
    return found | {"s": (len(layers), *found["s"][1:])} if layers and found["s"] else found


def all_layers(factor: Array, layers: tuple[int, ...] | None, stacked: tuple[int, ...], fill: float = 0.0) -> Array:
    """A factor of some layers of a stack, with `fill` for the others, which it leaves as they are."""
    if not (layers and stacked):
        return factor
    return jnp.full((stacked[0], *factor.shape[1:]), fill, factor.dtype).at[jnp.array(layers)].set(factor)


def stable_hash(name: str) -> int:
    """A hash that does not change between runs: 31 bits, for `jax.random.fold_in`."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def typed_key(key: Array) -> Array:
    """A typed key of `jax.random.key` or a raw one of `jax.random.PRNGKey`, as a typed key."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def per_leaf(
    spec: dict[str, Any],
    targets: Callable[[Any], dict[str, str]],
    init: Callable[..., dict[str, Array]],
    adapt: Callable[..., Adapted],
    draws_as: Callable[[str], str] = str,
) -> ParamTransform:
    """A transform that meets every selected leaf alone.

    Args:
      spec: the transform as JSON.
      targets: params -> `{path: axes}`.
      init: `(key, path, leaf, axes) -> {factor: array}`.
      adapt: `(key or None, path, leaf, axes, factors, strength) -> Adapted`.
      draws_as: path -> the name that its keys are folded with; paths of one name draw alike.
    """

    def init_all(key: Array, params: Any) -> Delta:
        need_params(params, "init")
        key, leaves = typed_key(key), dict(flatten(params)[0])
        return Delta(
            {
                path: init(jax.random.fold_in(key, stable_hash(draws_as(path))), path, leaves[path], axes)
                for path, axes in targets(params).items()
            }
        )

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        need_params(params, "apply")
        _need_delta(delta)
        chosen = targets(map_adapted(lambda w: w.base, params))
        if set(chosen) != set(delta):
            missing, extra = sorted(set(chosen) - set(delta)), sorted(set(delta) - set(chosen))
            raise ValueError(f"the delta is not this method's: it lacks {missing[:3]}, has besides {extra[:3]}")

        def adapted(path: str, leaf: Any) -> Any:
            if path not in chosen:
                return leaf
            if is_adapted(leaf):
                raise ValueError(f"{path} is adapted already ({leaf}); two transforms on one leaf")
            own = None if key is None else jax.random.fold_in(typed_key(key), stable_hash(draws_as(path)))
            return adapt(own, path, leaf, chosen[path], delta[path], strength)

        flat, treedef = flatten(params, is_adapted)
        return jax.tree.unflatten(treedef, [adapted(path, leaf) for path, leaf in flat])

    return ParamTransform(init_all, apply, spec)


def per_site(
    spec: dict[str, Any],
    sites: Mapping[str, int],
    init: Callable[[Array, str, int], dict[str, Array]],
    fn: Callable,
    layers: Sequence[int] | None = None,
) -> ParamTransform:
    """A transform that changes the named activations, whatever the params (Houlsby's adapters, prefixes).

    Args:
      spec: the transform as JSON; its method's name and a site make the key `@site/method` of the delta.
      sites: how often each occurs.
      init: `(key, site, n) -> {factor: array}`, stacked over n occurrences.
      fn: of `Tap`, for every site.
      layers: the occurrences that are changed; None: all.
    """
    chosen = None if layers is None else tuple(layers)
    if chosen is not None:
        for site, count in sites.items():
            if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= n < count for n in chosen):
                raise ValueError(f"layers={list(chosen)}: name some of the {count} of the site {site!r}, each once")
    names = {f"@{site}/{spec['method']}": site for site in sites}

    def init_all(key: Array, params: Any) -> Delta:
        need_params(params, "init")
        counts = {site: count if chosen is None else len(chosen) for site, count in sites.items()}
        keys = {name: jax.random.fold_in(typed_key(key), stable_hash(name)) for name in names}
        return Delta({name: init(keys[name], site, counts[site]) for name, site in names.items()})

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        need_params(params, "apply")
        _need_delta(delta)
        shapes = jax.eval_shape(init_all, jax.random.key(0), {})
        if wrong := set(shapes) ^ set(delta):
            raise ValueError(f"the delta is not this method's: it lacks, or has besides, {sorted(wrong)[:3]}")
        for name, factors in shapes.items():
            need_factors(name, delta[name], jax.tree.map(lambda x: x.shape, factors))
        whole = isinstance(strength, float | int) and strength == 1
        return Tapped(
            params,
            tuple(
                Tap(
                    factors=delta[name],
                    strength=None if whole else jnp.asarray(strength, jnp.float32),
                    site=site,
                    fn=fn,
                    count=sites[site],
                    layers=chosen,
                    name=name,
                )
                for name, site in names.items()
            ),
        )

    return ParamTransform(init_all, apply, spec)


def need_params(params: Any, what: str) -> None:
    if isinstance(params, Delta):
        raise TypeError(f"{what} takes the base's params here, got a Delta")
    if isinstance(params, Tapped):
        raise TypeError(f"{what} takes params here, got tapped ones: put transforms together with chain")


def _need_delta(delta: Any) -> None:
    if not isinstance(delta, Delta):
        raise TypeError(f"apply takes a Delta (from init) as second argument, got {type(delta).__name__}")


def shapes_of(method: ParamTransform, params: Any) -> tuple[Delta, dict[str, Adapted]]:
    """Delta and adapted leaves as shapes, without touching a weight."""
    flat, treedef = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, Absent))
    arrays = {
        n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for n, leaf in enumerate(flat)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }

    def rebuilt(arrays: dict[int, Any]) -> Any:
        return jax.tree.unflatten(treedef, [arrays.get(n, leaf) for n, leaf in enumerate(flat)])

    def both(key: Array, arrays: dict[int, Any]) -> tuple[Delta, dict[str, Adapted]]:
        delta = method.init(key, rebuilt(arrays))
        adapted, _ = flatten(untapped(method.apply(rebuilt(arrays), delta))[0], is_adapted)
        return delta, {path: leaf for path, leaf in adapted if is_adapted(leaf)}

    return jax.eval_shape(both, jax.random.key(0), arrays)


def chain(*methods: ParamTransform) -> ParamTransform:
    """Several transforms with disjoint targets; their deltas are united.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> method = lj.chain(lj.lora(lj.select("kernel"), rank=1), lj.tune(lj.select("bias")))
    >>> lj.check(method, {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}).trained
    7
    """

    def init(key: Array, params: Any) -> Delta:
        united = Delta()
        for method in methods:
            part = method.init(key, params)
            if both := sorted(set(part) & set(united)):
                raise ValueError(f"{both[0]} is the target of two transforms of the chain")
            united |= part
        return Delta(united)

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        _need_delta(delta)
        base, rest = params, Delta(delta)
        taps: list[Tap] = []
        for method in methods:
            wanted = shapes_of(method, base)[0]
            part = Delta({path: rest.pop(path) for path in wanted if path in rest})
            params, own = untapped(method.apply(params, part, key=key, strength=strength))
            taps += own
        if rest:
            raise ValueError(f"the delta is not this method's: it has besides {sorted(rest)[:3]}")
        return Tapped(params, tuple(taps)) if taps else params

    return ParamTransform(init, apply, {"method": "chain", "of": [method.spec for method in methods]})
