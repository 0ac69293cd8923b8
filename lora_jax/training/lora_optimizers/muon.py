"""LoRA-Muon: Muon's step of the product A B."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from optax import contrib

from lora_jax.core.arrays import widened
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

# Appendix B.3, Table 1 of LoRA-Muon: the steps of Newton and Schulz's iteration, after Amsel et al. 2025.
_SIGN_STEPS = (
    (7.2086, -15.5131, 9.0178),
    (3.9623, -2.5813, 0.4542),
    (3.9466, -2.5765, 0.4544),
    (3.8991, -2.5671, 0.4566),
    (3.7186, -2.5308, 0.4653),
    (3.1390, -2.3073, 0.4733),
    (2.1715, -1.5246, 0.3885),
    (1.8648, -1.2224, 0.3577),
)


def scale_by_lora_muon(b1: float = 0.9, *, spec: Spec | None = None) -> optax.GradientTransformation:
    """The direction of LoRA-Muon, for deltas of pairs alone; see `lora_muon`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> delta = lj.Delta({"w": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}})
    >>> updates, _ = scale_by_lora_muon().update(delta, scale_by_lora_muon().init(delta), delta)
    """

    def init(params: Any) -> Delta:
        first: Factors = {}
        for pair in pairs_of(delta := need_params(params), spec):
            x, y = pair.of(delta)
            pair.put(first, delta, (jnp.zeros_like(x), jnp.zeros_like(y)), x.dtype)
        return Delta(first)

    @jax.default_matmul_precision("highest")
    def update(updates: Any, state: Delta, params: Any = None) -> tuple[Any, Delta]:
        delta, grads = need_params(params), delta_of(updates)
        new: Factors = {}
        first: Factors = {}
        for pair in pairs_of(delta, spec):
            (mx, my), (gx, gy), (x, y) = pair.of(state), pair.of(grads), pair.of(delta)
            mx, my = b1 * mx + (1 - b1) * gx, b1 * my + (1 - b1) * gy
            pair.put(new, grads, (_direction(mx, y), _direction(my, x)))
            pair.put(first, delta, (mx, my), mx.dtype)
        return with_factors(updates, new), Delta(first)

    return optax.GradientTransformation(init, update)


def _direction(moment: Array, other: Array) -> Array:
    """msign(moment R) R / 2, with R the inverse root of the other factor's Gram matrix."""
    root = _gram_root(other)
    return _sign(moment @ root) @ root / 2


def _gram_root(x: Array) -> Array:
    """(x^T x)^-1/2, zero along the directions that x does not have, to rounding."""
    values, u = jnp.linalg.eigh(x.swapaxes(-1, -2) @ x)
    is_there = values > rounding(x) * values[..., -1:]
    roots = jnp.where(is_there, lax.rsqrt(jnp.where(is_there, values, 1)), 0)
    return (u * roots[..., None, :]) @ u.swapaxes(-1, -2)


def _sign(x: Array) -> Array:
    """U V of the singular value decomposition U S V, by optax's iteration; zero of zero."""
    axes = contrib.MuonDimensionNumbers(-2, -1)
    options: dict[str, Any] = {"ns_steps": len(_SIGN_STEPS), "beta": 0.0, "eps": 1e-20, "nesterov": False}
    iteration = contrib.scale_by_muon(_SIGN_STEPS, **options, weight_dimension_numbers=axes)
    return iteration.update(x, iteration.init(x))[0]


class SplitDecayState(NamedTuple):
    """Of LoRA-Muon's decay."""

    step: Array  # those done


def _split_decay(learning_rate: Rate, weight_decay: Any, mask: Mask) -> optax.GradientTransformation:
    """p -> s p - rate / s * direction with s = sqrt(1 - rate decay), so that A B decays by 1 - rate decay; s is 1 for
    what does not decay."""

    def update(updates: Any, state: SplitDecayState, params: Any = None) -> tuple[Any, SplitDecayState]:
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        decays = jax.tree.map(lambda _: True, params) if mask is None else mask(params)

        def moved(direction: Array, p: Array, is_decaying: bool) -> Array:
            wide = widened(p.dtype)
            product = jnp.asarray(rate * weight_decay if is_decaying else 0.0, wide)
            s = jnp.sqrt(1 - product)
            change = -product / (1 + s) * p.astype(wide) - jnp.asarray(rate, wide) / s * direction.astype(wide)
            return change.astype(direction.dtype)

        return jax.tree.map(moved, updates, params, decays), SplitDecayState(optax.safe_increment(state.step))

    return optax.GradientTransformation(lambda params: SplitDecayState(jnp.zeros((), jnp.int32)), update)


def lora_muon(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    spec: Spec | None = None,
) -> optax.GradientTransformation:
    """LoRA-Muon (Cesista et al. 2026, arXiv 2606.12921, Algorithm 1): Muon's step of the product A B.

    A takes -rate/2 msign(M R) R with R = (B B^T)^-1/2, of the mean M of its gradients; B the same with A and B
    exchanged. So both parts of the change of A B, dA B and A dB, have all their singular values at rate/2, however A B
    is factorized. The rate is thus the size of a step of A B in the spectral norm, of which the weight gets alpha / r:
    it is no rate of Adam's. A decay splits over A and B. msign is optax's iteration with the paper's steps; R comes
    from an eigendecomposition, exact where the paper iterates, and leaves out what is rounding. The paper begins with
    an A and a B that are random: LoRA's zero B is moved first, and A one step later.

    The rule is that of public descriptions of the paper's Algorithm 1 and Appendix B, which agree; its authors' code
    was not found. State: r (m + n) numbers a pair.

    Args:
      b1: of the mean M. b2, eps: of Adam, for the rest, at the same rate.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> delta = lj.Delta({"w": {"a": jnp.ones((3, 1)), "b": jnp.zeros((1, 2))}})
    >>> state = lj.freeze_base(lora_muon(0.02)).init(delta)
    """
    for_pairs = optax.chain(scale_by_lora_muon(b1, spec=spec), _split_decay(learning_rate, weight_decay, mask))
    rest = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
    return with_adam(for_pairs, rest, spec)
