"""LoRA: a low-rank product beside the frozen weight (Hu et al. 2021, section 4.1)."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core import transforms
from lora_jax.core.arrays import LowRank
from lora_jax.core.globs import matches_any
from lora_jax.core.selection import Selection, glob_keys, look_up, strings
from lora_jax.core.transforms import Factors, Params, ParamTransform, Spec, Target
from lora_jax.methods.arguments import checked
from lora_jax.methods.ranges import COUNT, PROBABILITY, Range

Ranks = int | Mapping[str, int]  # of all leaves, or glob -> rank

_SCALE_RULES = {"alpha/r": lambda alpha, r: alpha / r, "alpha/sqrt(r)": lambda alpha, r: alpha / math.sqrt(r)}
_A_INITS = ("kaiming_uniform", "gaussian")
ALPHA = Range(optional=True)


@checked
def lora(
    selection: Selection,
    *,
    rank: Ranks,
    alpha: Any = None,
    dropout: float = 0.0,
    a_init: str = "kaiming_uniform",
    scale_rule: str = "alpha/r",
    dtype: Any = jnp.float32,
    shared: Iterable[str] = (),
    strict: bool = True,
) -> ParamTransform:
    """LoRA: a trained low-rank product beside each selected weight, `x W + scale * (x A) B`; W is frozen.

    A is `(s.., i.., r)`, and B, zero at first, is `(s.., r, o..)`.

    Args:
      selection: the weights; each needs named input and output axes.
      rank: 1 to min(in, out), or a mapping glob -> rank (first match wins; no match is an error).
      alpha: scale = alpha / rank. A number, which may be traced, or a mapping as of `rank`; None: the rank.
      dropout: the rate for the input of the low-rank branch. `apply` needs a key for it; look-ups have no dropout.
      a_init: "kaiming_uniform" U(-1/sqrt(in), 1/sqrt(in)), as in loralib and PEFT; "gaussian" N(0, 0.02^2), as in the
        authors' first GPT-2 code. For an embedding A is zero and B is drawn from N(0, 1), as in loralib.
      scale_rule: "alpha/r", or "alpha/sqrt(r)" (rsLoRA, Kalajdzievski 2023).
      dtype: of the factors.
      shared: globs of leaves that share one A and one dropout mask with those of their module, as in a fused layer
        (PEFT's adapters of GPT-2's c_attn): `@shared/h_0/attn` in the delta for `h_0/attn/{query,value}/kernel`.
      strict: whether a rank above min(in, out) is an error. Some adapters of other libraries have such ranks.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> lj.lora(lj.select("kernel"), rank=2).init(jax.random.key(0), {"kernel": jnp.ones((100, 70))})
    Delta: 1 paths, 340 numbers
      kernel: a float32(100, 2), b float32(2, 70)
    """
    low = Options(selection, rank, alpha, dropout, a_init, scale_rule, dtype, shared, strict)

    def adapt(target: Target, factors: Factors, key: Array | None, strength: Any) -> LowRank:
        return LowRank(**low.fields(target, factors, key, strength))

    spec = {"method": "lora", **low.spec()}
    return transforms.per_target(spec, low.targets, low.init, adapt, shapes=low.shapes, globs=low.globs)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `lora` and its relatives, and what they mean for one leaf."""

    selection: Selection
    rank: Ranks
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
        for name, numbers in (("rank", COUNT), ("alpha", ALPHA), ("dropout", PROBABILITY)):
            object.__setattr__(self, name, numbers(name, getattr(self, name)))
        object.__setattr__(self, "shared", strings(self.shared))

    def spec(self) -> Spec:
        """The options as JSON."""
        spec = {**self.selection.spec(), "rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        spec |= {"a_init": self.a_init, "scale_rule": self.scale_rule, "dtype": jnp.dtype(self.dtype).name}
        spec |= {"shared": list(self.shared)} if self.shared else {}
        return spec if self.strict else spec | {"strict": False}

    @property
    def globs(self) -> list[str]:
        """The globs among the options, besides those of the selection."""
        return [*glob_keys(self.rank, self.alpha), *self.shared]

    def targets(self, params: Params) -> list[Target]:
        """The selected leaves; those of one module that a glob of `shared` matches share their A."""
        targets = transforms.targets_of(self.selection, params)
        modules = {t.path: "/".join(t.path.split("/")[:-2]) for t in targets if matches_any(self.shared, t.path)}
        shared = {path: {"a": f"@shared/{module}"} for path, module in modules.items()}
        return [dataclasses.replace(target, shared=shared.get(target.path, {})) for target in targets]

    def shapes(self, target: Target) -> dict[str, tuple[int, ...]]:
        """Those of A and B; a ValueError for a leaf that has none, or a rank that cannot be."""
        target.need_weight("LoRA")
        r = look_up(self.rank, target.path, "rank")
        most = min(math.prod(target.inputs), math.prod(target.outputs))
        if self.strict and r > most:
            hint = "exclude leaves it out, rank={glob: number} gives it its own"
            raise ValueError(
                f"{target.path}: rank={r!r} must be a whole number from 1 to min(in, out) = {most}; {hint}"
            )
        return {"a": (*target.stacked, *target.inputs, r), "b": (*target.stacked, r, *target.outputs)}

    def scale(self, path: str) -> Any:
        """alpha / rank, by the rule."""
        r = look_up(self.rank, path, "rank")
        return _SCALE_RULES[self.scale_rule](r if self.alpha is None else look_up(self.alpha, path, "alpha"), r)

    def init(self, key: Array, target: Target) -> Factors:
        """LoRA's first A and B."""
        shapes = self.shapes(target)
        factors = {name: jnp.zeros(shape, self.dtype) for name, shape in shapes.items()}
        if "v" in target.axes:
            factors["b"] = jax.random.normal(key, shapes["b"], self.dtype)
        elif self.a_init == "gaussian":
            factors["a"] = 0.02 * jax.random.normal(key, shapes["a"], self.dtype)
        else:
            bound = 1 / math.sqrt(math.prod(target.inputs))
            factors["a"] = jax.random.uniform(key, shapes["a"], self.dtype, -bound, bound)
        return factors

    def fields(self, target: Target, factors: Factors, key: Array | None, strength: Any) -> dict[str, Any]:
        """The fields of a `LowRank`, with all the factors that are given, over all layers."""
        if key is not None and self.dropout and target.stack:
            key = jax.random.split(key, target.stack)
        every_layer = {name: target.all_layers(factor) for name, factor in factors.items()}
        options = {"key": key if self.dropout else None, "dropout": self.dropout}
        return target.fields | every_layer | options | {"scale": target.scale(strength * self.scale(target.path))}


def at_rank(spec: Spec, rank: int) -> Spec:
    """The spec with another rank, and with the alpha that leaves the scale."""
    power = 0.5 if spec["scale_rule"] == "alpha/sqrt(r)" else 1.0
    alpha = spec["rank"] if spec["alpha"] is None else spec["alpha"]
    return spec | {"rank": rank, "alpha": alpha * (rank / spec["rank"]) ** power}


transforms.register("lora", lora, transforms.Traits(at_rank=at_rank))
