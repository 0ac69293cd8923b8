"""What our models are built of: activations, Dense, embedding and norm layers, attention, MLP, the stack of blocks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.dropout import drop
from lora_jax.core.extras import extra
from lora_jax.models import masks
from lora_jax.models.attention import Mask, attend, joined_heads, split_heads
from lora_jax.models.shapes import Hidden

with extra("train"):
    from flax import linen as nn
    from jaxtyping import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """How a model is computed: in `dtype`, from parameters that start in `param_dtype`.

    `residual` is the sharding of activations (batch, length, width) between layers, and of queries, keys and values
    (batch, heads, ...) inside; None: the compiler's choice (`lora_jax.sharding.on_mesh` sets it).
    """

    scan_layers: bool = False  # compiles one layer instead of all
    remat: bool = False  # recomputes each layer in the backward pass instead of storing its inside
    dtype: str = "float32"
    param_dtype: str = "float32"
    residual: NamedSharding | None = None


def _recomputed(activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An activation, computed in float32 or wider, that keeps nothing for its derivative but its input."""

    def wide(x: Array) -> Array:
        return activation(x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)).astype(x.dtype)

    return jax.checkpoint(wide)


def _erf_gelu(x: Array) -> Array:
    # As torch has it; jax.nn.gelu's erfc takes three times as long.
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


_TANH_GELU = _recomputed(nn.gelu)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {  # by the names that Hugging Face gives them
    "gelu": _recomputed(_erf_gelu),
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gated(activation: Callable[[Array], Array], gate: Array, up: Array) -> Array:
    """activation(gate) * up, which keeps nothing for its derivative but its inputs."""
    return activation(gate) * up


@gated.defjvp
def _(activation: Callable[[Array], Array], inputs: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    # Each term recomputes the activation: what both read XLA's CPU compiler computes in the forward pass, and keeps.
    by_gate = jax.checkpoint(lambda gate, up, tangent: jax.jvp(activation, (gate,), (tangent,))[1] * up)
    by_up = jax.checkpoint(lambda gate, tangent: activation(gate) * tangent)
    return gated(activation, *inputs), by_gate(*inputs, tangents[0]) + by_up(inputs[0], tangents[1])


def check_activation(name: str) -> None:
    """A ValueError unless there is such an activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is none of {', '.join(ACTIVATIONS)}")


def check_least(least: int, **values: int | float) -> None:
    """A ValueError where a value is below the least one."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name}={value}: at least {least}")


class Norm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016), computed in float32, for any dtype."""

    dtype: Any = jnp.float32
    use_fast_variance: bool = False  # E[x^2] - E[x]^2 would lose digits: some features of GPT-2 are far from zero

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:  # type: ignore[override]
        with jax.numpy_dtype_promotion("standard"):  # of scale and bias that are kept in 16 bits
            return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


def dense(config: Any, features: int, name: str, stddev: float = 0.02, **options: Any) -> nn.Dense:
    """A Dense layer in the config's dtypes, its kernel from N(0, stddev^2); `options` are `nn.Dense`'s."""
    init = nn.initializers.normal(stddev)
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nn.Dense(features, **dtypes, kernel_init=init, name=name, **options)


def embedding(config: Any, rows: int, features: int, name: str) -> nn.Embed:
    """An embedding table (rows, features) from N(0, 0.02^2)."""
    init = nn.initializers.normal(0.02)
    return nn.Embed(rows, features, param_dtype=config.param_dtype, embedding_init=init, name=name)


class Attention(nn.Module):
    """Multi-head self-attention; with the `entry` of a cache, keys and values are written into its slots at `index`."""

    config: Any
    heads: int
    block: int = 0  # queries at a time; 0: all
    dropout: float = 0.0  # of the weights
    stddev: float = 0.02  # of the last kernel

    @nn.compact
    def __call__(self, x: Hidden, mask: Mask | None, entry: Any = None, index: Any = None) -> tuple[Hidden, Any]:
        query, key, value = (
            placed(split_heads(dense(self.config, x.shape[-1], name)(x), self.heads), self.config.residual)
            for name in ("query", "key", "value")
        )
        if entry is not None:
            new = {"key": key, "value": value}
            entry = {name: masks.write(entry[name], new[name], index, axis=2) for name in new}
            key, value = (entry[name].astype(query.dtype) for name in new)
        drop_weights = functools.partial(dropped, self, rate=self.dropout)
        out = joined_heads(attend(query, key, value, mask, drop_weights, self.block))
        return dense(self.config, x.shape[-1], "out", self.stddev)(out), entry


def dropped(module: nn.Module, x: Array, rate: float) -> Array:
    """x after dropout, if the module has an rng for it."""
    return drop(module.make_rng("dropout"), x, rate) if rate and module.has_rng("dropout") else x


class MLP(nn.Module):
    """Two layers with the config's activation between; `stddev` is of the second one's initial kernel."""

    config: Any
    inner: int
    stddev: float = 0.02

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        inside = ACTIVATIONS[self.config.activation](dense(self.config, self.inner, "up")(x))
        return dense(self.config, x.shape[-1], "down", self.stddev)(inside)


def stack(block: Any, config: Any, depth: int, shared: int, fields: Sequence[Mapping[str, Any]] = ()) -> Any:
    """The blocks `h_0`, `h_1`, ... of a model; with `scan_layers` one module, `h`, of stacked parameters, which has the
    fields that all have in common. `fields` are of each block, besides the config.

    A block takes hidden states, its own entry (of a cache; or None) and what all blocks share, `shared` arguments; it
    returns new hidden states and entry.
    """
    if config.remat:  # inside a scan nothing needs to keep the compiler from undoing the recomputation
        block = nn.remat(block, prevent_cse=not config.scan_layers)
    fields = fields or [{}] * depth
    if not config.scan_layers:
        return [block(config, name=f"h_{i}", **fields[i]) for i in range(depth)]
    common = {name: value for name, value in fields[0].items() if all(other[name] == value for other in fields)}
    rngs: Any = {"params": True, "dropout": True}
    in_axes = (0, *[nn.broadcast] * shared)
    return nn.scan(block, variable_axes={"params": 0}, split_rngs=rngs, in_axes=in_axes, length=depth)(
        config, name="h", **common
    )


def run(blocks: Any, x: Hidden, entries: Any, *shared: Any) -> tuple[Hidden, Any]:
    """Hidden states behind the blocks of `stack`, and their new entries."""
    if callable(blocks):
        return blocks(x, entries, *shared)
    written = []
    for i, block in enumerate(blocks):
        x, entry = block(x, None if entries is None else entries[i], *shared)
        written.append(entry)
    return x, tuple(written)


# Of an output head: logits are summed and kept in float32, as they are large numbers with small differences.
exact_product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


def tied_head(
    x: Float[Array, "*positions width"], embedding: Float[Array | np.ndarray, "vocabulary width"]
) -> Float[Array, "*positions vocabulary"]:
    """Logits, float32, of hidden states by a head that is the token embedding."""
    return exact_product(x, embedding.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def empty_cache(config: Any, depth: int, shape: tuple[int, int, int, int], dtype: Any = None) -> dict[str, Any]:
    """`gpt2.init_cache`'s result, of keys and values of a shape (batch, heads, length, size)."""

    def layer(*leading: int) -> dict:
        return {name: jnp.zeros((*leading, *shape), dtype or config.dtype) for name in ("key", "value")}

    return {
        "index": jnp.zeros((), jnp.int32),
        "mask": jnp.zeros((shape[0], shape[2]), bool),
        "layers": layer(depth) if config.scan_layers else tuple(layer() for _ in range(depth)),
    }


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x in 32 bits at least, for sums of numbers that are kept in 16."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def placed(x: Array, sharding: NamedSharding | None) -> Array:
    """x with that sharding; None: with the one that the compiler chooses."""
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)


def gathered(x: Hidden, heads: int, sharding: NamedSharding | None) -> Hidden:
    """Features of so many heads; where the heads do not divide over the devices of the sharding's second axis, with all
    features on each of these."""
    if sharding is None or heads % _devices(sharding) == 0:
        return x
    return placed(x, NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0])))


def over_heads(query: Array, key: Array, value: Array, sharding: NamedSharding | None) -> tuple[Array, Array, Array]:
    """Queries, keys and values (batch, heads, length, size) with their heads over the devices of the sharding's second
    axis. Where the heads of keys and values do not divide over these, each is repeated, so that every device has the
    ones that its queries attend with."""
    if sharding is None:
        return query, key, value
    heads, key_heads, devices = query.shape[1], key.shape[1], _devices(sharding)
    if key_heads % devices:
        divide = (n for n in range(key_heads, heads, key_heads) if heads % n == 0 and n % devices == 0)
        times = next(divide, heads) // key_heads
        key, value = (jnp.repeat(x, times, axis=1) for x in (key, value))
    return placed(query, sharding), placed(key, sharding), placed(value, sharding)


def _devices(sharding: NamedSharding) -> int:
    """The devices that a sharding of (batch, length, width) spreads positions over."""
    return sharding.mesh.shape[sharding.spec[1]]
