"""`lift`: run any JAX function on adapted arrays.

The function is traced with the bases in the adapted leaves' places, and its jaxpr evaluated with the adapted arrays as
values. Runs of equations that meet none go to JAX's own evaluation; an equation that meets one follows a rule of
`rules.py` or `control_flow.py`, or gets the weight dense, which is reported.
"""

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.extend.core as jex
from jax import Array

from lora_jax.core.arrays import Adapted, Tuned, is_adapted, ready
from lora_jax.core.lifting.taps import Sites, untapped

RULES: dict[str, Callable] = {}  # primitive name -> rule(equation, values, state) -> outputs, or None for "dense"
TAPPED = ("scan", "checkpoint", "remat", "remat2")  # primitives whose rules know taps, besides jit's


class DenseWeight(UserWarning):
    """An adapted weight was made dense, or is contracted over its output axes.

    >>> import warnings, lora_jax as lj
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", lj.DenseWeight)  # as on_dense="error" in every call of lift
    """


def rule(*names: str) -> Callable:
    """Registers what an equation of these primitives does with an adapted input."""

    def register(fn: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def lift(fn: Callable, on_dense: Literal["warn", "error", "allow"] = "warn") -> Callable:
    """The same function, now also accepting adapted arrays, and tapped params, anywhere in its arguments.

    It returns what `fn` returns for the merged weights, without forming them, and composes with jit, grad, vmap, scan
    and checkpoint: write `jax.jit(lift(f))`. Without adapted arguments it is `fn`. Taps act where `fn` names an
    activation. Differentiate the lifted function: a derivative that `fn` itself takes leaves the taps out.

    `on_dense` is what happens where a weight of more than one axis must be made dense (a function with custom
    derivatives, an operation without a rule), or is contracted over its output axis alone: a warning once a place, an
    error, or nothing.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> method = lj.lora(lj.select("kernel"), rank=1)
    >>> adapted = method.apply(params, method.init(jax.random.key(0), params))
    >>> lj.lift(lambda params, x: x @ params["kernel"])(adapted, jnp.ones((1, 3)))
    Array([[3., 3.]], dtype=float32)
    """
    if on_dense not in ("warn", "error", "allow"):
        raise ValueError(f"on_dense={on_dense!r}: choose 'warn', 'error' or 'allow'")
    seen: set[str] = set()

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        (args, kwargs), taps = untapped((args, kwargs))
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_adapted)
        leaves = [ready(leaf) if is_adapted(leaf) else leaf for leaf in leaves]
        leaves = [leaf.value if isinstance(leaf, Tuned) else leaf for leaf in leaves]
        adapted = {i: leaf for i, leaf in enumerate(leaves) if is_adapted(leaf)}
        if not adapted and not taps:
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            return fn(*args, **kwargs)

        def of_bases(*bases: Array) -> Any:
            replaced = dict(zip(adapted, bases, strict=True))
            args, kwargs = jax.tree.unflatten(treedef, [replaced.get(i, leaf) for i, leaf in enumerate(leaves)])
            return fn(*args, **kwargs)

        state = TraceState(on_dense, seen, Sites([(tap, *tap.per_occurrence()) for tap in taps]))
        bases = (w.base.base if is_adapted(w.base) else w.base for w in adapted.values())
        closed, shapes = jax.make_jaxpr(of_bases, return_shape=True)(*bases)
        outputs = evaluate(closed.jaxpr, closed.consts, list(adapted.values()), state)
        untouched = set(map(id, adapted.values()))
        outputs = [state.dense(None, x) if is_adapted(x) and id(x) not in untouched else x for x in outputs]
        state.finish()
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return lifted


def evaluate(jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any], state: "TraceState") -> list[Any]:
    """The outputs of a jaxpr for plain and adapted inputs."""
    env: dict[jex.Var, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    uses = [*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars]
    last_use = {var: n for n, inputs in enumerate(uses) for var in inputs if not isinstance(var, jex.Literal)}
    run: list[jex.JaxprEqn] = []  # plain equations, not evaluated yet
    made_dense: dict[jex.Var, Any] = {}

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jex.Literal) else env[var]

    def plain(var: Any) -> Any:
        value = read(var)
        return made_dense[var] if is_adapted(value) else value

    def flush(now: int) -> None:
        if run:
            outs = [var for eqn in run for var in eqn.outvars if last_use.get(var, -1) >= now]
            env.update(zip(outs, _plainly(jaxpr, run, outs, plain), strict=True))
            run.clear()

    for now, eqn in enumerate(jaxpr.eqns):
        adapted = [v for v in eqn.invars if not isinstance(v, jex.Literal) and is_adapted(env.get(v))]
        if state.sites and eqn.primitive.name == "name" and not adapted:
            flush(now)
            named = eqn.primitive.bind(read(eqn.invars[0]), **eqn.params)
            env[eqn.outvars[0]] = state.sites.at(eqn.params["name"], named)
            continue
        inside = state.sites and _has_sites(eqn, state.sites)
        if adapted or inside:
            flush(now)
            rule_of = RULES.get(eqn.primitive.name)
            outputs = rule_of(eqn, [read(v) for v in eqn.invars], state) if rule_of else None
            if outputs is not None:
                env.update(zip(eqn.outvars, outputs, strict=True))
                continue
            for var in dict.fromkeys(adapted):
                made_dense[var] = state.dense(eqn, env[var], made_dense.get(var))
        run.append(eqn)
    flush(len(jaxpr.eqns))
    return [read(var) for var in jaxpr.outvars]


def _has_sites(eqn: jex.JaxprEqn, sites: Sites) -> bool:
    """Whether an equation's jaxprs are to be evaluated for the activations named in them."""
    inlined = RULES.get(eqn.primitive.name) is RULES["jit"]
    names = sites.within(eqn, seen=inlined)
    if names and not inlined and eqn.primitive.name not in TAPPED:
        raise ValueError(f"the site {min(names)!r} is inside a {eqn.primitive.name!r}, where no tap can be")
    return bool(names)


def _plainly(jaxpr: jex.Jaxpr, eqns: list[jex.JaxprEqn], outs: list, read: Callable) -> list[Any]:
    """A run of equations by JAX's own evaluation."""
    made = {var for eqn in eqns for var in eqn.outvars}
    inputs = list(dict.fromkeys(v for e in eqns for v in e.invars if not isinstance(v, jex.Literal) and v not in made))
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    debug = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    sub = jaxpr.replace(constvars=[], invars=inputs, outvars=outs, eqns=list(eqns), effects=effects, debug_info=debug)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(sub, []))(*map(read, inputs))


@dataclasses.dataclass
class TraceState:
    """One call of a lifted function: its sites, and what it reports of adapted weights, once a line of user code."""

    on_dense: str
    seen: set[str]
    sites: Sites
    by_inputs: set[str] = dataclasses.field(default_factory=set)
    by_outputs: dict[str, str] = dataclasses.field(default_factory=dict)
    place: str | None = None  # of the user's call of the library function that is evaluated

    def inside(self, eqn: jex.JaxprEqn, jaxpr: jex.Jaxpr) -> "TraceState":
        """The same state for the body of a jitted function: a library's is cached, its lines are another call's."""
        if self.place or not jaxpr.debug_info.func_src_info.split(" at ")[-1].startswith(_library_roots()):
            return self
        return dataclasses.replace(self, place=_user_line(eqn))

    def below(self, sites: Sites) -> "TraceState":
        """The same state for a body with sites of its own."""
        return dataclasses.replace(self, sites=sites)

    def apart(self) -> "TraceState":
        """The same state for a body whose named values are not seen, nor counted, outside."""
        return self.below(dataclasses.replace(self.sites, met=self.sites.met.copy(), seen=dict(self.sites.seen)))

    def dense(self, eqn: jex.JaxprEqn | None, w: Adapted, made: Array | None = None) -> Array:
        """The dense array; reported where it is more than a vector."""
        if w.ndim > 1:
            place = (self.place or _user_line(eqn)) if eqn else "the function's return"
            by = f" by '{eqn.primitive.name}'" if eqn else ""
            self._report(place, f"adapted array at {w.path} is made dense{by} at {place}")
        return w.materialize() if made is None else made

    def contracts(self, eqn: jex.JaxprEqn, w: Adapted, transposed: bool) -> None:
        """A product contracts the weight's input axes or, `transposed`, its output axes."""
        if not transposed:
            self.by_inputs.add(str(w.path))
        elif len(w.core) == 2 and "v" not in w.core:
            self.by_outputs.setdefault(str(w.path), self.place or _user_line(eqn))

    def finish(self) -> None:
        """At the end of the function: an error for a site that did not occur, a report of axes that look exchanged."""
        self.sites.finish()
        for path in self.by_outputs.keys() - self.by_inputs:
            place, hint = self.by_outputs[path], "probably its axes are named the other way round ('oi' for 'io')"
            self._report(place, f"adapted array at {path} is contracted only over its output axis at {place}: {hint}")

    def _report(self, place: str, message: str) -> None:
        if self.on_dense == "allow" or place in self.seen:
            return
        self.seen.add(place)
        message += '; lift(fn, on_dense="allow") accepts it'
        if self.on_dense == "error":
            raise ValueError(message)
        warnings.warn(message, DenseWeight, stacklevel=4)


def _library_roots() -> tuple[str, ...]:
    names = ("jax", "flax", "numpy", "equinox", "optax")
    files = (sys.modules[name].__file__ or "" for name in names if name in sys.modules)
    return tuple(os.path.dirname(file) + os.sep for file in files)


def _user_line(eqn: jex.JaxprEqn) -> str:
    """File and line of the equation in the user's own code."""
    traceback: Any = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        file: str = frame.file_name
        if os.path.dirname(file) != os.path.dirname(__file__) and not file.startswith((*_library_roots(), "<")):
            return f"{file}:{frame.line_num}"
    return "an unknown place"
