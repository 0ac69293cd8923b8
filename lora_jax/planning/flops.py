"""Matmul FLOPs of a jaxpr: dot_general and convolutions, times the lengths of scans."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def count(fn: Callable, *args: Any) -> int:
    """FLOPs (2 a multiply-add) of fn traced on these arguments (arrays or ShapeDtypeStructs)."""
    return of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def of_jaxpr(jaxpr: Any) -> int:
    """FLOPs of a jaxpr's products and convolutions, times the lengths of its scans."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = [of_jaxpr(sub) for sub in subjaxprs(eqn)]
        if name == "dot_general":
            (lhs, _), _ = eqn.params["dimension_numbers"]
            contracted = math.prod(eqn.invars[0].aval.shape[axis] for axis in lhs)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * contracted
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * taps
        elif name == "scan":
            total += eqn.params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "while":
            if any(inner):
                raise ValueError("a product inside a while loop has no static count")
        elif name == "shard_map":
            total += eqn.params["mesh"].size * sum(inner)
        else:
            total += sum(inner)
    return total


def subjaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters."""
    for value in eqn.params.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            entry = getattr(entry, "jaxpr", entry)
            if hasattr(entry, "eqns"):
                yield entry


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in subjaxprs(eqn):
            yield from equations(sub)
