"""Transforms out of two functions: how the factors of one leaf, or one site, begin, and what they make of it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.arrays import Adapted, Encoded, PathLabel, is_adapted, is_changed, map_adapted
from lora_jax.core.lifting.taps import Tap, Tapped
from lora_jax.core.selection import Absent, Selection, check_globs, flatten, strings
from lora_jax.core.transforms import transform
from lora_jax.core.transforms.transform import Axes, Delta, Factors, Params, ParamTransform, Spec

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Target:
    """A leaf that a method adapts: an array, a ShapeDtypeStruct or Absent, at this path of the params.

    Attributes:
      axes: one letter an axis, or "" where the method does not ask for them.
      layers: of a stacked leaf, the entries that are adapted; None: all.
      shared: the key of the delta that has a factor instead of the path, `{factor: "@shared/..."}`; or one key for all
        factors. Targets with the same key have the same factor, and draw the same random numbers.

    >>> import numpy as np
    >>> target = Target("h/kernel", np.zeros((12, 4, 3)), "sio", layers=(10, 11))
    >>> target.stacked, target.inputs, target.outputs
    ((2,), (4,), (3,))
    """

    path: str
    leaf: Any = dataclasses.field(repr=False)
    axes: Axes = ""
    layers: tuple[int, ...] | None = None
    shared: str | Mapping[str, str] = dataclasses.field(default_factory=dict)

    def sizes(self, letters: str) -> tuple[int, ...]:
        """The sizes of the leaf's axes with these letters."""
        return tuple(n for n, letter in zip(self.leaf.shape, self.axes, strict=True) if letter in letters)

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of all stacked axes of the leaf."""
        return self.sizes("s")

    @property
    def stacked(self) -> tuple[int, ...]:
        """The sizes of a factor's stacked axes, which has the adapted layers alone."""
        return (len(self.layers), *self.stack[1:]) if self.layers and self.stack else self.stack

    @property
    def inputs(self) -> tuple[int, ...]:
        """The sizes of the input axes, a vocabulary and a convolution's window among them."""
        return self.sizes("ivk")

    @property
    def outputs(self) -> tuple[int, ...]:
        """The sizes of the output axes."""
        return self.sizes("o")

    @property
    def label(self) -> PathLabel:
        """The path, as an adapted array takes it."""
        return PathLabel(self.path)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields base, core and path of an adapted array in the target's place."""
        return {"base": self.leaf, "core": self.axes.lstrip("s"), "path": self.label}

    def scale(self, number: Any) -> Array:
        """A number for every entry of the stack, float32."""
        return jnp.broadcast_to(jnp.asarray(number, jnp.float32), self.stack)

    def all_layers(self, factor: Array, fill: float = 0.0) -> Array:
        """A factor of the adapted layers as one of all layers of the stack, with `fill` for the others."""
        if not (self.layers and self.stack):
            return factor
        full = jnp.full((self.stack[0], *factor.shape[1:]), fill, factor.dtype)
        return full.at[jnp.array(self.layers)].set(factor)

    def adapted_layers(self, array: Array) -> Array:
        """The inverse: the adapted layers of an array whose first axes are the stacked ones."""
        return array[jnp.array(self.layers)] if self.layers and self.stack else array

    def need_weight(self, method: str) -> None:
        """A ValueError unless the leaf is there and has input and output axes."""
        if isinstance(self.leaf, Absent) or not self.inputs or not self.outputs:
            problem = f"{self.path} with axes {self.axes!r}: {method} needs a weight with input and output axes"
            raise ValueError(f"{problem}; of several leaves select(..., ndim=2) takes the matrices")

    def key_of(self, factor: str) -> str:
        """The key of the delta that has this factor."""
        return self.shared if isinstance(self.shared, str) else self.shared.get(factor, self.path)

    def keys(self) -> set[str]:
        """The keys of the delta that have factors of this target."""
        return {self.shared} if isinstance(self.shared, str) else {self.path, *self.shared.values()}

    def fold(self, key: Array) -> Array:
        """The random key of this target: folded with the path, or with the key that targets share."""
        name = self.shared if isinstance(self.shared, str) else next(iter(self.shared.values()), self.path)
        return jax.random.fold_in(transform.typed_key(key), transform.stable_hash(name))

    def factors_in(self, delta: Delta) -> Factors:
        """The target's factors, its own and those that it shares."""
        if isinstance(self.shared, str):
            return delta[self.shared]
        for name, key in self.shared.items():
            if name in delta[self.path]:
                raise ValueError(f"{self.path} has a factor {name!r} of its own, but it is that of {key}")
        return {name: factor for key in self.keys() for name, factor in delta[key].items()}


def targets_of(selection: Selection, params: Params) -> list[Target]:
    """The selected leaves, with their axes."""
    leaves = selection.leaves(params)
    return [Target(path, leaf, selection.axes_of(path, leaf), selection.layers) for path, leaf in leaves.items()]


def per_target(
    spec: Spec,
    targets: Selection | Callable[[Params], Iterable[Target]],
    init: Callable[[Array, Target], Factors],
    adapt: Callable[[Target, Factors, Array | None, Any], Adapted],
    *,
    shapes: Callable[[Target], Shapes] | None = None,
    common: Callable[[Array, Sequence[Target]], Factors] | None = None,
    globs: Iterable[str] = (),
) -> ParamTransform:
    """A transform that adapts each selected leaf by itself.

    In `init` each glob of the spec's "select" and "exclude", and each alternative in its braces, must match a leaf. In
    `apply` some may match none, as in files of earlier versions.

    Args:
      spec: the transform as JSON; `spec["method"]` is its name.
      targets: a selection, or `params -> targets`.
      init: `(key, target) -> {factor: array}`.
      shapes: `target -> {factor: shape}`; others are a ValueError.
      adapt: `(target, factors, key or None, strength) -> adapted array` in the leaf's place.
      common: `(key of the transform's init, targets) -> {factor: array}` that all targets share, under
        `@shared/<method>` in the delta. `adapt` finds them among the factors.
      globs: further ones, of the method's options, that must match a leaf.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> def rank_one(selection):
    ...     def init(key, target):
    ...         inputs, outputs = target.leaf.shape
    ...         return {"a": jax.random.normal(key, (inputs, 1)), "b": jnp.zeros((1, outputs))}
    ...
    ...     def adapt(target, factors, key, strength):
    ...         return lj.LowRank(**target.fields, **factors, scale=target.scale(strength))
    ...
    ...     return lj.per_target({"method": "rank_one", **selection.spec()}, selection, init, adapt)
    >>> lj.check(rank_one(lj.select("kernel")), {"kernel": jnp.ones((3, 2))}).trained
    5
    """
    common_key = f"@shared/{spec['method']}"
    checked, exclude = [*strings(spec.get("select", ())), *globs], strings(spec.get("exclude", ()))

    def targets_in(params: Params) -> list[Target]:
        params = map_adapted(lambda w: w if isinstance(w, Encoded) else w.base, params)
        return targets_of(targets, params) if isinstance(targets, Selection) else list(targets(params))

    def keys_of(chosen: Iterable[Target]) -> set[str]:
        return {key for target in chosen for key in target.keys()} | ({common_key} if common else set())

    def init_all(key: Array, params: Params) -> Delta:
        transform.need_params(params, "init")
        check_globs(checked, map_adapted(lambda w: w.base, params), exclude)
        chosen, delta = targets_in(params), Delta()
        for target in chosen:
            delta.update({key: {} for key in sorted(target.keys() - delta.keys())})
            for name, factor in init(target.fold(key), target).items():
                owner = target.key_of(name)
                if (shape := delta[owner].setdefault(name, factor).shape) != factor.shape:
                    raise ValueError(f"{target.path}: its {name!r} is {factor.shape}, but {shape} in {owner}")
        return Delta({**delta, common_key: common(transform.typed_key(key), chosen)}) if common else delta

    def apply(params: Params, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Params:
        transform.need_params(params, "apply")
        chosen = targets_in(params)
        transform.need_delta(delta, keys_of(chosen))
        common_factors = delta[common_key] if common else {}
        if common:
            expected = jax.eval_shape(lambda: common(jax.random.key(0), chosen))
            need_factors(common_key, common_factors, _shapes(expected))
        by_path = {target.path: target for target in chosen}

        def adapted(path: str, leaf: Any) -> Any:
            if (target := by_path.get(path)) is None:
                return leaf
            if is_changed(leaf):
                raise ValueError(f"{path} is adapted already ({leaf}); two transforms on one leaf")
            factors = target.factors_in(delta)
            if shapes:
                need_factors(path, factors, shapes(target))
            return adapt(target, {**factors, **common_factors}, None if key is None else target.fold(key), strength)

        flat, treedef = flatten(params, is_adapted)
        return jax.tree.unflatten(treedef, [adapted(path, leaf) for path, leaf in flat])

    return ParamTransform(init_all, apply, spec, lambda params: keys_of(targets_in(params)))


def per_site(
    spec: Spec,
    sites: Mapping[str, int],
    init: Callable[[Array, str, int], Factors],
    fn: Callable,
    layers: Sequence[int] | None = None,
    common: Callable[[Array], Factors] | None = None,
) -> ParamTransform:
    """A transform that changes the named activations, whatever the params (Houlsby's adapters, prefixes).

    Args:
      spec: the transform as JSON; its method's name and a site make the key `@site/method` of the delta.
      sites: how often each occurs.
      init: `(key, site, n) -> {factor: array}`, stacked over n occurrences.
      fn: of `Tap`, for every site.
      layers: the occurrences that are changed; None: all.
      common: `key -> {factor: array}` that all occurrences share, as in `per_target`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from jax.ad_checkpoint import checkpoint_name
    >>> shift = lj.per_site(
    ...     {"method": "shift_site"},
    ...     {"hidden": 1},
    ...     init=lambda key, site, n: {"by": jnp.ones((n, 3))},
    ...     fn=lambda factors, x, seen: x + factors["by"],
    ... )
    >>> model = lj.lift(lambda params, x: checkpoint_name(x * params["scale"], "hidden"))
    >>> params = {"scale": jnp.array(2.0)}
    >>> model(shift.apply(params, shift.init(jax.random.key(0), params)), jnp.ones(3))
    Array([3., 3., 3.], dtype=float32)
    """
    chosen = None if layers is None else tuple(layers)
    for site, count in sites.items():
        if chosen is not None and (not chosen or sorted(chosen) != sorted(set(chosen) & set(range(count)))):
            raise ValueError(f"layers={list(chosen)}: name some of the {count} of the site {site!r}, each once")
    names = {f"@{site}/{spec['method']}": site for site in sites}
    counts = {site: count if chosen is None else len(chosen) for site, count in sites.items()}
    common_key = f"@shared/{spec['method']}"

    def init_all(key: Array, params: Params) -> Delta:
        transform.need_params(params, "init")
        key = transform.typed_key(key)
        keys = {name: jax.random.fold_in(key, transform.stable_hash(name)) for name in names}
        delta = Delta({name: init(keys[name], site, counts[site]) for name, site in names.items()})
        return Delta({**delta, common_key: common(key)}) if common else delta

    def apply(params: Params, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Tapped:
        transform.need_params(params, "apply")
        expected = jax.eval_shape(init_all, jax.random.key(0), {})
        transform.need_delta(delta, set(expected))
        for name, factors in expected.items():
            need_factors(name, delta[name], _shapes(factors))
        is_full = isinstance(strength, float | int) and strength == 1
        weight = None if is_full else jnp.asarray(strength, jnp.float32)

        def tap(name: str, site: str) -> Tap:
            shared = delta[common_key] if common else {}
            factors = delta[name] | {n: jnp.broadcast_to(x, (counts[site], *x.shape)) for n, x in shared.items()}
            return Tap(factors=factors, strength=weight, site=site, fn=fn, count=sites[site], layers=chosen, name=name)

        return Tapped(params, tuple(tap(name, site) for name, site in names.items()))

    return ParamTransform(init_all, apply, spec, lambda params: {*names, *([common_key] if common else [])})


def need_factors(path: str, factors: Mapping[str, Any], shapes: Shapes) -> None:
    """A ValueError unless the factors of a path have these names and shapes."""
    if (have := _shapes(factors)) != shapes:
        raise ValueError(f"{path}: the delta's factors are {have}, but the base and the method need {shapes}")


def _shapes(factors: Mapping[str, Any]) -> Shapes:
    return {name: tuple(factor.shape) for name, factor in factors.items()}
