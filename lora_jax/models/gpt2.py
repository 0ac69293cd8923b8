"""GPT-2 (Radford et al. 2019) in Flax linen: padding, packing, KV cache, layers looped or scanned.

The model has no dropout: the LoRA paper's GPT-2 has none either. Query, key and value are kernels
of their own, so that they can be adapted one by one.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lora_jax.core.extras import extra
from lora_jax.models import layers, layouts, masks, shapes
from lora_jax.models.attention import Mask
from lora_jax.models.family import Dimensions, Family, OutputHead, Sites, register_family
from lora_jax.models.layers import placed, wide
from lora_jax.models.layouts import to_loop, to_scanned
from lora_jax.models.shapes import Hidden

with extra("train"):
    from flax import linen as nn
    from jaxtyping import Float, Int

__all__ = ["AXES", "GPT2", "SIZES", "GPT2Config", "init_cache", "sites", "to_loop", "to_scanned"]

# The axes of every parameter, in the loop layout (h_0, h_1, ...) and in the scanned one (h).
AXES = layouts.AXES | {"lm_head/kernel": "io", "ln_f/{bias,scale}": "o"}


@dataclasses.dataclass(frozen=True)
class GPT2Config(layers.Computation):
    """The shape of a GPT-2, and how to compute it.

    `query_block` is the number of queries that attention takes at a time, so that the scores of a long sequence are
    never all there; 0: all.

    An example is in `GPT2`.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    activation: str = "gelu_new"
    tie: bool = True  # the output head is the token embedding
    eos_token_id: int = 50256
    query_block: int = 0
    family: ClassVar[str] = "gpt2"

    def __post_init__(self) -> None:
        layers.check_least(1, vocab_size=self.vocab_size, n_positions=self.n_positions, n_embd=self.n_embd)
        layers.check_least(1, n_layer=self.n_layer, n_head=self.n_head, n_inner=self.inner)
        layers.check_least(0, layer_norm_epsilon=self.layer_norm_epsilon, eos_token_id=self.eos_token_id)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        layers.check_activation(self.activation)

    @property
    def inner(self) -> int:
        """Features inside the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


SIZES = {
    "small": GPT2Config(),
    "medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    # 175B of Brown et al. 2020: its parameters; half of its layers attend sparsely, here all densely
    "gpt3": GPT2Config(n_positions=2048, n_embd=12288, n_layer=96, n_head=96),
}


class Block(nn.Module):
    """Attention and MLP, each behind its norm and followed by its residual."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: Hidden, cache: dict | None, mask: Mask | None, index: Any) -> tuple[Hidden, dict | None]:
        config = self.config
        stddev = 0.02 / math.sqrt(2 * config.n_layer)  # of what ends in one of the 2 n_layer residuals
        attention = layers.Attention(config, config.n_head, config.query_block, stddev=stddev, name="attn")
        attended, cache = attention(_norm(config, "ln_1")(x), mask, cache, index)
        x = x + checkpoint_name(attended, "attention_out")
        mlp = layers.MLP(config, config.inner, stddev, name="mlp")
        x = x + checkpoint_name(mlp(_norm(config, "ln_2")(x)), "mlp_out")
        return checkpoint_name(placed(x, config.residual), "block_out"), cache


def _norm(config: GPT2Config, name: str) -> layers.Norm:
    return layers.Norm(config.layer_norm_epsilon, param_dtype=config.param_dtype, name=name)


class GPT2(nn.Module):
    """The language model: `GPT2(config).apply({"params": params}, tokens, ...)`.

    >>> import jax, jax.numpy as jnp
    >>> from lora_jax.models import gpt2
    >>> config = gpt2.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    >>> model, tokens = gpt2.GPT2(config), jnp.array([[5, 6, 7, 8]], jnp.int32)
    >>> params, apply = jax.jit(model.init)(jax.random.key(0), tokens), jax.jit(model.apply)
    >>> logits = apply(params, tokens)
    >>> first, cache = apply(params, tokens[:, :3], cache=gpt2.init_cache(config, batch=1, length=16))
    >>> last, cache = apply(params, tokens[:, 3:], cache=cache)  # of the fourth token alone
    >>> bool(jnp.allclose(last[:, 0], logits[:, 3], atol=1e-5))
    True
    >>> gpt2.sites(config)["mlp_out"]
    (1, (8,), 'float32')
    """

    config: GPT2Config

    def setup(self) -> None:
        config = self.config
        self.wte = layers.embedding(config, config.vocab_size, config.n_embd, "wte")
        self.wpe = layers.embedding(config, config.n_positions, config.n_embd, "wpe")
        self.h = layers.stack(Block, config, config.n_layer, shared=2)
        self.ln_f = _norm(config, "ln_f")
        if not config.tie:
            options: dict[str, Any] = {"use_bias": False, "dot_general": layers.exact_product}
            self.lm_head = layers.dense(config, config.vocab_size, "lm_head", **options)

    def __call__(
        self, tokens: shapes.Tokens, mask: Any = None, *, cache: dict | None = None, **options: Any
    ) -> Float[Array, "batch positions vocabulary"] | tuple[Float[Array, "batch positions vocabulary"], dict]:
        """Logits of the next token, float32 (batch, length, vocabulary); with a cache `(logits, cache)`.

        Arguments as `hidden`'s. Logits at padding mean nothing, but are finite.
        """
        out = self.hidden(tokens, mask, cache=cache, **options)
        return self.head(out) if cache is None else (self.head(out[0]), out[1])

    def head(self, x: Float[Array, "*positions width"]) -> Float[Array, "*positions vocabulary"]:
        """Logits, float32 (..., vocabulary), of hidden states."""
        if self.config.tie:
            return layers.tied_head(x, self.wte.embedding)
        return self.lm_head(x)

    def hidden(
        self,
        tokens: shapes.Tokens,
        mask: shapes.Mask | masks.Slots | None = None,
        *,
        positions: shapes.Tokens | None = None,
        segments: shapes.Tokens | None = None,
        cache: dict | None = None,
        labelled: Int[Array | np.ndarray, "batch labelled"] | None = None,
    ) -> Any:
        """Hidden states after the last layer, the head's input: (batch, length, n_embd), in the compute dtype.

        Args:
          tokens: ids (batch, length) int32. Ids outside the vocabulary give NaN.
          mask: (batch, length) bool or int, 1 at non-padding tokens; padding may be left or right. With a cache also
            (batch, length, cache length): the slots that each token attends to, its own among them, for tokens that do
            not follow one another (the beams of a search); `positions` are then needed, and the cache's index may be
            (batch, length), the slot that each token is written into.
          positions: (batch, length) int32. By default the number of non-padding tokens before each one (in its
            segment), 0 at padding.
          segments: (batch, length) int32. Packing: a run of equal numbers is one sequence, whose tokens attend to it
            alone; every sequence of a row has a number of its own.
          cache: from `init_cache`. The tokens are written behind those in it, and attend to them.
          labelled: (batch, n) int32, positions along the length. Only their states are computed: (batch, n, n_embd).

        Returns:
          The hidden states; with a cache `(states, cache)`. The caller makes sure that all tokens fit in.

        Raises:
          ValueError: more tokens than positions or than the cache is long; segments with a cache; a mask of slots
            without a cache or positions.
        """
        length, most = tokens.shape[1], self.config.n_positions
        if length > most and cache is None and positions is None and segments is None:
            raise ValueError(f"{length} tokens, but the model has {most} positions")
        positions, attention, cached = masks.causal_inputs(tokens, mask, positions, segments, cache)
        tokens = checkpoint_name(jnp.asarray(tokens), "tokens")
        x = wide(self.wte(tokens)) + wide(self.wpe(checkpoint_name(positions, "positions")))
        x = checkpoint_name(placed(x.astype(self.config.dtype), self.config.residual), "embeddings")
        entries, index = (None, None) if cache is None else (cache["layers"], cache["index"])
        x, written = layers.run(self.h, x, entries, attention, index)
        if labelled is not None:
            x = jnp.take_along_axis(x, labelled[:, :, None], axis=1)
        x = self.ln_f(x)
        return x if cache is None else (x, {"index": cache["index"] + length, "mask": cached, "layers": written})


def init_cache(config: GPT2Config, batch: int, length: int, dtype: Any = None) -> dict:
    """An empty KV cache for `length` tokens a row, padding included.

    `{"index": () int32, "mask": (batch, length) bool, "layers": ({"key": (batch, heads, length, head size),
    "value": ...}, ...)}`, keys and values in `dtype` or the compute dtype; with `scan_layers`, `layers` is one dict of
    arrays with a leading layer axis.

    An example is in `GPT2`.
    """
    if length > config.n_positions:
        raise ValueError(f"a cache of length {length}, but {config.n_positions} positions")
    return layers.empty_cache(
        config, config.n_layer, (batch, config.n_head, length, config.n_embd // config.n_head), dtype
    )


def sites(config: GPT2Config) -> Sites:
    """`{name: (occurrences, shape, dtype)}` of the activations that the model names, without batch and length.

    An example is in `GPT2`.
    """
    return shapes.of_sites(config.n_layer, config.n_embd, config.dtype)


def sharding_rules(config: GPT2Config, mesh: Mesh | AbstractMesh) -> dict[str, PartitionSpec]:
    """glob -> PartitionSpec of every parameter, in both layouts."""
    table = layouts.table_spec(config.vocab_size, mesh)
    return layouts.RULES | {
        "**/wte/embedding": table,
        "**/lm_head/kernel": PartitionSpec(*reversed(table)),
        "**/wpe/embedding": layouts.FEATURES,
    }


def dimensions(config: GPT2Config) -> Dimensions:
    """The size of the model, by the names that all families share."""
    return Dimensions(
        config.n_layer, config.n_embd, config.n_head, config.inner, config.n_positions, config.query_block
    )


_HEAD = OutputHead(lambda config: ("wte",) if config.tie else ("lm_head",))
register_family(
    Family(
        "gpt2",
        GPT2,
        AXES,
        sites,
        sharding_rules,
        dimensions,
        init_cache,
        _HEAD,
        varies=("n_inner", "query_block"),
        token_embedding="**/wte/embedding",
    )
)
