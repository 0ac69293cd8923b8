"""Adapted params as plain ones, and back."""

from typing import Any

import jax

from lora_jax.core.arrays import is_adapted, map_adapted
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.selection import Absent, flatten
from lora_jax.core.transforms.transform import Delta, ParamTransform, need_params


def merge(adapted: Any) -> Any:
    """Plain params: every adapted array dense, summed in float32 and rounded once to the base's dtype. The other leaves
    are the base's own; under `jax.jit` they are copied."""
    if isinstance(adapted, Delta):
        raise TypeError("merge takes adapted params (method.apply(params, delta)), got a Delta")
    return map_adapted(lambda w: w.materialize(), _weights_alone(adapted))


def _weights_alone(adapted: Any) -> Any:
    params, taps = untapped(adapted)
    if taps:
        what = f"what changes activations ({', '.join(sorted({tap.site for tap in taps}))})"
        raise ValueError(f"{what} has no weight to go into: keep it beside the base, and lift")
    return params


def unmerge(merged: Any, method: ParamTransform, delta: Delta) -> Any:
    """The base of merged params, within one rounding of max(|merged|, |delta|); a ValueError where a method cannot be
    undone (tuned leaves). Exact switching is `method.apply(base, other_delta)`."""
    return map_adapted(lambda w: w.remove(), _weights_alone(method.apply(merged, delta)))


def without_tuned(params: Any, delta: Delta) -> Any:
    """Params with `Absent` for the leaves that the delta holds itself (`tune`), so that memory holds them once."""
    need_params(params, "without_tuned")
    flat, treedef = flatten(params, is_adapted)
    absent = {path: Absent(leaf.shape, leaf.dtype) for path, leaf in flat if "value" in delta.get(path, ())}
    return jax.tree.unflatten(treedef, [absent.get(path, leaf) for path, leaf in flat])
