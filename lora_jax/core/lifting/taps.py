"""Taps: functions at the activations that a model names, and the tree that carries them.

A model names an activation with `jax.ad_checkpoint.checkpoint_name(x, "mlp_out")`; the name is a site, each time it is
met an occurrence, one a layer. `lift` sees the names, whatever the model is: a loop, scanned, rematerialized.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array

Site = tuple[int, tuple[int, ...], str]  # occurrences, shape, dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """`fn(factors, x, seen) -> x` in place of every activation of one site.

    Attributes:
      factors: a pytree, stacked over the occurrences in their order, or over `layers` of them.
      strength: 0 leaves the activation, 1 (and None) is what `fn` gives; in between a mean.
      fn: keeps x's shape and dtype; `seen` are the named values met before, as the model had them (`seen["tokens"]`).
        A frozen dataclass rather than a closure, so that equal taps compile once.
      count: how often the site occurs.
      layers: the occurrences that are tapped; None: all.
      name: under which the delta has the factors, `@site/method`.
    """

    factors: Any
    strength: Any = None
    site: str = dataclasses.field(metadata={"static": True})
    fn: Callable[[Any, Array, Mapping[str, Array]], Array] = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    layers: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    name: str = dataclasses.field(default="", metadata={"static": True})

    def per_occurrence(self) -> tuple[Any, list[bool]]:
        """The factors of all occurrences, and which of them are tapped."""
        if self.layers is None:
            return self.factors, [True] * self.count
        # the others get a tapped one's, rather than zeros, so that what is not taken of them is finite as well
        rows = jnp.array([self.layers.index(n) if n in self.layers else 0 for n in range(self.count)])
        return jax.tree.map(lambda x: x[rows], self.factors), [n in self.layers for n in range(self.count)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Tapped:
    """Params, plain or adapted, and the taps that a lifted function meets with them.

    >>> import jax, lora_jax as lj
    >>> method = lj.adapter({"mlp_out": (2, 16)}, rank=4)
    >>> tapped = method.apply({}, method.init(jax.random.key(0), {}))
    >>> isinstance(tapped, lj.Tapped), [tap.site for tap in tapped.taps]
    (True, ['mlp_out'])
    """

    params: Any
    taps: tuple[Tap, ...]

    def _unlifted(self, *_: Any, **__: Any) -> Any:
        raise TypeError("these params are tapped: wrap the function with lora_jax.lift")

    __getitem__ = __iter__ = __contains__ = __call__ = keys = items = values = _unlifted

    def __repr__(self) -> str:
        return f"Tapped(params, taps at {', '.join(tap.site for tap in self.taps)})"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"tapped params have no {name}: wrap the function with lora_jax.lift")


def untapped(tree: Any) -> tuple[Any, tuple[Tap, ...]]:
    """The tree with params in the place of tapped ones, and all their taps."""
    taps: list[Tap] = []

    def params(node: Any) -> Any:
        if not isinstance(node, Tapped):
            return node
        taps.extend(node.taps)
        return node.params

    return jax.tree.map(params, tree, is_leaf=lambda node: isinstance(node, Tapped)), tuple(taps)


@dataclasses.dataclass
class Sites:
    """The named activations that a lifted call has met so far, in the function or in the body of a scan."""

    taps: list[tuple[Tap, Any, Any]]  # (tap, factors of the occurrences here, which are tapped: bools or traced)
    met: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # occurrences so far, by site
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)  # the named values so far

    def __bool__(self) -> bool:
        return bool(self.taps)

    def within(self, eqn: jex.JaxprEqn, seen: bool = False) -> dict[str, int]:
        """How often each tapped site, or each that can be `seen`, occurs in an equation's own jaxprs."""
        tapped = {tap.site for tap, *_ in self.taps}
        if not tapped:
            return {}
        return {name: count for name, (count, *_) in _in_params(eqn).items() if seen or name in tapped}

    def at(self, name: str, x: Any) -> Any:
        """What stands for the named activation."""
        self.seen[name], n = x, self.met[name]
        self.met[name] += 1
        for tap, factors, tapped in self.taps:
            if tap.site == name and n >= len(tapped):
                raise ValueError(f"more than {tap.count} activations are named {name!r} (lora_jax.sites counts them)")
            if tap.site != name or tapped[n] is False:
                continue
            y = _changed(tap, jax.tree.map(lambda leaf: leaf[n], factors), x, self.seen)
            x = y if tapped[n] is True else jnp.where(tapped[n], y, x)
        return x

    def stacked(self, counts: Mapping[str, int], length: int, reverse: bool) -> list[tuple[Any, Array | None]]:
        """Factors, and which are tapped (None: all), of so many occurrences in a scan, by step; counts them."""

        def steps(leaf: Array, name: str) -> Array:
            n = counts.get(name, 0)
            here = leaf[self.met[name] : self.met[name] + n]
            if len(here) < n:
                raise ValueError(f"more than {len(leaf)} activations are named {name!r} (lora_jax.sites counts them)")
            by_step = here.reshape(length, n // length, *leaf.shape[1:])
            return by_step[::-1] if reverse else by_step  # the last step comes first

        by_tap: list[tuple[Any, Array | None]] = []
        for tap, factors, tapped in self.taps:
            factors = jax.tree.map(lambda x, name=tap.site: steps(x, name), factors)
            which = steps(jnp.array(tapped), tap.site)  # also checks how many there are
            by_tap.append((factors, None if tap.layers is None else which))
        self.met.update(counts)
        return by_tap

    def step(self, by_tap: Iterable[tuple[Any, Array | None]], counts: Mapping[str, int], length: int) -> "Sites":
        """The sites of a scan's body, with its part of `stacked`."""
        taps = []
        for (tap, *_), (factors, tapped) in zip(self.taps, by_tap, strict=True):
            every = [True] * (counts.get(tap.site, 0) // length)
            taps.append((tap, factors, every if tapped is None else tapped))
        return Sites(taps, seen=dict(self.seen))

    def finish(self) -> None:
        """An error for a site that occurred more or less often than its tap is for."""
        for tap, *_ in self.taps:
            if self.met[tap.site] != tap.count:
                problem = f"the function has {self.met[tap.site]} activations named {tap.site!r}, not {tap.count}"
                raise ValueError(f"{problem} (lora_jax.sites lists them)")


class _Seen(dict):
    """The named values that a tap sees; asking for another is an error that names both."""

    def __init__(self, values: Mapping[str, Any], site: str):
        super().__init__(values)
        self.site = site

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"the tap at {self.site!r} needs the activation {name!r}, which is not named before it")


def _changed(tap: Tap, factors: Any, x: Array, seen: Mapping[str, Any]) -> Array:
    y = tap.fn(factors, x, _Seen(seen, tap.site))
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        raise ValueError(f"the tap at {tap.site!r} made {y.dtype}{y.shape} of {x.dtype}{x.shape}")
    if tap.strength is None:
        return y
    s = jnp.asarray(tap.strength).astype(x.dtype)
    return (1 - s) * x + s * y


def sites(fn: Callable, *args: Any, **kwargs: Any) -> dict[str, Site]:
    """The activations that a function names, found by tracing: `{name: (occurrences, shape, dtype)}`.

    The arguments may be ShapeDtypeStructs.

    >>> import jax, jax.numpy as jnp
    >>> from jax.ad_checkpoint import checkpoint_name
    >>> sites(lambda x: checkpoint_name(checkpoint_name(x, "in") * 2, "out"), jnp.ones(3))
    {'in': (1, (3,), 'float32'), 'out': (1, (3,), 'float32')}
    """
    return _in_equations(jax.make_jaxpr(fn)(*args, **kwargs).eqns)


def _in_equations(eqns: Iterable[jex.JaxprEqn]) -> dict[str, Site]:
    total: dict[str, Site] = {}
    for eqn in eqns:
        part = _in_params(eqn)
        if eqn.primitive.name == "name":
            named: Any = eqn.outvars[0].aval
            part = {eqn.params["name"]: (1, named.shape, named.dtype.name)}
        for name, (count, shape, dtype) in part.items():
            total[name] = (count + total.get(name, (0,))[0], shape, dtype)
    return total


def _in_params(eqn: jex.JaxprEqn) -> dict[str, Site]:
    """The sites in an equation's jaxprs, those of a scan for each of its steps."""
    inner = [leaf for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(leaf)]
    once = _in_equations(eqn for jaxpr in inner for eqn in jaxpr.eqns)
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    return {name: (count * times, shape, dtype) for name, (count, shape, dtype) in once.items()}


def _is_jaxpr(node: Any) -> bool:
    return isinstance(node, jex.Jaxpr | jex.ClosedJaxpr)
