"""Activation functions by the names that Hugging Face gives them."""

import functools
from collections.abc import Callable

from flax import linen as nn
from jax import Array

_TANH_GELU = functools.partial(nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
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
