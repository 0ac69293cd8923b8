"""Any change of weights as a LoRA of a chosen rank: of another method, or of the difference of two models."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.core.arrays import dense, widened
from lora_jax.core.selection import Selection, flatten, look_up
from lora_jax.core.transforms import Delta, Factors, ParamTransform
from lora_jax.methods.changes import Change, change_of, changes, matrix_shape, need_weights, no_matrix
from lora_jax.methods.low_rank import Residual, cut
from lora_jax.methods.ranges import COUNT

Rank = int | Mapping[str, int]


def to_lora(
    method: ParamTransform, delta: Delta, rank: Rank, params: Any = None
) -> tuple[ParamTransform, Delta, Residual]:
    """What a method changes, as a LoRA of scale 1 and this rank: the nearest in the Frobenius norm (Eckart and Young
    1936), and the error that it makes.

    Works for every method that merges into the weights. Changes of biases, and of other leaves that are no matrices,
    are kept whole, as `bias_delta`.

    Args:
      rank: 1 to min(inputs, outputs), or a mapping glob -> rank (first match wins; no match is an error).
      params: as `updates` takes them: DoRA, IA3 and `tune` need the base.

    Returns:
      `(method, delta, error)`: the norm of what is left out over that of the change, for each path and for all.

    Raises:
      ValueError: a method that changes activations or adds tokens; nothing that is a matrix; a rank that cannot be.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import analysis
    >>> params, dora = {"kernel": jnp.ones((100, 70))}, lj.dora(lj.select("kernel"), rank=2)
    >>> delta = jax.tree.map(lambda leaf: leaf + 0.1, dora.init(jax.random.key(0), params))
    >>> lora, as_lora, error = analysis.to_lora(dora, delta, rank=4, params=params)
    >>> print(as_lora)
    Delta: 1 paths, 680 numbers
      kernel: a float32(100, 4), b float32(4, 70)
    """
    need_weights(method, delta)
    return cut(_checked(changes(method, delta, params), rank), rank, no_matrix(method))


def extract(params: Any, tuned_params: Any, selection: Selection, rank: Rank) -> tuple[ParamTransform, Delta, Residual]:
    """The difference of two models of one shape, `tuned_params - params`, as a LoRA of the base `params`.

    Args:
      selection: the leaves; others are taken to be equal, and are not compared. Those that are no matrices become
        `bias_delta`. rank: as in `to_lora`, and so the results.

    Raises:
      ValueError: a leaf that the two do not both have, in one shape; as `to_lora` besides.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import analysis
    >>> params, tuned = {"kernel": jnp.eye(3, 2)}, {"kernel": jnp.eye(3, 2) + 1}
    >>> method, delta, error = analysis.extract(params, tuned, lj.select("kernel"), rank=1)
    >>> lj.merge(method.apply(params, delta))["kernel"][0].round(4).tolist()
    [2.0, 1.0]
    """
    before, after = (dict(flatten(tree)[0]) for tree in (params, tuned_params))

    def differences() -> Iterator[tuple[str, Change]]:
        for path, axes in selection(params).items():
            shapes = [getattr(leaves.get(path), "shape", "none") for leaves in (before, after)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{path} is {shapes[0]} in params, {shapes[1]} in tuned_params: not of one shape")
            dtype = jnp.promote_types(*(widened(leaves[path].dtype) for leaves in (before, after)))
            yield (
                path,
                change_of(
                    jnp.asarray(dense(after[path])).astype(dtype) - jnp.asarray(dense(before[path])).astype(dtype), axes
                ),
            )

    return cut(_checked(differences(), rank), rank, "nothing that the selection has is a matrix of the base")


def _checked(by_path: Iterable[tuple[str, Change]], rank: Rank) -> Iterator[tuple[str, str, Factors]]:
    """The changes, as `cut` takes them; a ValueError where the rank is above the sizes of a matrix."""
    for path, change in by_path:
        if change.axes:
            r, (_, *sides) = COUNT(f"{path}: rank", look_up(rank, path, "rank")), matrix_shape(change)
            if r > min(sides):
                raise ValueError(f"{path}: rank={r} must be a whole number from 1 to min(in, out) = {min(sides)}")
        yield path, change.axes, change.factors
