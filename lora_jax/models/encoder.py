"""RoBERTa (Liu et al. 2019) and BERT (Devlin et al. 2018) in Flax linen: one encoder, with or without a head.

Layers are named as GPT-2's are (`h_0/attn/query/kernel`), so that the same globs select them, and may be scanned or
rematerialized too. Dropout acts only where `apply` gets an rng of that name.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lora_jax.core.extras import extra
from lora_jax.models import layers, layouts, masks, shapes
from lora_jax.models.attention import Mask
from lora_jax.models.family import Dimensions, Family, Sites, register_family
from lora_jax.models.layers import dense, dropped, placed, wide
from lora_jax.models.layouts import to_loop, to_scanned
from lora_jax.models.shapes import Hidden

with extra("train"):
    from flax import linen as nn
    from jaxtyping import Float

__all__ = ["AXES", "SIZES", "Encoder", "EncoderConfig", "sites", "to_loop", "to_scanned"]

# The axes of every parameter, in the loop layout (h_0, h_1, ...) and in the scanned one (h).
AXES = layouts.AXES | {
    "{pooler,classifier}/**/kernel": "io",
    "{embeddings,pooler,classifier}/**/{bias,scale}": "o",
}

FAMILIES = ("roberta", "bert")
HEADS = (None, "classification", "regression")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(layers.Computation):
    """The shape of an encoder, and how to compute it.

    Attributes:
      family: "roberta" counts positions from `pad_id + 1` over the non-padding tokens, and its head is a layer, tanh
        and a layer on the first token; "bert" counts from 0 over all tokens, and its head is a layer on the pooler's
        output.
      max_positions: rows of the position table; RoBERTa's first `pad_id + 1` are not used.
      head: None, "classification" or "regression".
      labels: outputs of the head: classes, or the numbers of a regression, most often one.
      pooler: a layer and tanh on the first token; BERT's head needs it.
      dropout: the rate in training of embeddings, sublayers and head.
      attention_dropout: that of attention's weights.

    An example is in `Encoder`.
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

    def __post_init__(self) -> None:
        if self.family not in FAMILIES or self.head not in HEADS:
            raise ValueError(f"family {self.family!r}, head {self.head!r}: choose from {FAMILIES} and {HEADS}")
        layers.check_least(1, vocab_size=self.vocab_size, hidden=self.hidden, layers=self.layers, heads=self.heads)
        layers.check_least(1, inner=self.inner, token_types=self.token_types, labels=self.labels)
        layers.check_least(0, eps=self.eps, pad_id=self.pad_id)
        layers.check_least(1, max_length=self.max_length)
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if not (0 <= self.dropout < 1 and 0 <= self.attention_dropout < 1):
            raise ValueError(f"dropout {self.dropout}, {self.attention_dropout}: rates from 0 to below 1")
        if self.head and self.pooler != (self.family == "bert"):
            raise ValueError(f"{self.family} with a head has {'a' if self.family == 'bert' else 'no'} pooler")
        layers.check_activation(self.activation)

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
    "bert-base": EncoderConfig("bert", 30522, max_positions=512, token_types=2, eps=1e-12, pad_id=0, pooler=True),
}


class Block(nn.Module):
    """Attention and MLP, each followed by its residual and norm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Hidden, entry: None, mask: Mask | None) -> tuple[Hidden, None]:
        config = self.config
        attention = layers.Attention(config, config.heads, dropout=config.attention_dropout, name="attn")
        attended = dropped(self, attention(x, mask)[0], config.dropout)
        x = _norm(config, "ln_1")(x + checkpoint_name(attended, "attention_out"))
        hidden = dropped(self, layers.MLP(config, config.inner, name="mlp")(x), config.dropout)
        x = _norm(config, "ln_2")(x + checkpoint_name(hidden, "mlp_out"))
        return checkpoint_name(placed(x, config.residual), "block_out"), None


class Encoder(nn.Module):
    """The model: `Encoder(config).apply({"params": params}, tokens, mask, token_types)`.

    >>> import jax, jax.numpy as jnp
    >>> from lora_jax.models import encoder
    >>> shape = {"vocab_size": 32, "max_positions": 16, "hidden": 8, "layers": 1, "heads": 2, "inner": 16}
    >>> config = encoder.EncoderConfig(**shape, head="classification", labels=3)
    >>> model, tokens = encoder.Encoder(config), jnp.array([[5, 6, 1], [5, 6, 7]], jnp.int32)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)
    >>> jax.jit(model.apply)(params, tokens, tokens != config.pad_id).shape
    (2, 3)
    >>> encoder.sites(config)["mlp_out"]
    (1, (8,), 'float32')
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, tokens: shapes.Tokens, mask: shapes.Mask | None = None, token_types: shapes.Tokens | None = None
    ) -> Hidden | Float[Array, "batch labels"]:
        """Logits (batch, labels), float32; without a head the hidden states (batch, length, hidden).

        Args:
          tokens: ids (batch, length) int32. Ids outside the vocabulary give NaN.
          mask: (batch, length) bool or int, 1 at non-padding tokens; padding is on the right. Its hidden states mean
            nothing.
          token_types: (batch, length) int32, the sentence of a pair that a token belongs to; zeros by default.

        Raises:
          ValueError: more tokens than positions.
        """
        config = self.config
        if tokens.shape[1] > config.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens, but the model has {config.max_length} positions for them")
        keep = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        x = Embeddings(config, name="embeddings")(tokens, keep, token_types)
        attention = None if mask is None else masks.attention_mask(keep, None)
        x, _ = layers.run(layers.stack(Block, config, config.layers, shared=1), x, None, attention)
        first = x[:, 0]
        # Without a head the pooler is only there to have its parameters.
        pooled = nn.tanh(dense(config, config.hidden, "pooler")(first)) if config.pooler else first
        if config.head is None:
            return x
        if config.family == "bert":
            logits = dense(config, config.labels, "classifier")(dropped(self, pooled, config.dropout))
        else:
            logits = Head(config, name="classifier")(first)
        return logits.astype(jnp.float32)


class Embeddings(nn.Module):
    """The sum of the embeddings of tokens, positions and token types, normalized."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: shapes.Tokens, mask: masks.PaddingMask, token_types: shapes.Tokens | None) -> Hidden:
        config = self.config
        if config.family == "roberta":
            positions = jnp.where(mask, masks.count_before(mask) + config.first_position, config.pad_id)
        else:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        tokens, positions = checkpoint_name(tokens, "tokens"), checkpoint_name(positions, "positions")
        tables = {"word": config.vocab_size, "position": config.max_positions, "token_type": config.token_types}
        word, position, token_type = (layers.embedding(config, n, config.hidden, name) for name, n in tables.items())
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = wide(word(tokens)) + wide(token_type(types)) + wide(position(positions))
        x = dropped(self, _norm(config, "norm")(x).astype(config.dtype), config.dropout)
        return checkpoint_name(placed(x, config.residual), "embeddings")


class Head(nn.Module):
    """RoBERTa's, on the hidden state of the first token."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch labels"]:
        x = nn.tanh(dense(self.config, self.config.hidden, "dense")(dropped(self, x, self.config.dropout)))
        return dense(self.config, self.config.labels, "out")(dropped(self, x, self.config.dropout))


def _norm(config: EncoderConfig, name: str) -> layers.Norm:
    return layers.Norm(config.eps, param_dtype=config.param_dtype, name=name)


def sites(config: EncoderConfig) -> Sites:
    """`{name: (occurrences, shape, dtype)}` of the activations that the model names, without batch and length.

    An example is in `Encoder`.
    """
    return shapes.of_sites(config.layers, config.hidden, config.dtype)


def sharding_rules(config: EncoderConfig, mesh: Mesh | AbstractMesh) -> dict[str, PartitionSpec]:
    """glob -> PartitionSpec of every parameter, in both layouts; the head is replicated."""
    return layouts.RULES | {
        "**/word/embedding": layouts.table_spec(config.vocab_size, mesh),
        "**/position/embedding": layouts.FEATURES,
        **dict.fromkeys(("**/token_type/embedding", "**/{pooler,classifier}/**"), PartitionSpec()),
    }


def dimensions(config: EncoderConfig) -> Dimensions:
    """The size of the model, by the names that all families share."""
    return Dimensions(config.layers, config.hidden, config.heads, config.inner, config.max_length)


def with_head(config: EncoderConfig, head: str, labels: int) -> EncoderConfig:
    """The config with a head of so many outputs, and the pooler that a BERT needs for it."""
    return dataclasses.replace(config, head=head, labels=labels, pooler=config.family == "bert")


# A pooler takes part in BERT's classification alone: RoBERTa's, where a file has one, is no part of its base.
for _name, _params in (("roberta", ("classifier", "pooler")), ("bert", ("classifier",))):
    _common = (Encoder, AXES, sites, sharding_rules, dimensions)
    register_family(
        Family(
            _name,
            *_common,
            with_head=with_head,
            head_params=_params,
            varies=("head", "labels", "pooler", "dropout", "attention_dropout"),
            token_embedding="**/word/embedding",
        )
    )
