"""Training some rows of an embedding, such as those of new tokens: PEFT's `trainable_token_indices`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.arrays import Adapted, LowRank, Weight, adapted_array, dense, static, widened
from lora_jax.core.selection import Absent, Selection
from lora_jax.core.transforms import Factors, ParamTransform, Target, Traits, per_target, register
from lora_jax.methods.arguments import checked
from lora_jax.methods.ranges import Range


@adapted_array
class TokenRows(Weight):
    """An embedding `(v, o)` with `rows` `(n, o)`, float32, in the place of the base's rows `indices`."""

    rows: Array
    indices: tuple[int, ...] = static()

    def materialize(self) -> Array:
        return dense(self.base).at[jnp.array(self.indices)].set(self.rows.astype(self.dtype))

    def ready(self) -> Adapted:
        # As a product of low rank, what is right for LoRA is right here: look-ups, and a head that is the embedding.
        wide = widened(self.dtype)
        change = self.rows.astype(wide) - dense(self.base)[jnp.array(self.indices)].astype(wide)
        chosen = jax.nn.one_hot(jnp.array(self.indices), self.shape[0], axis=0, dtype=change.dtype)
        return LowRank(base=self.base, a=chosen, b=change, scale=jnp.float32(1), core=self.core, path=self.path)


@checked
def token_rows(selection: Selection, *, indices: Sequence[int]) -> ParamTransform:
    """The rows `indices` of the selected embeddings train, and replace the base's; the others stay.

    They train in float32 whatever the base's dtype. A head that is the embedding (tied) follows. `merge` puts the rows
    in, rounded once to the base's dtype; `lift` adds their difference from the base's, rounded to it too.

    Args:
      selection: embeddings; axes other than "vo" are a ValueError.
      indices: which rows, whole numbers from 0, each once; others are a ValueError.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> method = lj.token_rows(lj.select("embedding"), indices=[5, 7])
    >>> lj.check(method, {"embedding": jnp.ones((10, 4))}).trained
    8
    """
    chosen = tuple(Range(least=0, whole=True)("indices", n) for n in indices)
    if not chosen:
        raise ValueError("indices=(): name one row or more, counted from 0")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"indices={chosen}: a row is there twice")

    def shapes(target: Target) -> dict[str, tuple[int, ...]]:
        leaf = target.leaf
        if isinstance(leaf, Absent) or target.axes != "vo":
            raise ValueError(f"{target.path} with axes {target.axes!r}: rows are those of an embedding with axes 'vo'")
        if max(chosen) >= leaf.shape[0]:
            raise ValueError(f"{target.path} has {leaf.shape[0]} rows, but indices={chosen}")
        return {"rows": (len(chosen), leaf.shape[1])}

    def init(key: Array, target: Target) -> Factors:
        shapes(target)
        return {"rows": jnp.asarray(dense(target.leaf))[jnp.array(chosen)].astype(widened(target.leaf.dtype))}

    def adapt(target: Target, factors: Factors, key: Array | None, strength: Any) -> TokenRows:
        leaf, new = target.leaf, factors["rows"]
        if not (isinstance(strength, float | int) and strength == 1):
            old, new = (x.astype(widened(leaf.dtype)) for x in (dense(leaf)[jnp.array(chosen)], new))
            s = jnp.asarray(strength, new.dtype)
            new = (1 - s) * old + s * new
        return TokenRows(**target.fields, rows=new, indices=chosen)

    spec = {"method": "token_rows", **selection.spec(), "indices": list(chosen)}
    return per_target(spec, selection, init, adapt, shapes=shapes)


rows = token_rows  # its name before
register("token_rows", token_rows, Traits(decays=("**/rows",), fast=(), aliases=("rows",)))
