"""Activation functions by the names that Hugging Face gives them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.extras import extra

with extra("train"):
    from flax import linen as nn


def _recomputed(activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An activation, computed in float32 or wider, that keeps nothing for its derivative but its input."""

    def wide(x: Array) -> Array:
        return activation(x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)).astype(x.dtype)

    return jax.checkpoint(wide)


def _erf_gelu(x: Array) -> Array:
    # As torch has it; jax.nn.gelu's erfc takes three times as long.
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


_GELU = _recomputed(_erf_gelu)
_TANH_GELU = _recomputed(nn.gelu)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _GELU,
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


def check(name: str) -> None:
    """A ValueError unless there is such an activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is none of {', '.join(ACTIVATIONS)}")
