"""LoRA: a low-rank product beside the frozen weight (Hu et al. 2021, section 4.1)."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.arrays import Label, LowRank
from lora_jax.core.selection import Absent, Selection, look_up, matches
from lora_jax.core.transforms import Delta, ParamTransform, Traits, all_layers, need_factors, per_leaf, register, sizes

_SCALE_RULES = {"alpha/r": lambda alpha, r: alpha / r, "alpha/sqrt(r)": lambda alpha, r: alpha / math.sqrt(r)}
_A_INITS = ("kaiming_uniform", "gaussian")
_SHARED = "@shared/"


def lora(
    selection: Selection,
    *,
    rank: int | Mapping[str, int],
    alpha: Any = None,
    dropout: float = 0.0,
    a_init: str = "kaiming_uniform",
    scale_rule: str = "alpha/r",
    dtype: Any = jnp.float32,
    shared: Iterable[str] = (),
    strict: bool = True,
) -> ParamTransform:
    """`W x + scale * B A x`, with A `(s.., i.., r)`, B `(s.., r, o..)` zero, and W frozen.

    Args:
      selection: the weights; each needs named input and output axes.
      rank: 1 to min(in, out), or a mapping glob -> rank (first match wins; no match is an error).
      alpha: scale = alpha / rank; a number (it may be traced) or a mapping; the rank where None.
      dropout: on the input of the low-rank branch alone, drawn where `apply` gets a key; look-ups draw none.
      a_init: "kaiming_uniform" U(-1/sqrt(in), 1/sqrt(in)), as in loralib and PEFT; "gaussian" N(0, 0.02^2), as in the
        authors' first GPT-2 code. Embeddings the other way round, as there: A zero, B N(0, 1).
      scale_rule: "alpha/r", or "alpha/sqrt(r)" (rsLoRA, Kalajdzievski 2023).
      dtype: of the factors.
      shared: globs. Selected leaves that one of them matches and that stand in one module (`h_0/attn/query/kernel` and
        `h_0/attn/value/kernel` in `h_0/attn`) share one A, `@shared/h_0/attn` in the delta, and one dropout mask, as in
        a fused layer (PEFT's adapters of GPT-2's c_attn); they need one rank.
      strict: whether a rank above min(in, out) is refused; adapters of other libraries have such.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> lj.lora(lj.select("kernel"), rank=2).init(jax.random.key(0), {"kernel": jnp.ones((100, 70))})
    Delta: 1 paths, 340 numbers
      kernel: a float32(100, 2), b float32(2, 70)
    """
    low = Options(
        selection=selection,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        a_init=a_init,
        scale_rule=scale_rule,
        dtype=dtype,
        shared=shared,
        strict=strict,
    )

    def adapt(key: Array | None, path: str, leaf: Any, axes: str, factors: dict[str, Array], strength: Any) -> LowRank:
        need_factors(path, factors, low.shapes(path, leaf, axes))
        return LowRank(**low.fields(key, path, leaf, axes, factors, strength))

    return low.transform("lora", low.init, adapt)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `lora`, which its relatives share, and what they mean for one leaf."""

    selection: Selection
    rank: int | Mapping[str, int]
    alpha: Any = None
    dropout: float = 0.0
    a_init: str = "kaiming_uniform"
    scale_rule: str = "alpha/r"
    dtype: Any = jnp.float32
    shared: Iterable[str] = ()
    strict: bool = True

    def __post_init__(self) -> None:
        if self.a_init not in _A_INITS:
            raise ValueError(f"a_init={self.a_init!r}: choose one of {_A_INITS}")
        if self.scale_rule not in _SCALE_RULES:
            raise ValueError(f"scale_rule={self.scale_rule!r}: choose one of {tuple(_SCALE_RULES)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: a probability from 0 to below 1")
        object.__setattr__(self, "shared", (self.shared,) if isinstance(self.shared, str) else tuple(self.shared))

    def spec(self) -> dict[str, Any]:
        """The options as JSON."""
        spec = {**self.selection.spec(), "rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        spec |= {"a_init": self.a_init, "scale_rule": self.scale_rule, "dtype": jnp.dtype(self.dtype).name}
        return (
            spec | ({"shared": list(self.shared)} if self.shared else {}) | ({} if self.strict else {"strict": False})
        )

    def shapes(self, path: str, leaf: Any, axes: str) -> dict[str, tuple[int, ...]]:
        """Those of A and B; a ValueError for a leaf that has none, or a rank that cannot be."""
        r, size = look_up(self.rank, path, "rank"), sizes(leaf, axes, self.selection.layers)
        if isinstance(leaf, Absent) or not size["i"] or not size["o"]:
            raise ValueError(f"{path} with axes {axes!r}: LoRA needs a weight with input and output axes")
        most = min(math.prod(size["i"]), math.prod(size["o"]))
        if not isinstance(r, int) or not 1 <= r <= (most if self.strict else r):
            raise ValueError(f"{path}: rank={r!r} must be a whole number from 1 to min(in, out) = {most}")
        return {"a": (*size["s"], *size["i"], r), "b": (*size["s"], r, *size["o"])}

    def scale(self, path: str) -> Any:
        """alpha / rank, by the rule."""
        r = look_up(self.rank, path, "rank")
        return _SCALE_RULES[self.scale_rule](r if self.alpha is None else look_up(self.alpha, path, "alpha"), r)

    def init(self, key: Array, path: str, leaf: Any, axes: str) -> dict[str, Array]:
        """LoRA's first A and B."""
        shapes = self.shapes(path, leaf, axes)
        factors = {name: jnp.zeros(shape, self.dtype) for name, shape in shapes.items()}
        if "v" in axes:
            factors["b"] = jax.random.normal(key, shapes["b"], self.dtype)
        elif self.a_init == "gaussian":
            factors["a"] = 0.02 * jax.random.normal(key, shapes["a"], self.dtype)
        else:
            bound = 1 / math.sqrt(math.prod(sizes(leaf, axes)["i"]))
            factors["a"] = jax.random.uniform(key, shapes["a"], self.dtype, -bound, bound)
        return factors

    def fields(
        self, key: Array | None, path: str, leaf: Any, axes: str, factors: dict[str, Array], strength: Any
    ) -> dict[str, Any]:
        """The fields of a `LowRank`, with all the factors that are given, over all layers."""
        stacked = sizes(leaf, axes)["s"]
        scale = jnp.asarray(strength * self.scale(path), jnp.float32)
        if key is not None and self.dropout and stacked:
            key = jax.random.split(key, stacked)
        return {name: all_layers(factor, self.selection.layers, stacked) for name, factor in factors.items()} | {
            "base": leaf,
            "scale": jnp.broadcast_to(scale, stacked),
            "key": key if self.dropout else None,
            "core": axes.lstrip("s"),
            "dropout": self.dropout,
            "path": Label(path),
        }

    def chosen(self, array: Array, axes: str) -> Array:
        """The selected layers of an array whose first axes are the stacked ones; the array itself where all are."""
        return array[jnp.array(self.selection.layers)] if self.selection.layers and "s" in axes else array

    def transform(self, method: str, init: Callable, adapt: Callable) -> ParamTransform:
        """The transform that meets every selected leaf with `init` and `adapt`, one A standing for what is shared."""

        def owner(path: str) -> str:
            """The key of the delta that holds the A of a path."""
            in_module = any(matches(glob, path) for glob in self.shared)
            return f"{_SHARED}{'/'.join(path.split('/')[:-2])}" if in_module else path

        spec = {"method": method, **self.spec()}
        alone = per_leaf(spec, self.selection.__call__, init, adapt, draws_as=owner)
        return _with_owners(alone, owner) if self.shared else alone


def _with_owners(alone: ParamTransform, owner: Callable[[str], str]) -> ParamTransform:
    """The same transform, with the A of every module once in the delta, under its owner's name."""

    def init(key: Array, params: Any) -> Delta:
        delta = alone.init(key, params)  # the paths of one owner draw the same A
        for path in list(delta):
            if (name := owner(path)) != path:
                a = delta[path].pop("a")
                if (known := delta.setdefault(name, {"a": a})["a"]).shape != a.shape:
                    raise ValueError(f"{path}: its A is {a.shape}, but {known.shape} in {name}; one rank and one input")
        return delta

    def apply(params: Any, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Any:
        if not isinstance(delta, Delta):
            return alone.apply(params, delta, key=key, strength=strength)  # which says what is wrong
        whole = Delta({path: factors for path, factors in delta.items() if not path.startswith(_SHARED)})
        owners = {path: name for path in whole if (name := owner(path)) != path}
        if wrong := set(owners.values()) ^ {name for name in delta if name.startswith(_SHARED)}:
            raise ValueError(f"the delta is not this method's: it lacks, or has besides, {sorted(wrong)[:3]}")
        for path, name in owners.items():
            if "a" in whole[path]:
                raise ValueError(f"{path} has an A of its own, but its A is that of {name}")
            whole[path] = delta[name] | whole[path]
        return alone.apply(params, whole, key=key, strength=strength)

    return ParamTransform(init, apply, alone.spec)


def at_rank(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """The spec with another rank, and with the alpha that leaves the scale."""
    power = 0.5 if spec["scale_rule"] == "alpha/sqrt(r)" else 1.0
    alpha = spec["rank"] if spec["alpha"] is None else spec["alpha"]
    return spec | {"rank": rank, "alpha": alpha * (rank / spec["rank"]) ** power}


register("lora", lora, Traits(at_rank=at_rank))
