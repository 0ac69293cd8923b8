"""The shapes of a model's parameters, without making them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict


def of_params(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of the parameters of a model of tokens."""
    params: Any = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
