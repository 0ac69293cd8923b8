"""Adapted params as plain ones, and back."""

from typing import Any

from lora_jax.core.arrays import Adapted, Tuned, map_adapted, widened
from lora_jax.core.lifting.axis_ops import cast
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.transforms.transform import Delta, ParamTransform


def merge(adapted: Any, dtype: Any = None) -> Any:
    """Plain params: every adapted array dense, summed in float32 and rounded once, to the base's dtype or to `dtype`.
    The other leaves are the base's own; under `jax.jit` they are copied.

    Quantized leaves (`lora_jax.quantize`) become dense too, adapted or not, with the values that the adapter was
    trained on; nothing is quantized again.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, method = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> delta = lj.Delta({"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}})
    >>> lj.merge(method.apply(params, delta))["kernel"][0]
    Array([2., 2.], dtype=float32)
    """
    if isinstance(adapted, Delta) or isinstance(dtype, Delta):
        raise TypeError("merge takes adapted params alone, merge(method.apply(params, delta)); got a Delta")

    def dense(w: Adapted) -> Any:
        wide = w if dtype is None or isinstance(w, Tuned) else cast(w, widened(w.dtype))
        return wide.materialize().astype(dtype or w.dtype)

    return map_adapted(dense, _weights_alone(adapted))


def _weights_alone(adapted: Any) -> Any:
    params, taps = untapped(adapted)
    if taps:
        what = f"what changes activations ({', '.join(sorted({tap.site for tap in taps}))})"
        raise ValueError(f"{what} has no weight to go into: keep it beside the base, and lift")
    return params


def unmerge(merged: Any, method: ParamTransform, delta: Delta) -> Any:
    """The base of merged params, within one rounding of `max(|merged|, |delta|)`; a ValueError where a method cannot be
    undone (tuned leaves). Exact switching is `method.apply(base, other_delta)`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, method = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> delta = lj.Delta({"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}})
    >>> lj.unmerge(lj.merge(method.apply(params, delta)), method, delta)["kernel"][0]
    Array([1., 1.], dtype=float32)
    """
    return map_adapted(lambda w: w.remove(), _weights_alone(method.apply(merged, delta)))
