"""Adapted arrays in jit, checkpoint, scan, while, cond and shard_map, rebuilt by JAX's public functions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.core.arrays import Adapted, is_adapted
from lora_jax.core.lifting.axis_ops import rebuild
from lora_jax.core.lifting.interpreter import TraceState, evaluate, rule


def _dense(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any]:
    """Values without adapted arrays, each reported."""
    return [state.dense(eqn, value) if is_adapted(value) else value for value in values]


@rule("jit", "pjit", "closed_call", "core_call")
def _jit(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any]:
    closed = eqn.params["jaxpr"]
    return evaluate(closed.jaxpr, closed.consts, values, state.inside(eqn, closed.jaxpr))


@rule("remat2", "checkpoint", "remat")
def _checkpoint(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any]:
    p = eqn.params

    def body(*args: Any) -> list[Any]:
        return evaluate(p["jaxpr"], (), args, state.apart())

    outputs = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(*values)
    state.sites.met.update(state.sites.within(eqn))
    return outputs


@rule("scan")
def _scan(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any]:
    p = eqn.params
    closed = p["jaxpr"]
    body = closed.jaxpr
    # by rank, since the parameters' names differ between versions of JAX: a carry keeps it, xs have one more outside
    carries = sum(_rank(i) == _rank(o) for i, o in zip(body.outvars, eqn.outvars, strict=True))
    stacked = sum(_rank(i) + 1 == _rank(o) for i, o in zip(body.invars, eqn.invars, strict=True))
    n = len(values) - carries - stacked
    consts, init, xs = values[:n], values[n : n + carries], values[n + carries :]
    xs = [x if is_adapted(x) and x.axes[0] == "s" else _dense(eqn, [x], state)[0] for x in xs]
    kept = _unchanged(init, body.invars[n : n + carries], body.outvars)
    moving = _dense(eqn, [x for k, x in enumerate(init) if k not in kept], state)

    def step(carry: list[Any], inputs: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        x, taps = inputs
        args = [*consts, *_combined(kept, carry), *x]
        outputs = evaluate(body, closed.consts, args, state.below(state.sites.step(taps, counts, p["length"])))
        carry = [out for k, out in enumerate(outputs[:carries]) if k not in kept]
        return _dense(eqn, carry, state), _dense(eqn, outputs[carries:], state)

    options = {name: p[name] for name in ("reverse", "unroll", "_split_transpose") if name in p}
    counts = state.sites.within(eqn)
    taps = state.sites.stacked(counts, p["length"], p["reverse"])
    carry, ys = lax.scan(step, moving, (xs, taps), length=p["length"], **options)
    return [*_combined(kept, carry), *ys]


def _rank(variable: Any) -> int:
    return variable.aval.ndim


@rule("while")
def _while(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any]:
    p = eqn.params
    test, body = p["cond_jaxpr"], p["body_jaxpr"]
    m, n = p["cond_nconsts"], p["body_nconsts"]
    test_consts, consts, init = values[:m], values[m : m + n], values[m + n :]
    kept = _unchanged(init, body.jaxpr.invars[n:], body.jaxpr.outvars)
    moving = _dense(eqn, [x for k, x in enumerate(init) if k not in kept], state)
    state = state.apart()

    def condition(carry: Any) -> Any:
        return evaluate(test.jaxpr, test.consts, [*test_consts, *_combined(kept, carry)], state)[0]

    def step(carry: Any) -> Any:
        outputs = evaluate(body.jaxpr, body.consts, [*consts, *_combined(kept, carry)], state)
        return _dense(eqn, [out for k, out in enumerate(outputs) if k not in kept], state)

    return _combined(kept, lax.while_loop(condition, step, moving))


def _unchanged(init: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[int, Any]:
    """The adapted carries that the body returns as they came: constants."""
    return {k: x for k, x in enumerate(init) if is_adapted(x) and outputs[k] is inputs[k]}


def _combined(kept: dict[int, Any], moving: Sequence[Any]) -> list[Any]:
    rest = iter(moving)
    return [kept[k] if k in kept else next(rest) for k in range(len(kept) + len(moving))]


@rule("cond")
def _cond(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> list[Any]:
    state = state.apart()

    def branch(closed: jex.ClosedJaxpr) -> Any:
        return lambda *args: _dense(eqn, evaluate(closed.jaxpr, closed.consts, args, state), state)

    return lax.switch(values[0], list(map(branch, eqn.params["branches"])), *values[1:])


@rule("shard_map")
def _shard_map(eqn: jex.JaxprEqn, values: Sequence[Any], state: TraceState) -> Sequence[Any]:
    p, state = eqn.params, state.apart()

    def body(*args: Any) -> tuple[Any, ...]:
        return tuple(_dense(eqn, evaluate(p["jaxpr"], (), args, state), state))

    specs = [_specs(x, spec) if is_adapted(x) else spec for x, spec in zip(values, p["in_specs"], strict=True)]
    options = {"mesh": p["mesh"], "axis_names": p["newly_manual_axes"], "check_vma": p["check_vma"]}
    return jax.shard_map(body, in_specs=tuple(specs), out_specs=tuple(p["out_specs"]), **options)(*values)


def _specs(w: Adapted, spec: PartitionSpec) -> Adapted:
    """The specs of an adapted array's leaves: a factor takes those of the base's axes that it follows."""
    entries = (*spec, *[None] * (w.ndim - len(spec)))

    def spec_of(array: Any, where: list, _: list) -> PartitionSpec:
        return PartitionSpec(*(entries[axis] if isinstance(axis, int) else None for axis in where))

    return rebuild(w, w.axes, spec_of)
