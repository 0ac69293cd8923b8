"""GPT-2 (Radford et al. 2019) in Flax linen: padding, packing, KV cache, layers looped or scanned.

The model has no dropout: the LoRA paper's GPT-2 has none either. Query, key and value are kernels
of their own, so that they can be adapted one by one.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec, Sharding

from lora_jax.core.extras import extra
from lora_jax.models import activations, masks, partitioning, shapes
from lora_jax.models.attention import Mask, attend, joined_heads, placed, split_heads
from lora_jax.models.family import Dimensions, Family, Sites, register_family
from lora_jax.models.layouts import to_loop, to_scanned
from lora_jax.models.norm import Norm, wide

with extra("train"):
    from flax import linen as nn
    from jaxtyping import Float, Int, Shaped

__all__ = ["AXES", "GPT2", "SIZES", "GPT2Config", "init_cache", "sites", "to_loop", "to_scanned"]

Hidden = Float[Array, "batch length width"]

# The axes of every parameter, in the loop layout (h_0, h_1, ...) and in the scanned one (h).
AXES = {
    "h_*/**/kernel": "io",
    "h_*/**/{bias,scale}": "o",
    "h/**/kernel": "sio",
    "h/**/{bias,scale}": "so",
    "**/embedding": "vo",
    "lm_head/kernel": "io",
    "ln_f/{bias,scale}": "o",
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2, and how to compute it: in `dtype`, from parameters that start in `param_dtype`.

    Attributes:
      query_block: queries that attention takes at a time, so that the scores of a long sequence are never all there;
        0: all.
      residual: the sharding of activations (batch, length, n_embd) between layers, and of queries, keys and values
        (batch, heads, ...) inside; None: the compiler's choice (`lora_jax.sharding.on_mesh` sets it).
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
    scan_layers: bool = False  # compiles one layer instead of n_layer
    remat: bool = False  # recomputes each layer in the backward pass instead of storing its inside
    dtype: str = "float32"
    param_dtype: str = "float32"
    query_block: int = 0
    residual: Sharding | None = None
    family: ClassVar[str] = "gpt2"

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        activations.check(self.activation)

    @property
    def inner(self) -> int:
        """The width of the MLP's hidden layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


SIZES = {
    "small": GPT2Config(),
    "medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    # 175B of Brown et al. 2020: its parameters; half of its layers attend sparsely, here all densely
    "gpt3": GPT2Config(n_positions=2048, n_embd=12288, n_layer=96, n_head=96),
}


class Attention(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x: Hidden, cache: dict | None, mask: Mask | None, index: Any) -> tuple[Hidden, dict | None]:
        config = self.config
        query, key, value = (
            placed(split_heads(_dense(config, config.n_embd, name)(x), config.n_head), config.residual)
            for name in ("query", "key", "value")
        )
        if cache is not None:
            new = {"key": key, "value": value}
            cache = {name: masks.write(cache[name], new[name], index, axis=2) for name in new}
            key, value = (cache[name].astype(query.dtype) for name in ("key", "value"))
        out = joined_heads(attend(query, key, value, mask, block=config.query_block))
        return _dense(config, config.n_embd, "out", deep=True)(out), cache


class MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        x = _dense(self.config, self.config.inner, "up")(x)
        x = activations.ACTIVATIONS[self.config.activation](x)
        return _dense(self.config, self.config.n_embd, "down", deep=True)(x)


class Block(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x: Hidden, cache: dict | None, mask: Mask | None, index: Any) -> tuple[Hidden, dict | None]:
        attention, mlp = Attention(self.config, name="attn"), MLP(self.config, name="mlp")
        ln_1, ln_2 = (_norm(self.config, name) for name in ("ln_1", "ln_2"))
        attended, cache = attention(ln_1(x), cache, mask, index)
        x = x + checkpoint_name(attended, "attention_out")
        x = x + checkpoint_name(mlp(ln_2(x)), "mlp_out")
        return checkpoint_name(placed(x, self.config.residual), "block_out"), cache


class GPT2(nn.Module):
    """The language model: `GPT2(config).apply({"params": params}, tokens, ...)`."""

    config: GPT2Config

    def setup(self) -> None:
        config = self.config
        embedding = functools.partial(
            nn.Embed,
            features=config.n_embd,
            param_dtype=config.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        self.wte, self.wpe = embedding(config.vocab_size), embedding(config.n_positions)
        # Inside a scan nothing needs to keep the compiler from undoing the recomputation.
        block = nn.remat(Block, prevent_cse=not config.scan_layers) if config.remat else Block
        if config.scan_layers:
            self.h: Any = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=config.n_layer,
            )(config)
        else:
            self.h = [block(config) for _ in range(config.n_layer)]
        self.ln_f = _norm(config)
        if not config.tie:
            self.lm_head = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                kernel_init=nn.initializers.normal(0.02),
                dot_general=_exact_product,
            )

    def __call__(
        self, tokens: shapes.Tokens, mask: Any = None, *, cache: dict | None = None, **options: Any
    ) -> Float[Array, "batch positions vocabulary"] | tuple[Float[Array, "batch positions vocabulary"], dict]:
        """Logits of the next token, float32 (batch, length, vocabulary); with a cache `(logits, cache)`.

        Arguments as `hidden`'s. Logits at padding mean nothing, but are finite.
        """
        if cache is None:
            return self.head(self.hidden(tokens, mask, **options))
        x, cache = self.hidden(tokens, mask, cache=cache, **options)
        return self.head(x), cache

    def head(self, x: Float[Array, "*positions width"]) -> Float[Array, "*positions vocabulary"]:
        """Logits, float32 (..., vocabulary), of hidden states."""
        # Logits are summed and kept in float32: they are large numbers with small differences.
        if self.config.tie:
            last = ((x.ndim - 1,), (1,))
            return _exact_product(x, self.wte.embedding.astype(x.dtype), (last, ((), ())))
        return self.lm_head(x)

    def hidden(
        self,
        tokens: shapes.Tokens,
        mask: shapes.Mask | Shaped[Array | np.ndarray, "batch length slots"] | None = None,
        *,
        positions: shapes.Tokens | None = None,
        segments: shapes.Tokens | None = None,
        cache: dict | None = None,
        labelled: Int[Array | np.ndarray, "batch labelled"] | None = None,
    ) -> Any:
        """Hidden states after the last layer, the head's input: (batch, length, n_embd), in the compute dtype.

        Args:
          tokens: ids (batch, length) int32. Ids outside the vocabulary give NaN.
          mask: (batch, length) bool or int, 1 at non-padding tokens; padding may be left or right.
            With a cache also (batch, length, cache length): the slots that each token attends to,
            its own among them, for tokens that do not follow one another (the beams of a search);
            `positions` are then needed, and the cache's index may be (batch, length), the slot
            that each token is written into.
          positions: (batch, length) int32. By default the number of non-padding tokens before each
            one (in its segment), 0 at padding.
          segments: (batch, length) int32. Packing: a run of equal numbers is one sequence, whose
            tokens attend to it alone; every sequence of a row has a number of its own.
          cache: from `init_cache`. The tokens are written behind those in it, and attend to them.
          labelled: (batch, n) int32, positions along the length. Only their states are computed:
            (batch, n, n_embd).

        Returns:
          The hidden states; with a cache `(states, cache)`. The caller makes sure that all tokens fit in.

        Raises:
          ValueError: more tokens than positions or than the cache is long; segments with a cache;
            a mask of slots without a cache or positions.
        """
        self._check(tokens, mask, positions, segments, cache)
        tokens = jnp.asarray(tokens)
        positions, segments = (None if ids is None else jnp.asarray(ids) for ids in (positions, segments))
        keep = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        length = tokens.shape[1]
        if cache is None:
            attention = masks.attention_mask(None if mask is None else keep, segments, causal=length)
            default = masks.count_before(keep, segments)
        elif keep.ndim == 3:
            cached, attention = cache["mask"], keep[:, None]
        else:
            cached = masks.write(cache["mask"], keep, cache["index"])
            attention = masks.cached_attention_mask(cached, cache["index"], length)
            default = lax.dynamic_slice_in_dim(masks.count_before(cached), cache["index"], length, axis=1)
        x = self._embed(tokens, default if positions is None else positions)
        x, layers = self._blocks(x, cache, attention)
        if labelled is not None:
            x = jnp.take_along_axis(x, labelled[:, :, None], axis=1)
        x = self.ln_f(x)
        if cache is None:
            return x
        return x, {"index": cache["index"] + length, "mask": cached, "layers": layers}

    def _check(self, tokens: shapes.Tokens, mask: Any, positions: Any, segments: Any, cache: dict | None) -> None:
        length = tokens.shape[1]
        if mask is not None and jnp.ndim(mask) == 3 and (cache is None or positions is None):
            raise ValueError("a mask (batch, length, cache length) needs a cache, and positions")
        if cache is None:
            most = self.config.n_positions
            if length > most and positions is None and segments is None:
                raise ValueError(f"{length} tokens, but the model has {most} positions")
        else:
            most = cache["mask"].shape[1]
            if length > most:
                raise ValueError(f"{length} tokens do not fit into a cache of length {most}")
            if segments is not None:
                raise ValueError("segments (packing) and a cache do not go together")

    def _embed(self, tokens: shapes.Tokens, positions: shapes.Tokens) -> Hidden:
        tokens = checkpoint_name(tokens, "tokens")
        positions = checkpoint_name(positions, "positions")
        x = (wide(self.wte(tokens)) + wide(self.wpe(positions))).astype(self.config.dtype)
        return checkpoint_name(placed(x, self.config.residual), "embeddings")

    def _blocks(self, x: Hidden, cache: dict | None, mask: Mask | None) -> tuple[Hidden, Any]:
        """The layers, and their part of the cache."""
        layers, index = (None, None) if cache is None else (cache["layers"], cache["index"])
        if self.config.scan_layers:
            return self.h(x, layers, mask, index)
        written = []
        for i, block in enumerate(self.h):
            x, layer = block(x, None if layers is None else layers[i], mask, index)
            written.append(layer)
        return x, tuple(written)


_exact_product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


def _dense(config: GPT2Config, features: int, name: str, deep: bool = False) -> nn.Dense:
    """A Dense layer, initialized as GPT-2's. `deep`: it ends in one of the 2 n_layer residuals."""
    stddev = 0.02 / math.sqrt(2 * config.n_layer) if deep else 0.02
    init = nn.initializers.normal(stddev)
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=init, name=name)


def _norm(config: GPT2Config, name: str | None = None) -> Norm:
    return Norm(config.layer_norm_epsilon, param_dtype=config.param_dtype, name=name)


def init_cache(config: GPT2Config, batch: int, length: int, dtype: Any = None) -> dict:
    """An empty KV cache for `length` tokens a row, padding included.

    `{"index": () int32, "mask": (batch, length) bool, "layers": ({"key": (batch, heads, length,
    head size), "value": ...}, ...)}`, keys and values in `dtype` or the compute dtype. With
    `scan_layers`, `layers` is one dict of arrays with a leading layer axis.
    """
    if length > config.n_positions:
        raise ValueError(f"a cache of length {length}, but {config.n_positions} positions")
    shape = (batch, config.n_head, length, config.n_embd // config.n_head)

    def layer(*leading: int) -> dict:
        return {name: jnp.zeros((*leading, *shape), dtype or config.dtype) for name in ("key", "value")}

    n = config.n_layer
    return {
        "index": jnp.zeros((), jnp.int32),
        "mask": jnp.zeros((batch, length), bool),
        "layers": layer(n) if config.scan_layers else tuple(layer() for _ in range(n)),
    }


def sites(config: GPT2Config) -> Sites:
    """The activations that the model names: `{name: (occurrences, shape, dtype)}`.

    The shape is without batch and length; occurrences are in the order of the layers.
    """
    return shapes.of_sites(config.n_layer, config.n_embd, config.dtype)


def sharding_rules(config: GPT2Config, mesh: Mesh) -> dict[str, PartitionSpec]:
    """glob -> PartitionSpec of every parameter, in both layouts."""
    table = partitioning.table(config.vocab_size, mesh)
    return partitioning.LAYERS | {
        "**/wte/embedding": table,
        "**/lm_head/kernel": PartitionSpec(*reversed(table)),
        "**/wpe/embedding": partitioning.FEATURES,
    }


def dimensions(config: GPT2Config) -> Dimensions:
    """The size of the model, by the names that all families share."""
    return Dimensions(config.n_layer, config.n_embd, config.n_head, config.inner, config.n_positions)


register_family(Family("gpt2", GPT2, AXES, sites, sharding_rules, dimensions, init_cache))
