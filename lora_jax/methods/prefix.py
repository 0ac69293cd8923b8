"""Prefixes: trained vectors at extra tokens (Li & Liang 2021; Hu et al. 2021, section 5.1 and Appendix E).

The extra tokens have the ids behind the vocabulary: `prefix` of them before the context and `infix` between context and
completion, which the data layer inserts. They take positions and context length as any token.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.arrays import Op, Weight, adapted_array, dense
from lora_jax.core.lifting.taps import Tap
from lora_jax.core.selection import Absent, Selection
from lora_jax.core.transforms import Factors, ParamTransform, Target, Traits, per_site, per_target, register
from lora_jax.methods.adapter import occurrences
from lora_jax.methods.arguments import checked
from lora_jax.methods.ranges import COUNT, Range


@adapted_array
class Extended(Weight):
    """An embedding `(v, o)` with `rows` `(n, o)` for the ids from v on. As an output head it is the base."""

    layout: ClassVar = {"rows": "no"}
    indivisible: ClassVar = True  # ids have their meaning in the full table alone
    rows: Array

    def product(self, x: Array, op: Op) -> Array:
        if op.drops_input:
            return super().product(x, op)
        v = self.base.shape[0]
        in_vocabulary = super().product(jnp.minimum(x, v - 1), op)
        # an id beyond them gives NaN, as in the model's own look-up
        rows = jnp.take(self.rows.astype(in_vocabulary.dtype), jnp.maximum(x - v, 0), axis=0, mode="fill")
        return jnp.where((x >= v)[..., None], rows, in_vocabulary)

    def materialize(self) -> Array:
        where = "neither into a merged table nor through an operation that cuts or changes it"
        hint = f"they go {where}: look up in the full one, by lift"
        raise ValueError(f"{self.path}: the rows of a prefix are none of the vocabulary's; {hint}")

    def transposed(self) -> Weight:
        return Weight(base=self.base, core="oi", path=self.path)


@checked
def prefix_embedding(selection: Selection, *, prefix: int, infix: int = 0) -> ParamTransform:
    """Prefix-embedding tuning (the paper's PreEmbed): trained embeddings of prefix and infix tokens.

    These are d (l_p + l_i) parameters, which start as random rows of the vocabulary. The method cannot be merged.

    The selection is the token embedding, with axes "vo"; `prefix` tokens stand before the context, `infix` tokens
    between it and the completion.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> method = lj.prefix_embedding(lj.select("embedding"), prefix=3, infix=1)
    >>> lj.check(method, {"embedding": jnp.ones((9, 4))}).trained
    16
    """
    prefix, infix = _counts(prefix, infix)
    count = prefix + infix

    def shapes(target: Target) -> dict[str, tuple[int, ...]]:
        if isinstance(target.leaf, Absent) or target.axes != "vo":
            raise ValueError(f"{target.path} with axes {target.axes!r}: a prefix extends an embedding with axes 'vo'")
        return {"rows": (count, target.leaf.shape[1])}

    def init(key: Array, target: Target) -> Factors:
        shapes(target)
        drawn = jax.random.randint(key, (count,), 0, target.leaf.shape[0])
        return {"rows": jnp.asarray(dense(target.leaf))[drawn].astype(jnp.float32)}

    def adapt(target: Target, factors: Factors, key: Array | None, strength: Any) -> Extended:
        leaf, rows = target.leaf, factors["rows"]
        if not (isinstance(strength, float | int) and strength == 1):
            s = jnp.asarray(strength, rows.dtype)
            rows = (1 - s) * dense(leaf)[-1:].astype(rows.dtype) + s * rows
        return Extended(**target.fields, rows=rows)

    spec = {"method": "prefix_embedding", **selection.spec(), "prefix": prefix, "infix": infix}
    return per_target(spec, selection, init, adapt, shapes=shapes)


@dataclasses.dataclass(frozen=True)
class ReplaceAtPlaceholders:
    """The trained vectors in place of the activations at the ids from `vocabulary` on."""

    vocabulary: int

    def __call__(self, factors: dict[str, Array], x: Array, seen: Mapping[str, Array]) -> Array:
        which, values = seen["tokens"] - self.vocabulary, factors["values"].astype(x.dtype)
        picked = jnp.take(values, jnp.maximum(which, 0), axis=0, mode="fill")  # NaN for an id beyond them
        return jnp.where((which >= 0)[..., None], picked, x)


@dataclasses.dataclass(frozen=True)
class ClampIds:
    """The ids from `vocabulary` on as its last one, for a look-up that knows no more."""

    vocabulary: int

    def __call__(self, factors: Any, x: Array, seen: Mapping[str, Array]) -> Array:
        return jnp.minimum(x, self.vocabulary - 1)


@checked
def prefix_layer(sites: Mapping[str, Sequence[Any]], *, vocabulary: int, prefix: int, infix: int = 0) -> ParamTransform:
    """Prefix-layer tuning (PreLayer): trained vectors in place of every layer's output at prefix and infix tokens.

    These are L d (l_p + l_i) parameters, drawn from N(0, 0.02^2). The first layer's input at these tokens is the
    embedding of the vocabulary's last token. The method cannot be merged.

    Args:
      sites: `{"block_out": (layers, width)}`, as of `adapter`. The model names its `tokens` too.
      vocabulary: how many ids the model has; those of the extra tokens come after them.
      prefix, infix: as of `prefix_embedding`.

    >>> import lora_jax as lj
    >>> lj.check(lj.prefix_layer({"block_out": (2, 16)}, vocabulary=50, prefix=3, infix=1), {}).trained
    128
    """
    prefix, infix = _counts(prefix, infix)
    count, vocabulary = prefix + infix, COUNT("vocabulary", vocabulary)
    counts, widths = occurrences(sites)

    def init(key: Array, site: str, n: int) -> dict[str, Array]:
        return {"values": 0.02 * jax.random.normal(key, (n, count, widths[site]))}

    spec: dict[str, Any] = {"method": "prefix_layer", "sites": {name: [counts[name], widths[name]] for name in counts}}
    spec |= {"vocabulary": vocabulary, "prefix": prefix, "infix": infix}
    alone = per_site(spec, counts, init, ReplaceAtPlaceholders(vocabulary))

    def apply(*args: Any, **kwargs: Any) -> Any:
        tapped = alone.apply(*args, **kwargs)
        clamp = Tap(factors={}, site="tokens", fn=ClampIds(vocabulary), count=1)
        return dataclasses.replace(tapped, taps=(clamp, *tapped.taps))

    return alone._replace(apply=apply)


def _counts(prefix: int, infix: int) -> tuple[int, int]:
    whole = Range(least=0, whole=True)
    prefix, infix = whole("prefix", prefix), whole("infix", infix)
    if prefix + infix < 1:
        raise ValueError(f"prefix={prefix}, infix={infix}: whole numbers, together at least one token")
    return prefix, infix


traits = Traits(decays=("**/values",), fast=(), inserts=lambda spec: (spec["prefix"], spec["infix"]))
register("prefix_layer", prefix_layer, traits)
why = "its rows are those of tokens behind the vocabulary, and change no weight"
register("prefix_embedding", prefix_embedding, dataclasses.replace(traits, not_additive=why, decays=("**/rows",)))
