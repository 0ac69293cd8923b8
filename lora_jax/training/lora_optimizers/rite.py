"""LoRA-RITE: Adam with r x r moments, in the bases that A and B have whatever their magnitudes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lora_jax.core.transforms import Delta, Spec
from lora_jax.training.lora_optimizers.pairs import (
    Mask,
    Rate,
    delta_of,
    need_params,
    pairs_of,
    rounding,
    with_adam,
    with_factors,
)


class RiteState(NamedTuple):
    """Of `scale_by_lora_rite`; each tree has `{key: {"a": array, "b": array}}`, of A's side and of B's."""

    count: Array
    first: Delta  # moments (s.., m, r) of A's side, in the basis of B, and the other way round
    second: Delta  # (s.., r, r), in the same bases
    escaped: Delta  # (s..), rho: what the second moments have lost of their mass by projection
    bases: Delta  # of A and B themselves: orthonormal columns, with the shapes of the factors


def scale_by_lora_rite(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, *, clip_norm: float | None = None, spec: Spec | None = None
) -> optax.GradientTransformation:
    """The direction of LoRA-RITE, for deltas of pairs alone; see `lora_rite`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> delta = lj.Delta({"w": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}})
    >>> state = scale_by_lora_rite().init(delta)
    >>> state.second
    Delta: 1 paths, 2 numbers
      w: a float32(1, 1), b float32(1, 1)
    """

    def init(params: Any) -> RiteState:
        first: dict[str, Any] = {}
        second, escaped, bases = (dict[str, Any]() for _ in range(3))
        for pair in pairs_of(delta := need_params(params), spec):
            x, y = pair.of(delta)
            kx, ky = (min(z.shape[-2:]) for z in (x, y))
            zeros = lambda z, k: jnp.zeros((*z.shape[:-1], k), z.dtype)  # noqa: E731
            pair.put(first, delta, zeros(x, ky), zeros(y, kx), x.dtype)
            pair.put(bases, delta, zeros(x, kx), zeros(y, ky), x.dtype)
            lead = x.shape[: pair.stacked]
            second[pair.a] = {"a": jnp.zeros((*lead, ky, ky), x.dtype), "b": jnp.zeros((*lead, kx, kx), x.dtype)}
            escaped[pair.a] = {"a": jnp.zeros(lead, x.dtype), "b": jnp.zeros(lead, x.dtype)}
        return RiteState(jnp.zeros((), jnp.int32), *map(Delta, (first, second, escaped, bases)))

    @jax.default_matmul_precision("highest")
    def update(updates: Any, state: RiteState, params: Any = None) -> tuple[Any, RiteState]:
        delta, grads = need_params(params), delta_of(updates)
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        decays = [b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2)]  # corrects the bias, as in the authors' code
        sides = {pair: _unmagnified(pair.of(delta), pair.of(grads)) for pair in pairs_of(delta, spec)}
        squares = [jnp.sum(g**2) for side in sides.values() for g in side.gradients]
        shrink = jnp.ones(()) if clip_norm is None else jnp.minimum(1, clip_norm / jnp.sqrt(sum(squares)))
        new, *trees = (dict[str, Any]() for _ in range(5))
        first, second, escaped, bases = trees
        for pair, side in sides.items():
            old_bases, old_first = pair.of(state.bases), pair.of(state.first)
            moments, directions = [], []
            for n, name in enumerate("ab"):
                turn = side.bases[1 - n].swapaxes(-1, -2) @ old_bases[1 - n]
                old = old_first[n], state.second[pair.a][name], state.escaped[pair.a][name]
                moments.append(_moments(side.gradients[n] * shrink.astype(turn.dtype), turn, *old, *decays, eps))
                directions.append(moments[n][0] @ side.inverses[1 - n].swapaxes(-1, -2))
            dtype = moments[0][0].dtype
            pair.put(new, grads, *directions)
            pair.put(first, delta, *(moment for moment, _, _ in moments), dtype)
            pair.put(bases, delta, *side.bases, dtype)
            second[pair.a], escaped[pair.a] = ({"a": moments[0][n], "b": moments[1][n]} for n in (1, 2))
        return with_factors(updates, new), RiteState(count, *map(Delta, trees))

    return optax.GradientTransformation(init, update)


class _Sides(NamedTuple):
    """x and y as basis times magnitude, and their gradients without the other's magnitude."""

    bases: tuple[Array, Array]
    inverses: tuple[Array, Array]  # of the magnitudes
    gradients: tuple[Array, Array]


def _unmagnified(pair: tuple[Array, Array], grads: tuple[Array, Array]) -> _Sides:
    (ux, rx), (uy, ry) = map(_basis, pair)
    return _Sides((ux, uy), (rx, ry), (grads[0] @ ry, grads[1] @ rx))


def _basis(x: Array) -> tuple[Array, Array]:
    """U with orthonormal columns and R's pseudo-inverse, x = U R. A direction that x does not have, to rounding (all of
    a B that is zero, a rank that a sweep pads), is zero in both, as in the pseudo-inverse of the authors' code."""
    q, r = jnp.linalg.qr(x)
    u, values, vt = jnp.linalg.svd(r, full_matrices=False)
    is_there = values > rounding(r) * values[..., :1]
    inverse = jnp.where(is_there, 1 / jnp.where(is_there, values, 1), 0)
    basis = q @ (u * is_there.astype(u.dtype)[..., None, :])
    return basis, vt.swapaxes(-1, -2) * inverse[..., None, :]


def _moments(g: Array, turn: Array, first: Array, v: Array, rho: Array, d1: Array, d2: Array, eps: float) -> tuple:
    """The moments of one side after a step, from its unmagnified gradient and the turn from the old basis."""
    d1, d2 = d1.astype(g.dtype), d2.astype(g.dtype)
    moved = _symmetric(turn @ v @ turn.swapaxes(-1, -2))
    before, after = jnp.linalg.eigvalsh(v), jnp.linalg.eigvalsh(moved)
    lost = jnp.minimum(jnp.max(before - after, -1), jnp.sum(before - after, -1))
    rho = d2 * (rho + jnp.maximum(lost, 0))
    v = (1 - d2) * (g.swapaxes(-1, -2) @ g) / g.shape[-2] + d2 * moved
    first = (1 - d1) * (g @ _inverse_root(v, rho, eps)) + d1 * (first @ turn.swapaxes(-1, -2))
    return first, v, rho


def _symmetric(v: Array) -> Array:
    return (v + v.swapaxes(-1, -2)) / 2


def _inverse_root(v: Array, rho: Array, eps: float) -> Array:
    """(v + rho I)^-1/2, with eps added to each root, and no eigenvalue of v below its rounding."""
    values, u = jnp.linalg.eigh(_symmetric(v))
    values = jnp.maximum(values, rounding(v) * jnp.maximum(values[..., -1:], 0)) + rho[..., None]
    return (u / (jnp.sqrt(values) + eps)[..., None, :]) @ u.swapaxes(-1, -2)


def lora_rite(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    *,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    clip_norm: float | None = None,
    spec: Spec | None = None,
) -> optax.GradientTransformation:
    """LoRA-RITE (Yen et al. 2025, arXiv 2410.20625, Algorithm 1): Adam with r x r second moments, whose steps of A B do
    not depend on how A B is factorized: A R and R^-1 B for A and B change nothing.

    With A = U_A R_A and B^T = U_B R_B: g R_B^-1 is A's gradient without B's magnitude, in the basis U_B. Its moments
    there turn with P = U_B,t^T U_B,t-1; what the second, V, loses of its mass by that is added back as rho I. A takes
    M R_B^-T, of the mean M of g R_B^-1 (V + rho I)^-1/2; B the same with A and B exchanged. As in the authors' code,
    moments are means whose bias is corrected, V is divided by its rows, and rho decays with b2. That code skips
    unmagnified gradients of a root mean square above 1, clips them at 1, and leaves rho out unless told; this does not.

    State: 2 r (m + n) + 2 r^2 + 2 numbers a pair. A step takes two QR decompositions of the factors' shapes and five
    decompositions r x r of each.

    Args:
      eps: added to the roots of the eigenvalues; for the rest it is Adam's.
      clip_norm: the largest norm of all pairs' unmagnified gradients together, which is invariant too, and of the
        gradients of the rest.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> delta = lj.Delta({"w": {"a": jnp.ones((3, 1)), "b": jnp.zeros((1, 2))}})
    >>> state = lj.freeze_base(lora_rite(1e-3)).init(delta)
    """
    rite = scale_by_lora_rite(b1, b2, eps, clip_norm=clip_norm, spec=spec)
    decay = optax.add_decayed_weights(weight_decay, mask)
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
    for_pairs = optax.chain(rite, decay, optax.scale_by_learning_rate(learning_rate))
    return with_adam(for_pairs, optax.chain(clip, adamw), spec)
