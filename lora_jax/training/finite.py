"""Which factors of a delta are not finite; asked where a delta is kept, not in the compiled step."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.checkpoints.files import named, on_each


def not_finite(delta: Any, members: bool = False) -> dict[int, str]:
    """`{run: path:factor}`, the first factor that is not finite of each run that has one: of a delta alone of run 0;
    with `members` the leading axis of the delta has the runs. With several processes all of them call this.
    """
    first: dict[int, str] = {}
    for name, finite in on_each(_finite_members if members else _finite, named(delta)):
        for run in np.flatnonzero(~finite).tolist():
            first.setdefault(run, name)
    return first


def _finite(x: Array) -> Array:
    """(1,) bool."""
    return jnp.isfinite(x).all()[None]


def _finite_members(x: Array) -> Array:
    """(runs,) bool."""
    return jnp.isfinite(x).all(range(1, x.ndim))
