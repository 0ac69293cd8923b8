"""A language model of single-head attention without MLPs, and what its family publishes."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, Sharding
from jax.sharding import PartitionSpec as P

from lora_jax.models.family import Dimensions, Family, OutputHead, register_family


@dataclasses.dataclass(frozen=True)
class AcmeConfig:
    """The shape of the model, and how it is computed."""

    vocab_size: int
    width: int = 8
    depth: int = 2
    max_length: int = 64
    eos_token_id: int = 0
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    residual: Sharding | None = None
    family: ClassVar[str] = "acme"


class Block(nn.Module):
    config: AcmeConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        c = self.config
        dense = {name: nn.Dense(c.width, use_bias=False, param_dtype=c.param_dtype, name=name) for name in "qkvo"}
        y = nn.LayerNorm(param_dtype=c.param_dtype, name="norm")(x)
        q, k, v = (dense[name](y) for name in "qkv")
        scores = jnp.where(mask, q @ k.swapaxes(1, 2) * c.width**-0.5, -1e9)
        x = x + checkpoint_name(dense["o"](jax.nn.softmax(scores) @ v), "mixed")
        return x if c.residual is None else jax.lax.with_sharding_constraint(x, c.residual), None


class Acme(nn.Module):
    """`Acme(config).apply({"params": params}, tokens, mask)`: logits of the next token, (batch, length, vocabulary)."""

    config: AcmeConfig

    def setup(self) -> None:
        c = self.config
        self.words = nn.Embed(c.vocab_size, c.width, param_dtype=c.param_dtype)
        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
        if c.scan_layers:
            axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            self.h: Any = nn.scan(block, **axes, in_axes=nn.broadcast, length=c.depth)(c)
        else:
            self.h = [block(c) for _ in range(c.depth)]
        self.last = nn.LayerNorm(param_dtype=c.param_dtype)
        self.guess = nn.Dense(c.vocab_size, use_bias=False, param_dtype=c.param_dtype)

    def __call__(self, tokens: Array, mask: Array | None = None, labelled: Array | None = None) -> Array:
        return self.predict(self.states(tokens, mask, labelled))

    def states(self, tokens: Array, mask: Array | None = None, labelled: Array | None = None) -> Array:
        length = tokens.shape[1]
        seen = jnp.tril(jnp.ones((1, length, length), bool))
        seen = seen if mask is None else jnp.logical_and(seen, mask[:, None, :])
        x = self.words(tokens)
        for block in [self.h] if self.config.scan_layers else self.h:
            x, _ = block(x, seen)
        x = x if labelled is None else jnp.take_along_axis(x, labelled[..., None], axis=1)
        return self.last(x)

    def predict(self, x: Array) -> Array:
        return self.guess(x)


AXES = {
    "words/embedding": "vo",
    "h_*/**/kernel": "io",
    "h_*/**/{scale,bias}": "o",
    "h/**/kernel": "sio",
    "h/**/{scale,bias}": "so",
    "guess/kernel": "io",
    "last/{scale,bias}": "o",
}


def sharding_rules(config: AcmeConfig, mesh: Mesh) -> dict[str, P]:
    layer = {"{q,k,v}/kernel": P("fsdp", "tensor"), "o/kernel": P("tensor", "fsdp"), "norm/{scale,bias}": P()}
    return (
        {f"**/h_*/{glob}": spec for glob, spec in layer.items()}
        | {f"**/h/{glob}": P(None, *spec) for glob, spec in layer.items()}
        | {"**/words/embedding": P("tensor", "fsdp"), "**/guess/kernel": P("fsdp", "tensor")}
        | {"**/last/{scale,bias}": P()}
    )


register_family(
    Family(
        "acme",
        Acme,
        AXES,
        sites=lambda config: {"mixed": (config.depth, (config.width,), config.dtype)},
        sharding_rules=sharding_rules,
        dimensions=lambda config: Dimensions(config.depth, config.width, 1, config.width, config.max_length),
        output_head=OutputHead(lambda config: ("guess",), hidden="states", logits="predict"),
    )
)
