"""Which factors of a delta are not finite; asked where a delta is kept, not in the compiled step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, NamedSharding, P

from lora_jax.checkpoints.files import named


def not_finite(delta: Any, members: bool = False) -> dict[int, str]:
    """`{run: path:factor}`, the first factor that is not finite of each run that has one: of a delta alone of run 0;
    with `members` the leading axis of the delta has the runs. With several processes all of them call this.
    """
    first: dict[int, str] = {}
    for name, x in named(delta).items():
        sharding = getattr(x, "sharding", None)
        replicated = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
        # compiled once a shape, and one after the other, as `checkpoints.files.checksums`
        finite = jax.device_get(jax.jit(_finite, static_argnums=1, out_shardings=replicated)(x, members))
        for run in np.flatnonzero(~finite).tolist():
            first.setdefault(run, name)
    return first


def _finite(x: Array, members: bool) -> Array:
    """(runs,) bool."""
    return jnp.isfinite(x).all(range(int(members), x.ndim)).reshape(-1)
