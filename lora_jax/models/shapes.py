"""The shapes of a model's inputs, parameters and activations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.core.extras import extra

with extra("train"):
    from flax import linen as nn
    from flax.traverse_util import flatten_dict
    from jaxtyping import Float, Int, Shaped

Tokens = Int[Array | np.ndarray, "batch length"]  # and whatever else has an integer for each of them
Mask = Shaped[Array | np.ndarray, "batch length"]  # bool or int, 1 at the tokens that are no padding
Hidden = Float[Array, "batch length width"]


def of_params(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of the parameters of a language model or encoder."""
    params: Any = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def of_sites(layers: int, width: int, dtype: str) -> dict[str, tuple[int, tuple[int, ...], str]]:
    """`{name: (occurrences, shape, dtype)}` of the activations that our models name: without batch and length, in the
    order of the layers."""
    features: tuple[int, ...] = (width,)
    once = {"tokens": (1, (), "int32"), "positions": (1, (), "int32"), "embeddings": (1, features, dtype)}
    return once | dict.fromkeys(("attention_out", "mlp_out", "block_out"), (layers, features, dtype))
