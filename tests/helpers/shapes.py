"""The shapes of a model's parameters, without the time that tracing many equal layers takes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


def params_of(model: Any) -> Any:
    """As `jax.eval_shape` of its init gives them, of a model whose layers are not scanned: h_0 stands for each."""
    name = "n_layer" if hasattr(model.config, "n_layer") else "layers"
    one = type(model)(dataclasses.replace(model.config, **{name: 1}))
    params = jax.eval_shape(one.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    return {path: leaf for path, leaf in params.items() if path != "h_0"} | {
        f"h_{number}": params["h_0"] for number in range(getattr(model.config, name))
    }
