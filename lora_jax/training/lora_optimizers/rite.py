"""LoRA-RITE: Adam with r x r moments, in the bases that A and B have whatever their magnitudes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lora_jax.core.transforms import Delta, Spec
from lora_jax.training.lora_optimizers.pairs import (
    Factors,
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

    step: Array  # those done
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
        delta = need_params(params)
        first, second, escaped, bases = _trees()
        for pair in pairs_of(delta, spec):
            x, y = pair.of(delta)
            (kx, ky), lead = (min(z.shape[-2:]) for z in (x, y)), x.shape[: pair.stacked]
            pair.put(first, delta, (_zeros(x, ky), _zeros(y, kx)), x.dtype)
            pair.put(bases, delta, (_zeros(x, kx), _zeros(y, ky)), x.dtype)
            second[pair.a] = {name: jnp.zeros((*lead, k, k), x.dtype) for name, k in (("a", ky), ("b", kx))}
            escaped[pair.a] = {name: jnp.zeros(lead, x.dtype) for name in "ab"}
        return RiteState(jnp.zeros((), jnp.int32), *map(Delta, (first, second, escaped, bases)))

    @jax.default_matmul_precision("highest")
    def update(updates: Any, state: RiteState, params: Any = None) -> tuple[Any, RiteState]:
        delta, grads = need_params(params), delta_of(updates)
        done = optax.safe_increment(state.step)
        t = done.astype(jnp.float32)
        decays = tuple(b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))  # corrects the bias, as the authors' code
        split = {pair: _Split.of(pair.of(delta), pair.of(grads)) for pair in pairs_of(delta, spec)}
        squares = [jnp.sum(g**2) for parts in split.values() for g in parts.gradients]
        shrink = jnp.ones(()) if clip_norm is None else jnp.minimum(1, clip_norm / jnp.sqrt(sum(squares)))
        new: Factors = {}
        first, second, escaped, bases = _trees()
        for pair, parts in split.items():
            sides = []
            for n, name in enumerate("ab"):
                turn = parts.bases[1 - n].swapaxes(-1, -2) @ pair.of(state.bases)[1 - n]
                d1, d2, size = (factor.astype(turn.dtype) for factor in (*decays, shrink))
                old = _Moments(pair.of(state.first)[n], state.second[pair.a][name], state.escaped[pair.a][name])
                sides.append(old.turned(turn, d2).plus(parts.gradients[n] * size, d1, d2, eps))
            x, y = sides
            rx, ry = parts.inverses
            pair.put(new, grads, (x.first @ ry.swapaxes(-1, -2), y.first @ rx.swapaxes(-1, -2)))
            pair.put(first, delta, (x.first, y.first), x.first.dtype)
            pair.put(bases, delta, parts.bases, x.first.dtype)
            second[pair.a], escaped[pair.a] = {"a": x.second, "b": y.second}, {"a": x.escaped, "b": y.escaped}
        return with_factors(updates, new), RiteState(done, *map(Delta, (first, second, escaped, bases)))

    return optax.GradientTransformation(init, update)


def _trees() -> tuple[Factors, Factors, Factors, Factors]:
    return {}, {}, {}, {}


def _zeros(x: Array, columns: int) -> Array:
    return jnp.zeros((*x.shape[:-1], columns), x.dtype)


class _Split(NamedTuple):
    """x and y as bases times magnitudes, and their gradients without the other's magnitude."""

    bases: tuple[Array, Array]
    inverses: tuple[Array, Array]  # of the magnitudes
    gradients: tuple[Array, Array]

    @classmethod
    def of(cls, pair: tuple[Array, Array], gradients: tuple[Array, Array]) -> "_Split":
        (ux, rx), (uy, ry) = map(_basis, pair)
        return cls((ux, uy), (rx, ry), (gradients[0] @ ry, gradients[1] @ rx))


def _basis(x: Array) -> tuple[Array, Array]:
    """U with orthonormal columns and R's pseudo-inverse, x = U R. A direction that x does not have, to rounding (all of
    a B that is zero, a rank that a sweep pads), is zero in both, as in the pseudo-inverse of the authors' code."""
    q, r = jnp.linalg.qr(x)
    u, values, vt = jnp.linalg.svd(r, full_matrices=False)
    is_there = values > rounding(r) * values[..., :1]
    inverse = jnp.where(is_there, 1 / jnp.where(is_there, values, 1), 0)
    basis = q @ (u * is_there.astype(u.dtype)[..., None, :])
    return basis, vt.swapaxes(-1, -2) * inverse[..., None, :]


class _Moments(NamedTuple):
    """Of one side, in the basis of the other factor."""

    first: Array
    second: Array
    escaped: Array

    def turned(self, turn: Array, decay: Array) -> "_Moments":
        """In another basis, with what the second moment loses by that."""
        second = _symmetric(turn @ self.second @ turn.swapaxes(-1, -2))
        # A projection makes no eigenvalue larger: the trace's loss, the authors' other bound, is never less than this.
        lost = jnp.max(jnp.linalg.eigvalsh(self.second) - jnp.linalg.eigvalsh(second), -1)
        return _Moments(self.first @ turn.swapaxes(-1, -2), second, decay * (self.escaped + jnp.maximum(lost, 0)))

    def plus(self, g: Array, d1: Array, d2: Array, eps: float) -> "_Moments":
        """After a step with this gradient."""
        second = (1 - d2) * (g.swapaxes(-1, -2) @ g) / g.shape[-2] + d2 * self.second
        direction = g @ _inverse_root(second, self.escaped, eps)
        return _Moments((1 - d1) * direction + d1 * self.first, second, self.escaped)


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
