"""Two adapters beside each other: the directions that they share, and how alike their updates are."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.methods.changes import Update, updates, wide

SIDES = ("input", "output")


class Similarity(NamedTuple):
    """phi of two adapters at one weight, and what random ones have. An example is in `of_adapters`.

    Attributes:
      phi: (s, n, m), as `subspace_similarity`, for every layer of a stack (s is 1 for a weight that is none).
      random: (n, m), its expectation for random factors, `random_similarity`.
    """

    phi: Array
    random: Array


class Comparison(NamedTuple):
    """Two adapters at one weight. An example is in `compare`.

    Attributes:
      input, output: the `Similarity` of their A's and of their B's.
      alignment: (s,), the cosine of their updates.
      distance: (s,), that of the first update from the second, over the second's norm.
    """

    input: Similarity
    output: Similarity
    alignment: Array
    distance: Array


def subspace_similarity(x: Array, y: Array) -> Array:
    """phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j) of the first i left singular vectors of x and the first j of y.

    Of section 7.2 and Appendix G of Hu et al. 2021: the mean squared cosine of the principal angles, 1 where the
    smaller subspace is inside the larger one, 0 where they are orthogonal. Directions whose singular value is zero, up
    to rounding, are in no subspace: they count as orthogonal to all.

    Args:
      x: (..., d, n), with n at most d; the vectors are in order of singular value. y: (..., d, m).

    Returns:
      (..., n, m), with phi(i, j) at [..., i - 1, j - 1].

    Raises:
      ValueError: different d, or more columns than rows.

    >>> import jax.numpy as jnp
    >>> from lora_jax import analysis
    >>> x, y = jnp.eye(3)[:, :1], jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    >>> analysis.subspace_similarity(x, y).tolist()
    [[0.0, 0.0, 1.0]]
    """
    if x.ndim < 2 or y.ndim < 2 or x.shape[-2] != y.shape[-2]:
        raise ValueError(f"x {x.shape} and y {y.shape} must be (d, n) and (d, m): columns of one space")
    for name, columns in (("x", x), ("y", y)):
        if columns.shape[-1] > columns.shape[-2]:
            raise ValueError(f"{name} {columns.shape} has more columns than the width {columns.shape[-2]} of its space")
    n, m = x.shape[-1], y.shape[-1]
    with jax.default_matmul_precision("highest"):
        squares = (_directions(x).swapaxes(-1, -2) @ _directions(y)) ** 2
    sums = jnp.cumsum(jnp.cumsum(squares, -2), -1)
    least = jnp.minimum(jnp.arange(1, n + 1)[:, None], jnp.arange(1, m + 1)[None])
    return sums / jnp.broadcast_to(least.astype(sums.dtype), sums.shape)


def random_similarity(n: int, m: int, d: int) -> Array:
    """The expectation of phi for two random subspaces of d dimensions, (n, m): max(i, j) / d at [i - 1, j - 1].

    >>> from lora_jax import analysis
    >>> analysis.random_similarity(1, 2, 4).tolist()
    [[0.25, 0.5]]
    """
    return jnp.maximum(jnp.arange(1.0, n + 1)[:, None], jnp.arange(1.0, m + 1)[None]) / d


def of_adapters(
    method: ParamTransform,
    delta: Delta,
    other_method: ParamTransform,
    other_delta: Delta,
    side: str = "input",
    params: Any = None,
) -> dict[str, Similarity]:
    """phi of two adapters of one base, for every weight that both change: Figures 3, 4, 6 and 7 of the paper.

    Args:
      side: "input" compares their A's, as the paper does, "output" their B's.
      params: as `updates` takes them.

    Raises:
      ValueError: the adapters are of different bases, or change no weight in common; a rank above the weight's width.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import analysis
    >>> params, method = {"kernel": jnp.ones((100, 70))}, lj.lora(lj.select("kernel"), rank=4)
    >>> one, two = (method.init(jax.random.key(seed), params) for seed in (0, 1))
    >>> similarity = analysis.of_adapters(method, one, method, two)["kernel"]
    >>> similarity.phi.shape, similarity.random[3, 3].item()  # 4 / 100
    ((1, 4, 4), 0.03999999910593033)
    """
    if side not in SIDES:
        raise ValueError(f"side={side!r}: choose one of {SIDES}")
    both = _in_both(updates(method, delta, params), updates(other_method, other_delta, params))
    return {path: _similarity(path, *pair, side) for path, pair in both.items()}


def compare(one: Mapping[str, Update], other: Mapping[str, Update]) -> dict[str, Comparison]:
    """Two adapters beside each other, for every weight that both change.

    Args:
      one, other: of `updates`, or of `interop.peft.updates`, which reads PEFT's folders without their base.

    Raises:
      ValueError: as `of_adapters`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import analysis
    >>> method = lj.lora(lj.select("kernel"), rank=1)
    >>> one = lj.Delta({"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}})
    >>> comparison = analysis.compare(analysis.updates(method, one), analysis.updates(method, one))["kernel"]
    >>> comparison.alignment.round(4).item(), comparison.distance.round(4).item()
    (1.0, 0.0)
    """

    def comparison(path: str, one: Update, other: Update) -> Comparison:
        inputs, outputs = (_similarity(path, one, other, side) for side in SIDES)
        return Comparison(inputs, outputs, alignment(one, other), distance(one, other))

    return {path: comparison(path, *pair) for path, pair in _in_both(one, other).items()}


@jax.default_matmul_precision("highest")
def alignment(one: Update, other: Update) -> Array:
    """The cosine of two updates in the Frobenius inner product, (s,), from their factors; NaN where one is zero.

    >>> import jax.numpy as jnp
    >>> from lora_jax import analysis
    >>> one, other = (analysis.Update(n * jnp.ones((1, 3, 1)), jnp.ones((1, 1, 2))) for n in (1, -2))
    >>> analysis.alignment(one, other).round(4).item()
    -1.0
    """
    inner = (one.a.swapaxes(-1, -2) @ other.a) * (one.b @ other.b.swapaxes(-1, -2))
    return jnp.sum(inner, (-2, -1)) / (norm(one) * norm(other))


def distance(one: Update, other: Update) -> Array:
    """||one - other||_F / ||other||_F of two updates, (s,), from their factors: of LoRA's from full fine-tuning's, say.

    >>> import jax.numpy as jnp
    >>> from lora_jax import analysis
    >>> one, other = (analysis.Update(n * jnp.ones((1, 3, 1)), jnp.ones((1, 1, 2))) for n in (1, 2))
    >>> analysis.distance(one, other).round(4).item()
    0.5
    """
    a, b = jnp.concatenate([one.a, -other.a], -1), jnp.concatenate([one.b, other.b], -2)
    return norm(Update(a, b)) / norm(other)


def norm(update: Update) -> Array:
    """||a b||_F, (s,): by QR decompositions, for a sum of products of the two factors would cancel."""
    left, right = (jnp.linalg.qr(x, "r") for x in (update.a, update.b.swapaxes(-1, -2)))
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.norm(left @ right.swapaxes(-1, -2), axis=(-2, -1))


def nonzero(values: Array, size: int) -> Array:
    """Which singular values (..., k), the largest first, of a matrix of at most this size are above rounding."""
    return values > values[..., :1] * (size * jnp.finfo(values.dtype).eps)


def _directions(x: Array) -> Array:
    """The left singular vectors of x (..., d, n) as columns; zeros where the singular value is zero."""
    u, values, _ = jnp.linalg.svd(wide(x), full_matrices=False)
    return jnp.where(nonzero(values, x.shape[-2])[..., None, :], u, 0)


def _similarity(path: str, one: Update, other: Update, side: str) -> Similarity:
    x, y = (update.a if side == "input" else update.b.swapaxes(-1, -2) for update in (one, other))
    try:
        phi = subspace_similarity(x, y)
    except ValueError as error:
        raise ValueError(f"{path}, side={side!r}: {error}") from None
    return Similarity(phi, random_similarity(x.shape[-1], y.shape[-1], x.shape[-2]))


def _in_both(one: Mapping[str, Update], other: Mapping[str, Update]) -> dict[str, tuple[Update, Update]]:
    """The updates of the weights that both have; a ValueError for none, or for weights of different shapes."""
    both = {path: (one[path], other[path]) for path in one if path in other}
    if not both:
        raise ValueError(f"the adapters change no weight in common: {[*one][:3]} ... and {[*other][:3]} ...")
    for path, pair in both.items():
        shapes = [(*update.a.shape[:2], update.b.shape[2]) for update in pair]
        if len(set(shapes)) > 1:
            shown = " and ".join(map(str, shapes))
            raise ValueError(f"{path}: the adapters are of different bases: (stack, inputs, outputs) = {shown}")
    return both
