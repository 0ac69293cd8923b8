"""Small Flax models that know nothing of LoRA."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np


class Block(nn.Module):
    width: int = 8
    dtype: Any = None

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.gelu(nn.Dense(2 * self.width, name="up", dtype=self.dtype)(x))
        return x + nn.Dense(self.width, name="down", dtype=self.dtype)(h), None


class Stack(nn.Module):
    """A tower of blocks as a Python loop (h_0, h_1, ..) or scanned (h), with or without remat."""

    layers: int = 3
    width: int = 8
    scan: bool = False
    remat: bool = False
    dtype: Any = None
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            scanned = nn.scan(
                block,
                variable_axes={"params": self.axis},
                split_rngs={"params": True},
                length=self.layers,
            )
            return scanned(self.width, self.dtype, name="h")(x, None)[0]
        for layer in range(self.layers):
            x, _ = block(self.width, self.dtype, name=f"h_{layer}")(x, None)
        return x


class Tied(nn.Module):
    """An embedding looked up at the bottom and used as output head."""

    vocab: int = 11
    width: int = 6

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(self.vocab, self.width, name="wte")
        return embed.attend(nn.tanh(nn.Dense(self.width, name="mix")(embed(ids))))


def started(model: nn.Module, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """Random parameters of a model, of the size that Flax's are: no initialization is compiled for them."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(seed), *args, **kwargs))["params"]
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: Any) -> jax.Array:
        constant = {"bias": np.zeros, "scale": np.ones}.get(path[-1].key)
        value = constant(leaf.shape) if constant else 0.35 * rng.normal(size=leaf.shape)
        return jax.device_put(value.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def stacked(params: Any, layers: int) -> Any:
    """The loop's tree in the scanned layout."""
    rest = {name: value for name, value in params.items() if not name.startswith("h_")}
    blocks = [params[f"h_{layer}"] for layer in range(layers)]
    return {**rest, "h": jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves)), *blocks)}
