"""Llama (Touvron et al. 2023, arXiv 2302.13971) and its relatives in Flax linen: Mistral, Qwen 2 and 3, Gemma 2 and 3
(text). One model; what a family has and another has not is a field of its config.

Layers are named as GPT-2's are (`h_0/attn/query/kernel`), so that the same globs select them. The models have no
dropout.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lora_jax.core.extras import extra
from lora_jax.models import layers, layouts, masks, shapes
from lora_jax.models.attention import Mask, attend, joined_heads, split_heads
from lora_jax.models.family import Dimensions, Family, OutputHead, Sites, register_family
from lora_jax.models.layers import dense, placed, wide
from lora_jax.models.layouts import to_loop, to_scanned
from lora_jax.models.rotary import Angles, Rotary, rotated
from lora_jax.models.shapes import Hidden

with extra("train"):
    from flax import linen as nn
    from jaxtyping import Float, Int

__all__ = ["AXES", "Llama", "LlamaConfig", "init_cache", "sites", "to_loop", "to_scanned"]

# The axes of every parameter, in the loop layout (h_0, h_1, ...) and in the scanned one (h).
AXES = layouts.AXES | {"{lm_head,score}/kernel": "io", "ln_f/scale": "o"}
HEADS = (None, "classification", "regression")

_GEMMA: dict[str, Any] = {"tie": True, "activation": "gelu_pytorch_tanh"}
_GEMMA |= dict.fromkeys(("unit_offset", "post_norms", "scale_embeddings"), True)
# Hugging Face's `model_type` -> what sets the family apart.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},  # Touvron et al. 2023, arXiv 2302.13971; Llama 3: arXiv 2407.21783
    "mistral": {},  # Jiang et al. 2023, arXiv 2310.06825
    "qwen2": {"bias": "qkv"},  # and 2.5, arXiv 2407.10671
    "qwen3": {"qk_norm": True},  # arXiv 2505.09388
    "gemma2": _GEMMA,  # arXiv 2408.00118
    "gemma3_text": _GEMMA | {"qk_norm": True},  # the language model of Gemma 3, arXiv 2503.19786
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig(layers.Computation):
    """Shape and computation of a Llama: `LlamaConfig(family="qwen3", **FAMILIES["qwen3"])`. An example is in `Llama`.

    Attributes:
      family: one of FAMILIES.
      key_value_heads: heads of keys and values, each of which serves several of the queries'; None: as many.
      head_size: features of a head; None: hidden / heads.
      rotary: frequencies of the rotary embedding; `local_rotary`: those of layers with a window, None: the same.
      bias: which biases there are: "", "qkv" of query, key and value, "attention" of out too, "mlp", "all".
      qk_norm: a norm of each head's queries and keys.
      unit_offset: a norm multiplies by 1 + its scale (Gemma).
      post_norms: a norm after attention and after the MLP too (Gemma 2 and 3).
      scale_embeddings: embeddings are multiplied by sqrt(hidden) (Gemma).
      window: tokens that a layer in `local` attends to at most, its own among them.
      local: of each layer, whether it has the window; (): none.
      query_scale: scores are multiplied by this to the power of -1/2; None: the size of a head.
      score_cap: scores of attention become cap * tanh(x / cap).
      logit_cap: so do logits, with this cap.
      head: None, a language model; "classification" or "regression" of the last token, with `labels` outputs.
      query_block: of `gpt2.GPT2Config`.
    """

    family: str = "llama"
    vocab_size: int = 32000
    max_length: int = 2048
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    key_value_heads: int | None = None
    head_size: int | None = None
    inner: int = 11008
    eps: float = 1e-6
    activation: str = "silu"
    tie: bool = False  # the output head is the token embedding
    eos_token_id: int = 2
    rotary: Rotary = Rotary()  # noqa: RUF009  frozen
    local_rotary: Rotary | None = None
    bias: str = ""
    qk_norm: bool = False
    unit_offset: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    window: int | None = None
    local: tuple[bool, ...] = ()
    query_scale: int | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    head: str | None = None
    labels: int = 2
    query_block: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is none of {', '.join(FAMILIES)}")
        sizes = ("vocab_size", "max_length", "hidden", "layers", "heads", "inner", "labels")
        layers.check_least(1, **{name: getattr(self, name) for name in sizes})
        optional = ("key_value_heads", "head_size", "window", "query_scale", "score_cap", "logit_cap")
        given = {name: value for name in optional if (value := getattr(self, name)) is not None}
        if least := [f"{name}={value}" for name, value in given.items() if not value > 0]:
            raise ValueError(f"{', '.join(least)}: more than 0, or None")
        layers.check_least(0, eps=self.eps, eos_token_id=self.eos_token_id)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is no multiple of key_value_heads {self.kv_heads}")
        if self.head_size is None and self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is no multiple of heads {self.heads}, and there is no head_size")
        if self.size % 2:
            raise ValueError(f"a head has {self.size} features: rotary embeddings need an even number")
        if self.local and (len(self.local) != self.layers or self.window is None):
            raise ValueError(f"local names {len(self.local)} of {self.layers} layers, window {self.window}")
        if self.bias not in ("", "qkv", "attention", "mlp", "all") or self.head not in HEADS:
            raise ValueError(f"bias {self.bias!r}, head {self.head!r}: not among those of LlamaConfig")
        layers.check_activation(self.activation)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.key_value_heads or self.heads

    @property
    def size(self) -> int:
        """Features of a head."""
        return self.head_size or self.hidden // self.heads

    @property
    def longest(self) -> int:
        """Tokens of the longest input, which is `max_length` unless the rotary embedding grows with the input."""
        return int(self.max_length * (self.rotary.factor if self.rotary.rope_type == "dynamic" else 1))


class Shared(NamedTuple):
    """What all layers read besides their input: of the layers without window, and of those with one."""

    index: Any  # of the cache's first new slot; None without a cache
    masks: tuple[Mask, Mask]
    angles: tuple[Angles, Angles]

    def of(self, local: bool | Array) -> tuple[Mask, Angles]:
        """Those of a layer; `local` may be traced."""
        without, having = zip(self.masks, self.angles, strict=True)
        if isinstance(local, bool):
            return having if local else without
        return jax.tree.map(functools.partial(jnp.where, local), having, without)


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019), computed in float32, for any dtype."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        offset = self.config.unit_offset
        init = nn.initializers.zeros if offset else nn.initializers.ones
        scale = wide(self.param("scale", init, x.shape[-1:], self.config.param_dtype))
        long = wide(x)
        mean = jnp.mean(long * long, axis=-1, keepdims=True)  # the derivative of jnp.square keeps 2 long, too
        long = long * lax.rsqrt(mean + self.config.eps)
        scale = jnp.expand_dims(1 + scale if offset else scale, range(x.ndim - 1))
        return (long * scale.astype(long.dtype)).astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary embeddings and grouped queries."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Hidden, entry: dict | None, mask: Mask, angles: Angles, index: Any) -> Any:
        config = self.config
        heads = {"query": config.heads, "key": config.kv_heads, "value": config.kv_heads}

        def split(name: str) -> Array:
            features = dense(
                config, heads[name] * config.size, name, use_bias=config.bias in ("qkv", "attention", "all")
            )(x)
            return split_heads(layers.gathered(features, heads[name], config.residual), heads[name])

        query, key, value = map(split, heads)
        if config.qk_norm:
            query, key = Norm(config, name="query_norm")(query), Norm(config, name="key_norm")(key)
        query, key = rotated(query, angles), rotated(key, angles)
        if entry is not None:
            new = {"key": key, "value": value}
            entry = {name: masks.write(entry[name], new[name], index, axis=2) for name in new}
            key, value = (entry[name].astype(query.dtype) for name in new)
        query, key, value = layers.over_heads(query, key, value, config.residual)
        scale = (config.query_scale or config.size) ** -0.5
        out = attend(query, key, value, mask, block=config.query_block, scale=scale, softcap=config.score_cap)
        use_bias = config.bias in ("attention", "all")
        return dense(config, x.shape[-1], "out", _last(config), use_bias=use_bias)(joined_heads(out)), entry


class MLP(nn.Module):
    """Two layers, the first times the activation of another one (Shazeer 2020, arXiv 2002.05202)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        config, use_bias = self.config, self.config.bias in ("mlp", "all")
        gate = dense(config, config.inner, "gate", use_bias=use_bias)(x)
        up = dense(config, config.inner, "up", use_bias=use_bias)(x)
        inside = layers.gated(layers.ACTIVATIONS[config.activation], gate, up)
        return dense(config, x.shape[-1], "down", _last(config), use_bias=use_bias)(inside)


def _last(config: LlamaConfig) -> float:
    """The deviation of the initial kernels that end in one of the residuals, of which a layer has two."""
    return 0.02 / math.sqrt(2 * config.layers)


class Block(nn.Module):
    """Attention and MLP, each behind its norm and followed by its residual.

    `local` says whether attention has the window; None: the entry does, `(entry of the cache, local)`.
    """

    config: LlamaConfig
    local: bool | None = None

    @nn.compact
    def __call__(self, x: Hidden, entry: Any, shared: Shared) -> tuple[Hidden, Any]:
        config, local = self.config, self.local
        if local is None:
            entry, local = entry

        def norm(name: str, x: Hidden, exists: bool = True) -> Hidden:
            return Norm(config, name=name)(x) if exists else x

        mask, angles = shared.of(local)
        out, entry = Attention(config, name="attn")(norm("ln_1", x), entry, mask, angles, shared.index)
        x = x + checkpoint_name(norm("ln_1_post", out, config.post_norms), "attention_out")
        out = MLP(config, name="mlp")(norm("ln_2", x))
        x = x + checkpoint_name(norm("ln_2_post", out, config.post_norms), "mlp_out")
        return checkpoint_name(placed(x, config.residual), "block_out"), entry


class Llama(nn.Module):
    """The model: `Llama(config).apply({"params": params}, tokens, ...)`.

    >>> import jax
    >>> from lora_jax.models.llama import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig(vocab_size=32, max_length=16, hidden=8, layers=1, heads=2, inner=16))
    >>> logits, params = jax.jit(model.init_with_output)(jax.random.key(0), jax.numpy.ones((1, 4), "int32"))
    >>> logits.shape
    (1, 4, 32)
    """

    config: LlamaConfig

    def setup(self) -> None:
        config = self.config
        self.wte = layers.embedding(config, config.vocab_size, config.hidden, "wte")
        local = config.local or (False,) * config.layers
        self.h = layers.stack(Block, config, config.layers, shared=1, fields=[{"local": which} for which in local])
        self.ln_f = Norm(config)
        if config.head:
            self.score = dense(config, config.labels, "score", use_bias=False)
        elif not config.tie:
            self.lm_head = dense(config, config.vocab_size, "lm_head", use_bias=False, dot_general=layers.exact_product)

    def __call__(self, tokens: shapes.Tokens, mask: Any = None, *, cache: dict | None = None, **options: Any) -> Any:
        """Logits of the next token, float32 (batch, length, vocabulary), with a cache `(logits, cache)`; a classifier
        gives those of the last non-padding token, float32 (batch, labels).

        Arguments as `hidden`'s. Logits at padding mean nothing, but are finite.
        """
        out = self.hidden(tokens, mask, cache=cache, **options)
        if self.config.head:
            keep = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
            last = keep.shape[1] - 1 - jnp.argmax(keep[:, ::-1], axis=1)
            x = jnp.take_along_axis(out, last[:, None, None], axis=1)[:, 0]
            return self.score(x).astype(jnp.float32)
        return self.head(out) if cache is None else (self.head(out[0]), out[1])

    def head(self, x: Float[Array, "*positions width"]) -> Float[Array, "*positions vocabulary"]:
        """Logits, float32 (..., vocabulary), of hidden states."""
        if self.config.tie:
            logits = layers.tied_head(x, self.wte.embedding)
        else:
            logits = self.lm_head(x)
        cap = self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def hidden(
        self,
        tokens: shapes.Tokens,
        mask: shapes.Mask | masks.Slots | None = None,
        *,
        positions: shapes.Tokens | None = None,
        segments: shapes.Tokens | None = None,
        cache: dict | None = None,
        labelled: Int[Array, "batch labelled"] | None = None,
    ) -> Any:
        """Hidden states after the last layer, the head's input: (batch, length, hidden), in the compute dtype.

        Arguments, returns and errors as `gpt2.GPT2.hidden`'s.
        """
        config, length = self.config, tokens.shape[1]
        if length > config.longest and cache is None and positions is None and segments is None:
            raise ValueError(f"{length} tokens, but the model has {config.longest} positions")
        places, attention, cached = masks.causal_inputs(tokens, mask, positions, segments, cache)
        tokens, places = checkpoint_name(jnp.asarray(tokens), "tokens"), checkpoint_name(places, "positions")
        x = self.wte(tokens).astype(config.dtype)
        if config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(config.hidden), config.dtype)
        x = checkpoint_name(placed(x, config.residual), "embeddings")
        of_slots = places
        if cache is not None and config.window is not None:
            of_slots = masks.write(cache["positions"], places, cache["index"])
        shared = self._shared(places, of_slots, attention, None if cache is None else cache["index"])
        entries = None if cache is None else cache["layers"]
        mixed = config.scan_layers and len(set(config.local)) == 2
        x, written = layers.run(self.h, x, (entries, jnp.array(config.local)) if mixed else entries, shared)
        if labelled is not None:
            x = jnp.take_along_axis(x, labelled[:, :, None], axis=1)
        x = self.ln_f(x)
        if cache is None:
            return x
        new = {"index": cache["index"] + length, "mask": cached, "layers": written}
        return x, new if config.window is None else new | {"positions": of_slots}

    def _shared(self, positions: Array, slots: Array, mask: Any, index: Any) -> Shared:
        """What the layers share, for queries at `positions` (batch, length) and keys at `slots` (batch, slots)."""
        config = self.config
        angles = config.rotary.angles(positions, config.size, config.max_length)
        if config.window is None:
            return Shared(index, (mask, mask), (angles, angles))
        near = positions[:, None, :, None] - slots[:, None, None, :] < config.window
        local = config.local_rotary
        near_angles = angles if local is None else local.angles(positions, config.size, config.max_length)
        return Shared(index, (mask, mask & near), (angles, near_angles))


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: Any = None) -> dict:
    """An empty KV cache as `gpt2.init_cache`'s, of the heads of keys and values; with windows also "positions", (batch,
    length) int32, of the tokens in the slots. An example is in `gpt2.GPT2`."""
    if length > config.longest:
        raise ValueError(f"a cache of length {length}, but {config.longest} positions")
    cache = layers.empty_cache(config, config.layers, (batch, config.kv_heads, length, config.size), dtype)
    return cache if config.window is None else cache | {"positions": jnp.zeros((batch, length), jnp.int32)}


def sites(config: LlamaConfig) -> Sites:
    """`{name: (occurrences, shape, dtype)}` of its activations, as `gpt2.sites`'. An example is in `gpt2.GPT2`."""
    return shapes.of_sites(config.layers, config.hidden, config.dtype)


def sharding_rules(config: LlamaConfig, mesh: Mesh | AbstractMesh) -> dict[str, PartitionSpec]:
    """glob -> PartitionSpec of every parameter, in both layouts."""
    table = layouts.table_spec(config.vocab_size, mesh)
    return layouts.block_rules(config.kv_heads, config.size, mesh) | {
        "**/wte/embedding": table,
        "**/lm_head/kernel": PartitionSpec(*reversed(table)),
        **dict.fromkeys(("**/attn/{query_norm,key_norm}/scale", "**/score/**"), PartitionSpec()),
    }


def dimensions(config: LlamaConfig) -> Dimensions:
    """The size of the model, by the names that all families share."""
    sizes = (config.layers, config.hidden, config.heads, config.inner, config.longest)
    return Dimensions(*sizes, config.query_block)


def with_head(config: LlamaConfig, head: str, labels: int) -> LlamaConfig:
    """The config with a head of so many outputs."""
    return dataclasses.replace(config, head=head, labels=labels)


_HEAD = OutputHead(lambda config: ("wte",) if config.tie else ("lm_head",))
for _family in FAMILIES:
    register_family(
        Family(
            _family,
            Llama,
            AXES,
            sites,
            sharding_rules,
            dimensions,
            init_cache,
            _HEAD,
            with_head,
            head_params=("score",),
            varies=("head", "labels", "query_block"),
            token_embedding="**/wte/embedding",
            classifier_inputs=(),
        )
    )
