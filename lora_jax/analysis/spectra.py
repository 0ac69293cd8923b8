"""The singular values of updates, their ranks, and what an update amplifies in the weight that it changes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.analysis.comparison import nonzero
from lora_jax.core.selection import flatten
from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.methods.changes import changes, weight_matrix, wide
from lora_jax.methods.low_rank import svd
from lora_jax.methods.ranges import Range

SHARE = Range(above=0, most=1)


def spectrum(a: Array, b: Array, scale: Any = 1.0) -> Array:
    """The singular values of scale * a b, (..., k), the largest first, for a (..., m, r) and b (..., r, n); k is
    min(m, r, n), and no m x n matrix is formed.

    >>> import jax.numpy as jnp
    >>> from lora_jax import analysis
    >>> analysis.spectrum(2 * jnp.eye(4)[:, :2], jnp.eye(3)[:2]).tolist()
    [2.0, 2.0]
    """
    _, values, _ = svd(wide(a), wide(b))
    return values * jnp.abs(jnp.asarray(scale, values.dtype))


def effective_rank(values: Array) -> Array:
    """exp of the entropy of the singular values (..., k) over their sum (Roy & Vetterli 2007): from 1 to k; 0 of zeros.

    >>> import jax.numpy as jnp
    >>> from lora_jax import analysis
    >>> analysis.effective_rank(jnp.array([3.0, 3.0, 0.0])).round(4).item()
    2.0
    """
    total = jnp.sum(values, -1)
    shares = values / jnp.where(total > 0, total, 1)[..., None]
    entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares), -1)
    return jnp.where(total > 0, jnp.exp(entropy), 0)


def rank_of_share(values: Array, share: float) -> Array:
    """How many of the singular values (..., k), the largest first, have this share of the sum of all squares or more.

    int32, (...); 0 of zeros. The share is above 0 and at most 1.

    >>> import jax.numpy as jnp
    >>> from lora_jax import analysis
    >>> analysis.rank_of_share(jnp.array([3.0, 1.0, 1.0]), 0.9).item()  # 9 + 1 of 11
    2
    """
    sums = jnp.cumsum(values**2, -1)
    enough = jnp.asarray(SHARE("share", share), sums.dtype) * sums[..., -1:]
    return jnp.where(sums[..., -1] > 0, 1 + jnp.sum(sums < enough, -1, dtype=jnp.int32), 0)


def weights(method: ParamTransform, delta: Delta, params: Any) -> dict[str, Array]:
    """`{path: (s, inputs, outputs)}` of the base's weights that a method changes, float32: those of `updates`, in the
    same axes.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import analysis
    >>> params, method = {"kernel": jnp.ones((2, 100, 70))}, lj.lora(lj.select("kernel", axes="sio"), rank=2)
    >>> analysis.weights(method, method.init(jax.random.key(0), params), params)["kernel"].shape
    (2, 100, 70)
    """
    leaves = dict(flatten(params)[0])
    axes = {path: change.axes for path, change in changes(method, delta, params) if change.axes}
    return {path: weight_matrix(leaves[path], axes[path]) for path in axes}


def amplification(w: Array, a: Array, b: Array, scale: Any = 1.0) -> dict[str, Array]:
    """How much of w is in the directions of the update scale * a b, and how much the update amplifies it (Hu et al.
    2021, section 7.3, Table 7).

    Args:
      w: (..., m, n), the weight, with inputs m. a: (..., m, r), with r at most min(m, n). b: (..., r, n).
      scale: alpha / r, or 1 where b has it.

    Returns:
      `projected`: ||U^T w V||_F, of the update's singular vectors U (m, r) and V (n, r); those of value zero are left
      out. `update`: ||scale a b||_F. `factor`: update / projected. `top`: ||U^T w V||_F for w's own first r singular
      vectors, the norm of its first r singular values, which is the most there is. `random`: for random directions,
      r ||w||_F / sqrt(m n), the root of the mean square. Each has the leading axes of w.

    Raises:
      ValueError: shapes that do not fit, or r above min(m, n).

    >>> import jax.numpy as jnp
    >>> from lora_jax import analysis
    >>> w, a, b = jnp.diag(jnp.array([4.0, 2.0, 1.0])), jnp.eye(3)[:, 1:2], 10 * jnp.eye(3)[1:2]
    >>> {name: round(float(x), 3) for name, x in analysis.amplification(w, a, b).items()}
    {'projected': 2.0, 'update': 10.0, 'factor': 5.0, 'top': 4.0, 'random': 1.528}
    """
    check_factors(w, a, b)
    w, (left, values, right) = wide(w), svd(wide(a), wide(b))
    (m, n), r = w.shape[-2:], a.shape[-1]
    with jax.default_matmul_precision("highest"):
        core = left.swapaxes(-1, -2) @ w @ right.swapaxes(-1, -2)
    is_direction = nonzero(values, max(m, n))
    is_inside = is_direction[..., :, None] & is_direction[..., None, :]
    projected = jnp.linalg.norm(jnp.where(is_inside, core, 0), axis=(-2, -1))
    update = jnp.abs(jnp.asarray(scale, values.dtype)) * jnp.linalg.norm(values, axis=-1)
    top = jnp.linalg.norm(jnp.linalg.svd(w, compute_uv=False)[..., :r], axis=-1)
    random = r * jnp.linalg.norm(w, axis=(-2, -1)) / (m * n) ** 0.5
    return {"projected": projected, "update": update, "factor": update / projected, "top": top, "random": random}


def check_factors(w: Array, a: Array, b: Array) -> None:
    """A ValueError unless a b has the shape of w, and its rank is at most min(m, n)."""
    (*lead, m, n), r = w.shape, a.shape[-1]
    if a.shape != (*lead, m, r) or b.shape != (*lead, r, n):
        raise ValueError(f"a {a.shape} and b {b.shape} must be (m, r) and (r, n) for w (m, n), here {w.shape}")
    if r > min(m, n):
        raise ValueError(f"the rank {r} of the update is above min(m, n) = {min(m, n)} of w {w.shape}")
