"""Riemannian preconditioning, and LoRA-FA."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from lora_jax.core.transforms import Delta, ParamTransform, Spec
from lora_jax.training.lora_optimizers.pairs import (
    Factors,
    Mask,
    Rate,
    bank_head,
    delta_of,
    labelled,
    named_axes,
    need_pairs,
    need_params,
    pairs_of,
    with_factors,
)


def scale_by_riemannian(
    damping: float = 1e-6, *, factors: str = "ab", spec: Spec | None = None
) -> optax.GradientTransformation:
    """Riemannian preconditioning: the gradient of A times (B B^T + damping I)^-1 and that of B times
    (A^T A + damping I)^-1, both of the A and B before the step (Zhang & Pilanci 2024, arXiv 2402.02347, section 3).

    With plain descent it is their scaled GD, whose change of A B does not depend on how A B is factorized, up to the
    damping. No state.

    Args:
      damping: delta, above 0: LoRA's B is zero at first. factors: those whose gradient is scaled.
      spec: the method's, which says which axes are stacked; needed where the shapes leave it open.

    >>> import jax.numpy as jnp, optax, lora_jax as lj
    >>> delta = lj.Delta({"w": {"a": jnp.full((3, 1), 2.0), "b": jnp.ones((1, 3))}})
    >>> tx = lj.freeze_base(optax.chain(scale_by_riemannian(), optax.sgd(1.0)))
    >>> updates, _ = tx.update(delta, tx.init(delta), delta)  # the delta as its own gradient
    >>> updates["w"]["b"]  # 1 / (2^2 + 2^2 + 2^2)
    Array([[-0.08333333, -0.08333333, -0.08333333]], dtype=float32)
    """

    @jax.default_matmul_precision("highest")
    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        delta, grads = need_params(params), delta_of(updates)
        new: Factors = {}
        for pair in pairs_of(delta, spec):
            (x, y), (gx, gy) = pair.of(delta), pair.of(grads)
            gx = _solved(y, gx, damping) if "a" in factors else gx
            gy = _solved(x, gy, damping) if "b" in factors else gy
            pair.put(new, grads, (gx, gy))
        return with_factors(updates, new), state

    def init(params: Any) -> optax.EmptyState:
        need_pairs(params, spec)
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


def _solved(x: Array, gradient: Array, damping: float) -> Array:
    """gradient (x^T x + damping I)^-1."""
    gram = x.swapaxes(-1, -2) @ x
    gram += jnp.broadcast_to(damping * jnp.eye(x.shape[-1], dtype=x.dtype), gram.shape)
    return jnp.linalg.solve(gram, gradient.swapaxes(-1, -2)).swapaxes(-1, -2)


def riemannian(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    damping: float = 1e-6,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    spec: Spec | None = None,
) -> optax.GradientTransformation:
    """Scaled AdamW (Zhang & Pilanci 2024, arXiv 2402.02347, section 3): AdamW of the gradients that
    `scale_by_riemannian` scales.

    Adam's elementwise second moment is not invariant, so that, unlike scaled GD's, its steps depend on the
    factorization. State: Adam's, 2 r (m + n) numbers a pair. The authors' code scales B's gradient by the A of after
    the step, their paper, as here, by that of before.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> delta = lj.Delta({"w": {"a": jnp.ones((3, 1)), "b": jnp.zeros((1, 2))}})
    >>> state = lj.freeze_base(riemannian(1e-3)).init(delta)
    """
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
    return optax.chain(scale_by_riemannian(damping, spec=spec), adamw)


def lora_fa(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    damping: float = 1e-8,
    weight_decay: Any = 0.0,
    mask: Mask = None,
    clip_norm: float | None = None,
    spec: Spec | None = None,
) -> optax.GradientTransformation:
    """LoRA-FA (Zhang et al. 2023, arXiv 2308.03303, and PEFT's `create_lorafa_optimizer`): A stays, and B takes AdamW
    of its gradient times (A^T A + damping I)^-1, the change of B whose A B is nearest to the whole weight's gradient.

    PEFT's factor (r / alpha)^2 of that gradient is left out: Adam divides it out again, up to eps. State: 2 r n numbers
    a pair. A's gradient is not read, so that under jit the compiler does not form it, nor keep the inputs of A for it
    (`still_a` sees to that where something reads all gradients). A never decays.

    Args:
      clip_norm: the largest global norm of the gradients of what trains, before they are scaled.

    Raises:
      ValueError: of `init`, for an embedding: its A is the factor that is zero at first, and nothing would train.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> delta = lj.Delta({"w": {"a": jnp.ones((3, 1)), "b": jnp.zeros((1, 2))}})
    >>> tx = lj.freeze_base(lora_fa(1e-3))
    >>> updates, _ = tx.update(delta, tx.init(delta), delta)
    >>> updates["w"]["a"].any().item()
    False
    """

    def labels(tree: Any) -> Any:
        for key in (key for pair in pairs_of(delta_of(tree), spec) for key in pair.bs):
            path = bank_head(key)[1]
            if "v" in (named_axes(path, spec) or "vo" * (path.split("/")[-1] == "embedding")):
                raise ValueError(f"{path}: lora_fa leaves A as it is, which is zero for an embedding: leave it out")
        return labelled(tree, spec, {"a": "still", "b": "moving"}.__getitem__, "moving")

    def moving(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.partition({"moving": tx, "still": optax.set_to_zero()}, labels)

    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
    return optax.chain(moving(clip), scale_by_riemannian(damping, factors="b", spec=spec), moving(adamw))


def still_a(method: ParamTransform) -> ParamTransform:
    """The method with A's that pass no gradient: what `lora_fa` trains of it.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, method = {"kernel": jnp.ones((3, 2))}, still_a(lj.lora(lj.select("kernel"), rank=1))
    >>> delta = lj.Delta({"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}})
    >>> grads = jax.grad(lambda delta: jnp.sum(lj.merge(method.apply(params, delta))["kernel"]))(delta)
    >>> grads["kernel"]["a"].any().item(), grads["kernel"]["b"].tolist()
    (False, [[3.0, 3.0]])
    """

    def apply(params: Any, delta: Delta, **options: Any) -> Any:
        still = {pair.a: {"a": lax.stop_gradient(delta[pair.a]["a"])} for pair in pairs_of(delta, method.spec)}
        return method.apply(params, with_factors(delta, still), **options)

    return method._replace(apply=apply)
