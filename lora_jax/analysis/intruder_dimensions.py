"""Intruder dimensions: directions that an adapter puts among a weight's first ones (Shuttleworth et al. 2024)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.analysis.spectra import check_factors
from lora_jax.core.selection import flatten
from lora_jax.core.transforms import Delta, Factors, ParamTransform
from lora_jax.methods.changes import Change, changes, need_weights, no_matrix, update_of, weight_matrix, wide
from lora_jax.methods.low_rank import Residual, cut, with_axes_of
from lora_jax.methods.ranges import COUNT, FINITE, SHARE


class Intruders(NamedTuple):
    """The first k output directions of an adapted weight. An example is in `intruders`.

    Attributes:
      cosine: (..., k), of each the largest size of its cosine with one of the base's.
      value: (..., k), its singular value.
      intruder: (..., k) bool, whether the cosine is below epsilon.
    """

    cosine: Array
    value: Array
    intruder: Array


def intruders(w: Array, a: Array, b: Array, scale: Any = 1.0, k: int = 10, epsilon: float = 0.5) -> Intruders:
    """Which of the first k singular vectors of w + scale * a b have a cosine below epsilon with all of w's.

    Of arXiv 2410.21228, with the defaults of PEFT's `reduce_intruder_dimension`. The vectors are those of the output
    side, as in the paper and in PEFT for a `Linear` (of a GPT-2's `Conv1D` and of embeddings PEFT takes the inputs').

    Args:
      w: (..., m, n), with outputs n. a: (..., m, r), with r at most min(m, n). b: (..., r, n). k: at most min(m, n).

    Raises:
      ValueError: shapes that do not fit, or r or k above min(m, n).

    >>> import jax.numpy as jnp
    >>> from lora_jax import analysis
    >>> w, a, b = jnp.eye(4, 5), jnp.ones((4, 1)), 9 * jnp.eye(5)[4:]  # an output that w does not have
    >>> analysis.intruders(w, a, b, k=2).intruder.tolist()
    [True, False]
    """
    check_factors(w, a, b)
    k, epsilon = COUNT("k", k), FINITE("epsilon", epsilon)
    if k > min(w.shape[-2:]):
        raise ValueError(f"k={k} is above min(m, n) = {min(w.shape[-2:])} of w {w.shape}")
    return _intruders(w, a, b, scale, k, epsilon)[0]


def scale_intruders(
    method: ParamTransform, delta: Delta, params: Any, strength: float = 0.75, *, k: int = 10, epsilon: float = 0.5
) -> tuple[ParamTransform, Delta, Residual]:
    """The adapter with its intruder dimensions scaled by `strength`: PEFT's `mitigation_lambda`, which there, too, is
    the part that stays. It restores some of what the base knew, at the cost of the task.

    Of the adapted weight's first k singular triples, those that intrude lose the part 1 - strength. The change is then
    truncated to the rank that it had, as in PEFT; `residual` says what that left out. Each weight, and each layer of a
    stack, has its own. k is min(inputs, outputs) for weights that are smaller. Biases stay.

    Args:
      method, delta: of low rank, as LoRA; of others `to_lora` first. strength: 0 to 1.

    Raises:
      ValueError: a change of a weight that is not of low rank, or none.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import analysis
    >>> params, method = {"kernel": jnp.eye(4, 5)}, lj.lora(lj.select("kernel"), rank=1)
    >>> delta = lj.Delta({"kernel": {"a": jnp.ones((4, 1)), "b": 9 * jnp.eye(5)[4:]}})
    >>> milder, scaled, residual = analysis.scale_intruders(method, delta, params, 0.5)
    >>> lj.merge(milder.apply(params, scaled))["kernel"][0, 4].round(1)
    Array(4.5, dtype=float32)
    """
    strength, k, epsilon = SHARE("strength", strength), COUNT("k", k), FINITE("epsilon", epsilon)
    need_weights(method, delta)
    leaves, ranks = dict(flatten(params)[0]), dict[str, int]()

    def scaled() -> Iterator[tuple[str, str, Factors]]:
        for path, change in changes(method, delta, params):
            if change.axes and not change.low_rank:
                raise ValueError(f"{path}: its change is of no low rank: take that of lora_jax.analysis.to_lora")
            factors = change.factors
            if change.axes:
                w = weight_matrix(leaves[path], change.axes)
                factors, ranks[path] = _scaled(w, change, strength, k, epsilon), factors["a"].shape[-1]
            yield path, change.axes, factors

    return cut(scaled(), ranks, no_matrix(method))


def _scaled(w: Array, change: Change, strength: float, k: int, epsilon: float) -> Factors:
    """The factors of a change of w (s, m, n) whose intruders are scaled; their rank is larger by min(k, m, n)."""
    a, b = update_of(change)
    check_factors(w, a, b)
    (_, values, intrudes), u, v = _intruders(w, a, b, 1.0, min(k, *w.shape[1:]), epsilon)
    less = jnp.where(intrudes, (strength - 1) * values, 0)
    a, b = jnp.concatenate([a, u * less[:, None]], -1), jnp.concatenate([b, v], -2)
    return with_axes_of(change.factors["a"], change.factors["b"], change.axes.count("s"), a, b)


def _intruders(w: Array, a: Array, b: Array, scale: Any, k: int, epsilon: float) -> tuple[Intruders, Array, Array]:
    """`Intruders`, and the first k singular vectors of the adapted weight, (..., m, k) and (..., k, n)."""
    w, a, b = wide(w), wide(a), wide(b)
    with jax.default_matmul_precision("highest"):
        adapted = w + jnp.asarray(scale, w.dtype) * (a @ b)
        u, values, v = jnp.linalg.svd(adapted, full_matrices=False)
        of_base = jnp.linalg.svd(w, full_matrices=False)[2]
        cosine = jnp.max(jnp.abs(v[..., :k, :] @ of_base.swapaxes(-1, -2)), -1)
    return Intruders(cosine, values[..., :k], cosine < epsilon), u[..., :k], v[..., :k, :]
