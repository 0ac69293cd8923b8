"""Compacter: adapters whose matrices are sums of Kronecker products (Karimi Mahabadi et al. 2021, arXiv 2106.04647)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.transforms import Factors, ParamTransform, Traits, per_site, register
from lora_jax.methods.adapter import Bottleneck, occurrences
from lora_jax.methods.arguments import checked
from lora_jax.methods.ranges import COUNT


@dataclasses.dataclass(frozen=True)
class KroneckerBottleneck:
    """A bottleneck whose down and up are `sum_i kron(rule_i, left_i right_i)`."""

    bottleneck: Bottleneck

    def __call__(self, factors: dict[str, Array], x: Array, seen: Mapping[str, Array]) -> Array:
        dense = {name: factors[name] for name in ("down_bias", "up_bias")}
        for name in ("down", "up"):
            low_rank = jnp.einsum("nir,nro->nio", factors[f"{name}_left"], factors[f"{name}_right"])
            w = jnp.einsum("nab,nio->aibo", factors["rule"], low_rank)
            dense[name] = w.reshape(w.shape[0] * w.shape[1], -1)
        return self.bottleneck(dense, x, seen)


@checked
def compacter(
    sites: Mapping[str, Sequence[Any]],
    *,
    rank: int,
    n: int = 4,
    activation: str = "gelu",
    layers: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
) -> ParamTransform:
    """Compacter: Houlsby's adapters with matrices that are sums of Kronecker products (the paper's section 3).

    down and up are `sum_i kron(rule_i, s_i t_i)`, i from 1 to n. All share the rules `(n, n)`, under
    `@shared/compacter` in the delta; the products s_i t_i, of rank one, are each matrix's own. up is zero at first.
    Each occurrence has 2 (d + r) + r + d parameters, and the rules n^3. A chain can have one Compacter.

    The arguments are those of `adapter`; `n` must divide the rank and the width of every site.

    >>> import lora_jax as lj
    >>> lj.check(lj.compacter({"mlp_out": (2, 16)}, rank=8, n=4), {}).trained
    208
    """
    counts, widths = occurrences(sites)
    rank, n = COUNT("rank", rank), COUNT("n", n)
    for name, size in {**widths, "rank": rank}.items():
        if size % n:
            what = f"a whole number that divides rank={rank} and the width of each site: {name} {size}"
            raise ValueError(f"n={n!r} must be {what}")
    dtype = jnp.dtype(dtype)

    def init(key: Array, site: str, count: int) -> dict[str, Array]:
        keys, d = jax.random.split(key, 4), widths[site]
        shapes = {"down_left": (d, 1), "down_right": (1, rank), "up_left": (rank, 1), "up_right": (1, d)}
        factors = {
            name: jax.random.normal(k, (count, n, max(a // n, 1), max(b // n, 1)), dtype) * (2 / (a + b)) ** 0.5
            for k, (name, (a, b)) in zip(keys, shapes.items(), strict=True)
        }
        factors["up_right"] = jnp.zeros_like(factors["up_right"])
        return factors | {"down_bias": jnp.zeros((count, rank), dtype), "up_bias": jnp.zeros((count, d), dtype)}

    spec = {"method": "compacter", "sites": {name: [counts[name], widths[name]] for name in counts}, "rank": rank}
    spec |= {"n": n, "activation": activation, "layers": None if layers is None else list(layers)}

    def rules(key: Array) -> Factors:
        return {"rule": jax.random.normal(jax.random.fold_in(key, 0), (n, n, n), dtype) / n**0.5}

    fn = KroneckerBottleneck(Bottleneck(activation, norm=False))
    return per_site(spec | {"dtype": dtype.name}, counts, init, fn, layers, common=rules)


register("compacter", compacter, Traits(decays=("**/{down,up}_{left,right}",), fast=()))
