"""Adapting a model as a transform of its parameter tree: `init` makes a small Delta, `apply` puts it on the base."""

import difflib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.arrays import Adapted, is_adapted, map_adapted
from lora_jax.selection import CLASS, Absent, Selection, flatten
from lora_jax.taps import Tap, Tapped, untapped


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
        _need_params(params, "init")
        key, leaves = typed_key(key), dict(flatten(params)[0])
        return Delta(
            {
                path: init(jax.random.fold_in(key, stable_hash(draws_as(path))), path, leaves[path], axes)
                for path, axes in targets(params).items()
            }
        )

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        _need_params(params, "apply")
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
        _need_params(params, "init")
        counts = {site: count if chosen is None else len(chosen) for site, count in sites.items()}
        keys = {name: jax.random.fold_in(typed_key(key), stable_hash(name)) for name in names}
        return Delta({name: init(keys[name], site, counts[site]) for name, site in names.items()})

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        _need_params(params, "apply")
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


def _need_params(params: Any, what: str) -> None:
    if isinstance(params, Delta):
        raise TypeError(f"{what} takes the base's params here, got a Delta")
    if isinstance(params, Tapped):
        raise TypeError(f"{what} takes params here, got tapped ones: put transforms together with chain")


def _need_delta(delta: Any) -> None:
    if not isinstance(delta, Delta):
        raise TypeError(f"apply takes a Delta (from init) as second argument, got {type(delta).__name__}")


_METHODS: dict[str, Callable[..., ParamTransform]] = {}


def register(name: str, factory: Callable[..., ParamTransform]) -> None:
    """Makes a method known to `from_spec` and to configs: `factory(selection, **options)`, options JSON."""
    _METHODS[name] = factory


def from_spec(spec: dict[str, Any]) -> ParamTransform:
    """The transform of a spec: `{"method": name, "select": [globs], "axes", "layers", "exclude", **options}`. What is
    under "peft" (`interop.peft`) stays in the spec and changes nothing.

    >>> import lora_jax as lj
    >>> lj.from_spec({"method": "lora", "select": ["**/kernel"], "rank": 4}).spec["rank"]
    4
    """
    options = dict(spec)
    name, peft = options.pop("method", None), options.pop("peft", None)
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it is one of {sorted(_METHODS)}"
        raise ValueError(f"the spec's method {name!r} is not known; {hint}")
    first = []
    if "select" in options:
        globs = options.pop("select")
        globs = [globs] if isinstance(globs, str) else globs
        layers, exclude = options.pop("layers", None), options.pop("exclude", ())
        layers = None if layers is None else tuple(layers)
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude or ())
        first = [Selection(tuple(globs), options.pop("axes", None), layers, exclude)]
    try:
        method = _METHODS[name](*first, **options)
    except TypeError as error:
        raise ValueError(f"the spec of {name!r} does not fit: {error}") from error
    return method if peft is None else method._replace(spec=method.spec | {"peft": peft})


def _shapes(method: ParamTransform, params: Any) -> tuple[Delta, dict[str, Adapted]]:
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
            wanted = _shapes(method, base)[0]
            part = Delta({path: rest.pop(path) for path in wanted if path in rest})
            params, own = untapped(method.apply(params, part, key=key, strength=strength))
            taps += own
        if rest:
            raise ValueError(f"the delta is not this method's: it has besides {sorted(rest)[:3]}")
        return Tapped(params, tuple(taps)) if taps else params

    return ParamTransform(init, apply, {"method": "chain", "of": [method.spec for method in methods]})


register("chain", lambda of: chain(*map(from_spec, of)))


def merge(adapted: Any) -> Any:
    """Plain params: every adapted array dense, summed in float32 and rounded once to the base's dtype. The other leaves
    are the base's own; under `jax.jit` they are copied."""
    if isinstance(adapted, Delta):
        raise TypeError("merge takes adapted params (method.apply(params, delta)), got a Delta")
    return map_adapted(lambda w: w.materialize(), _weights_alone(adapted))


def _weights_alone(adapted: Any) -> Any:
    params, taps = untapped(adapted)
    if taps:
        sites = ", ".join(sorted({tap.site for tap in taps}))
        raise ValueError(
            f"what changes activations ({sites}) has no weight to go into: keep it beside the base, and lift"
        )
    return params


def unmerge(merged: Any, method: ParamTransform, delta: Delta) -> Any:
    """The base of merged params, within one rounding of max(|merged|, |delta|); a ValueError where a method cannot be
    undone (tuned leaves). Exact switching is `method.apply(base, other_delta)`."""
    return map_adapted(lambda w: w.remove(), _weights_alone(method.apply(merged, delta)))


def without_tuned(params: Any, delta: Delta) -> Any:
    """Params with `Absent` for the leaves that the delta holds itself (`tune`), so that memory holds them once."""
    _need_params(params, "without_tuned")
    flat, treedef = flatten(params, is_adapted)
    return jax.tree.unflatten(
        treedef,
        [Absent(leaf.shape, leaf.dtype) if "value" in delta.get(path, ()) else leaf for path, leaf in flat],
    )


class Row(NamedTuple):
    path: str
    shape: tuple[int, ...]
    axes: str
    method: str
    factors: str
    trained: int


class Report(NamedTuple):
    """What trains; prints as a table. `total` counts the base's parameters."""

    rows: list[Row]
    trained: int
    total: int

    def __str__(self) -> str:
        header = ("path", "shape", "axes", "method", "factors", "trained", "share")
        lines = [(*map(str, row[:-1]), f"{row.trained:,}", f"{row.trained / self.total:.4%}") for row in self.rows]
        lines = [header, *lines]
        widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
        table = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        share = f"{self.trained / self.total:.4%}"
        return "\n".join([*table, f"trained: {self.trained:,} of {self.total:,} parameters ({share})"])


def check(method: ParamTransform, params: Any) -> Report:
    """What a method would train on these params (arrays or ShapeDtypeStructs); raises on what cannot work."""
    delta, adapted = _shapes(method, params)
    names = {path: name for name, paths in _methods(method, params) for path in paths}
    rows = []
    for path, factors in delta.items():
        w = adapted.get(path)
        shown = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in sorted(factors.items()))
        trained = sum(leaf.size for name, leaf in factors.items() if not name.startswith("fixed_"))
        shape, axes = (tuple(w.shape), w.axes) if w is not None else ((), "")
        rows.append(Row(path, shape, axes, names.get(path, ""), shown, trained))
    sizes = (int(np.prod(leaf.shape)) for _, leaf in flatten(params)[0] if hasattr(leaf, "shape"))
    return Report(rows, sum(row.trained for row in rows), max(sum(sizes), 1))


def _methods(method: ParamTransform, params: Any) -> Iterable[tuple[str, Iterable[str]]]:
    """(name, paths) of a transform, or of each in a chain."""
    for spec in method.spec["of"] if method.spec["method"] == "chain" else [method.spec]:
        part = from_spec(spec) if spec is not method.spec else method
        yield spec["method"], _shapes(part, params)[0]
