"""RoBERTa (Liu et al. 2019) and BERT (Devlin et al. 2018) in Flax linen: one encoder, with or without a head.

Layers are named as GPT-2's are (`h_0/attn/query/kernel`), so that the same globs select them, and may be scanned or
rematerialized too. Dropout acts only where `apply` gets an rng of that name.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec, Sharding

from lora_jax.core.dropout import drop
from lora_jax.core.extras import extra
from lora_jax.models import activations, masks, partitioning, shapes
from lora_jax.models.attention import Mask, attend, joined_heads, placed, split_heads
from lora_jax.models.family import Dimensions, Family, Sites, register_family
from lora_jax.models.layouts import to_loop, to_scanned
from lora_jax.models.norm import Norm, wide

with extra("train"):
    from flax import linen as nn
    from jaxtyping import Float

__all__ = ["AXES", "SIZES", "Encoder", "EncoderConfig", "sites", "to_loop", "to_scanned"]

Hidden = Float[Array, "batch length width"]

# The axes of every parameter, in the loop layout (h_0, h_1, ...) and in the scanned one (h).
AXES = {
    "h_*/**/kernel": "io",
    "h_*/**/{bias,scale}": "o",
    "h/**/kernel": "sio",
    "h/**/{bias,scale}": "so",
    "**/embedding": "vo",
    "{pooler,classifier}/**/kernel": "io",
    "{embeddings,pooler,classifier}/**/{bias,scale}": "o",
}

FAMILIES = ("roberta", "bert")
HEADS = (None, "classification", "regression")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder, and how to compute it: in `dtype`, from parameters that start in `param_dtype`.

    Attributes:
      family: "roberta" counts positions from `pad_id + 1` over the non-padding tokens, and its head is a layer, tanh
        and a layer on the first token; "bert" counts from 0 over all tokens, and its head is a layer on the pooler's
        output.
      max_positions: rows of the position table; RoBERTa's first `pad_id + 1` are not used.
      head: None, "classification" or "regression" (one number).
      pooler: a layer and tanh on the first token; BERT's head needs it.
      dropout, attention_dropout: rates in training, of embeddings, sublayers and head, and of attention's weights.
      residual: the sharding of activations (batch, length, hidden) between layers, as GPT-2's.
    """

    family: str = "roberta"
    vocab_size: int = 50265
    max_positions: int = 514
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    inner: int = 3072
    token_types: int = 1
    eps: float = 1e-5
    activation: str = "gelu"
    pad_id: int = 1
    head: str | None = None
    labels: int = 2
    pooler: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan_layers: bool = False  # compiles one layer instead of all
    remat: bool = False  # recomputes each layer in the backward pass instead of storing its inside
    dtype: str = "float32"
    param_dtype: str = "float32"
    residual: Sharding | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES or self.head not in HEADS:
            raise ValueError(f"family {self.family!r}, head {self.head!r}: choose from {FAMILIES} and {HEADS}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if not (0 <= self.dropout < 1 and 0 <= self.attention_dropout < 1):
            raise ValueError(f"dropout {self.dropout}, {self.attention_dropout}: rates from 0 to below 1")
        if self.head == "regression" and self.labels != 1:
            raise ValueError(f"a regression head has one label, not {self.labels}")
        if self.head and self.pooler != (self.family == "bert"):
            raise ValueError(f"{self.family} with a head has {'a' if self.family == 'bert' else 'no'} pooler")
        activations.check(self.activation)

    @property
    def first_position(self) -> int:
        """The position of a sequence's first token."""
        return self.pad_id + 1 if self.family == "roberta" else 0

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_positions - self.first_position


SIZES = {
    "roberta-base": EncoderConfig(),
    "roberta-large": EncoderConfig(hidden=1024, layers=24, heads=16, inner=4096),
    "bert-base": EncoderConfig(
        "bert", vocab_size=30522, max_positions=512, token_types=2, eps=1e-12, pad_id=0, pooler=True
    ),
}


class Attention(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Hidden, mask: Mask | None) -> Hidden:
        config = self.config
        query, key, value = (
            placed(split_heads(_dense(config, config.hidden, name)(x), config.heads), config.residual)
            for name in ("query", "key", "value")
        )
        drop_weights = functools.partial(_dropped, self, rate=config.attention_dropout)
        out = joined_heads(attend(query, key, value, mask, drop_weights))
        return _dense(config, config.hidden, "out")(out)


class MLP(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        x = _dense(self.config, self.config.inner, "up")(x)
        x = activations.ACTIVATIONS[self.config.activation](x)
        return _dense(self.config, self.config.hidden, "down")(x)


class Block(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Hidden, mask: Mask | None) -> tuple[Hidden, None]:
        config = self.config
        attended = _dropped(self, Attention(config, name="attn")(x, mask), config.dropout)
        x = _norm(config, "ln_1")(x + checkpoint_name(attended, "attention_out"))
        hidden = _dropped(self, MLP(config, name="mlp")(x), config.dropout)
        x = _norm(config, "ln_2")(x + checkpoint_name(hidden, "mlp_out"))
        return checkpoint_name(placed(x, config.residual), "block_out"), None


class Encoder(nn.Module):
    """The model: `Encoder(config).apply({"params": params}, tokens, mask, token_types)`."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, tokens: shapes.Tokens, mask: shapes.Mask | None = None, token_types: shapes.Tokens | None = None
    ) -> Hidden | Float[Array, "batch labels"]:
        """Logits (batch, labels), float32; without a head the hidden states (batch, length, hidden).

        Args:
          tokens: ids (batch, length) int32. Ids outside the vocabulary give NaN.
          mask: (batch, length) bool or int, 1 at non-padding tokens; padding is on the right. Hidden states at padding
            mean nothing.
          token_types: (batch, length) int32, the sentence of a pair that a token belongs to; zeros by default.

        Raises:
          ValueError: more tokens than positions.
        """
        config = self.config
        if tokens.shape[1] > config.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens, but the model has {config.max_length} positions for them")
        keep = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        x = self._embed(tokens, keep, token_types)
        x = self._blocks(x, None if mask is None else masks.attention_mask(keep, None))
        first = x[:, 0]
        # Without a head the pooler is only there to have its parameters.
        pooled = nn.tanh(_dense(config, config.hidden, "pooler")(first)) if config.pooler else first
        if config.head is None:
            return x
        if config.family == "bert":
            logits = _dense(config, config.labels, "classifier")(_dropped(self, pooled, config.dropout))
        else:
            logits = Head(config, name="classifier")(first)
        return logits.astype(jnp.float32)

    def _embed(self, tokens: shapes.Tokens, mask: masks.PaddingMask, token_types: shapes.Tokens | None) -> Hidden:
        config = self.config
        if config.family == "roberta":
            positions = jnp.where(mask, masks.count_before(mask) + config.first_position, config.pad_id)
        else:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        tokens = checkpoint_name(tokens, "tokens")
        positions = checkpoint_name(positions, "positions")
        x = Embeddings(config, name="embeddings")(tokens, positions, token_types)
        return checkpoint_name(placed(x, self.config.residual), "embeddings")

    def _blocks(self, x: Hidden, mask: Mask | None) -> Hidden:
        config = self.config
        # Inside a scan nothing needs to keep the compiler from undoing the recomputation.
        block = nn.remat(Block, prevent_cse=not config.scan_layers) if config.remat else Block
        if config.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.layers,
            )
            return scanned(config, name="h")(x, mask)[0]
        for i in range(config.layers):
            x, _ = block(config, name=f"h_{i}")(x, mask)
        return x


class Embeddings(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: shapes.Tokens, positions: shapes.Tokens, token_types: shapes.Tokens | None) -> Hidden:
        config = self.config
        tables = {"word": config.vocab_size, "position": config.max_positions, "token_type": config.token_types}
        embedding = functools.partial(
            nn.Embed,
            features=config.hidden,
            param_dtype=config.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        word, position, token_type = (embedding(rows, name=name) for name, rows in tables.items())
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = wide(word(tokens)) + wide(token_type(types)) + wide(position(positions))
        return _dropped(self, _norm(config, "norm")(x).astype(config.dtype), config.dropout)


class Head(nn.Module):
    """RoBERTa's, on the hidden state of the first token."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch labels"]:
        x = nn.tanh(_dense(self.config, self.config.hidden, "dense")(_dropped(self, x, self.config.dropout)))
        return _dense(self.config, self.config.labels, "out")(_dropped(self, x, self.config.dropout))


def _dense(config: EncoderConfig, features: int, name: str) -> nn.Dense:
    init = nn.initializers.normal(0.02)
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=init, name=name)


def _norm(config: EncoderConfig, name: str) -> Norm:
    return Norm(config.eps, param_dtype=config.param_dtype, name=name)


def _dropped(module: nn.Module, x: Array, rate: float) -> Array:
    """x after dropout, if the module has an rng for it."""
    return drop(module.make_rng("dropout"), x, rate) if rate and module.has_rng("dropout") else x


def sites(config: EncoderConfig) -> Sites:
    """The activations that the model names: `{name: (occurrences, shape, dtype)}`, as `gpt2.sites` gives them."""
    return shapes.of_sites(config.layers, config.hidden, config.dtype)


def sharding_rules(config: EncoderConfig, mesh: Mesh) -> dict[str, PartitionSpec]:
    """glob -> PartitionSpec of every parameter, in both layouts; the head is replicated."""
    replicated = ("**/token_type/embedding", "**/{pooler,classifier}/**")
    return partitioning.LAYERS | {
        "**/word/embedding": partitioning.table(config.vocab_size, mesh),
        "**/position/embedding": partitioning.FEATURES,
        **dict.fromkeys(replicated, PartitionSpec()),
    }


def dimensions(config: EncoderConfig) -> Dimensions:
    """The size of the model, by the names that all families share."""
    return Dimensions(config.layers, config.hidden, config.heads, config.inner, config.max_length)


def with_head(config: EncoderConfig, head: str, labels: int) -> EncoderConfig:
    """The config with a head of so many outputs, and the pooler that a BERT needs for it."""
    return dataclasses.replace(config, head=head, labels=labels, pooler=config.family == "bert")


# A pooler takes part in BERT's classification alone: RoBERTa's, where a file has one, is no part of its base.
_HEAD_PARAMS = {"roberta": ("classifier", "pooler"), "bert": ("classifier",)}
for _name, _params in _HEAD_PARAMS.items():
    register_family(
        Family(_name, Encoder, AXES, sites, sharding_rules, dimensions, with_head=with_head, head_params=_params)
    )
