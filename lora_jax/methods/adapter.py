"""Adapters: small networks behind a layer's parts (Houlsby et al. 2019; Hu et al. 2021, section 5.1)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from lora_jax.core.transforms import ParamTransform, Traits, per_site, register
from lora_jax.methods.arguments import checked
from lora_jax.methods.ranges import COUNT

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """x + up(act(down(x))), of x's LayerNorm where `norm`."""

    activation: str
    norm: bool

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: choose one of {sorted(ACTIVATIONS)}")

    def __call__(self, factors: dict[str, Array], x: Array, seen: Mapping[str, Array]) -> Array:
        h = x
        if self.norm:
            h = x.astype(jnp.float32)
            # the mean of squares less the square of the mean, which is the default, would lose digits
            h = jax.nn.standardize(h, variance=jnp.var(h, -1, keepdims=True), epsilon=1e-5)
            scale, shift = (jnp.broadcast_to(factors[name], h.shape) for name in ("scale", "shift"))
            h = (h * scale + shift).astype(x.dtype)
        h = ACTIVATIONS[self.activation](_dense(h, factors["down"], factors["down_bias"]))
        return x + _dense(h, factors["up"], factors["up_bias"])


def _dense(x: Array, kernel: Array, bias: Array) -> Array:
    """x times the kernel and the bias, in x's dtype."""
    y = x @ kernel.astype(x.dtype)
    return y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


@checked
def adapter(
    sites: Mapping[str, Sequence[Any]],
    *,
    rank: int,
    activation: str = "gelu",
    norm: bool = False,
    layers: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
) -> ParamTransform:
    """Adapters: trained bottlenecks at the sites, `x + up(act(down(x)))` in place of each activation x.

    down is `(d, r)`, up `(r, d)` and zero at first; both have biases.

    The paper's kinds, of GPT-2's sites `s = gpt2.sites(config)`, each site named before the residual sum:

    - AdapterH (Houlsby et al. 2019): `{"attention_out": s["attention_out"], "mlp_out": s["mlp_out"]}`
    - AdapterL (Lin et al. 2020): `{"mlp_out": s["mlp_out"]}`, `norm=True`, `activation="relu"`
    - AdapterP (Pfeiffer et al. 2021): `{"mlp_out": s["mlp_out"]}`, `activation="relu"`
    - AdapterD (AdapterDrop, Rücklé et al. 2021): as Houlsby's or Pfeiffer's, with `layers` without the first ones

    Each occurrence has 2 d r + r + d parameters, and 2 d more with a LayerNorm. Adapters cannot be merged.

    Args:
      sites: `{name: (occurrences, width)}`, or with a shape that ends in the width (`gpt2.sites`, `lora_jax.sites`).
      rank: the width of the bottleneck.
      norm: whether a trained LayerNorm goes before.
      activation: "gelu" (its tanh form), "relu", "silu" (swish) or "tanh".
      layers: the occurrences that are adapted; None: all.
      dtype: of the factors; the computation is in that of x.

    >>> import jax, lora_jax as lj
    >>> lj.adapter({"mlp_out": (2, 16)}, rank=3).init(jax.random.key(0), {})
    Delta: 1 paths, 230 numbers
      @mlp_out/adapter: down float32(2, 16, 3), down_bias float32(2, 3), up float32(2, 3, 16), up_bias float32(2, 16)
    """
    rank = COUNT("rank", rank)
    counts, widths = occurrences(sites)
    dtype = jnp.dtype(dtype)

    def init(key: Array, site: str, n: int) -> dict[str, Array]:
        d = widths[site]
        zeros = {"down_bias": (n, rank), "up": (n, rank, d), "up_bias": (n, d)} | ({"shift": (n, d)} if norm else {})
        factors = {name: jnp.zeros(shape, dtype) for name, shape in zeros.items()}
        factors["down"] = 0.02 * jax.random.normal(key, (n, d, rank), dtype)
        return factors | ({"scale": jnp.ones((n, d), dtype)} if norm else {})

    spec = {"method": "adapter", "sites": {name: [counts[name], widths[name]] for name in counts}, "rank": rank}
    spec |= {"activation": activation, "norm": norm, "layers": None if layers is None else list(layers)}
    return per_site(spec | {"dtype": dtype.name}, counts, init, Bottleneck(activation, norm), layers)


def occurrences(sites: Mapping[str, Sequence[Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """How often each site occurs, and its width."""
    if not sites:
        raise ValueError("name a site at least: {'mlp_out': (occurrences, width)}")
    for name, value in sites.items():
        if not isinstance(value, Sequence) or len(value) < 2:
            raise TypeError(f"the site {name!r} needs (occurrences, width), as lora_jax.sites has it; got {value!r}")
    shapes = {name: (0, shape) if isinstance(shape, int) else (0, *shape) for name, (_, shape, *_) in sites.items()}
    for name, shape in shapes.items():
        if not shape[-1]:
            way_out = "name the sites that are meant, {'mlp_out': sites['mlp_out']}"
            raise ValueError(f"the site {name!r} has no features to change, {sites[name]}: {way_out}")
    return {name: count for name, (count, *_) in sites.items()}, {name: shape[-1] for name, shape in shapes.items()}


down, up = PartitionSpec(None, "fsdp"), PartitionSpec(None, None, "fsdp")
sharding = {"**/@*/adapter/down": down, "**/@*/adapter/up": up}
traits = Traits(at_rank=lambda spec, rank: spec | {"rank": rank}, decays=("**/{down,up}",), fast=(), sharding=sharding)
register("adapter", adapter, traits)
