"""One training step, and one of validation: pure functions for `jax.jit`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lora_jax.freezing import partition, rejoin
from lora_jax.training.objectives import Objective
from lora_jax.transforms import Delta, ParamTransform

# What a step adds up on the device since the metrics were last fetched, all at once: the loss and
# the labels (sums), the tokens computed and the real ones (sums), the newest gradient norm and
# learning rate, and the first step with a non-finite loss or gradient (0: none).
METRICS = ("loss", "labels", "tokens", "real_tokens", "gradient_norm", "learning_rate", "bad_step")


class State(NamedTuple):
    """All that a run needs to go on; every leaf is a device array.

    Attributes:
      step: () int32, the steps done; the position in the data follows from it.
      delta: float32.
      optimizer: the state of the optimizer, for the trainable half of the delta.
      key: (2,) uint32, the data of the run's key; step i draws from `fold_in(key, i)`.
      metrics: (7,) float32, see METRICS.
    """

    step: Array
    delta: Delta
    optimizer: Any
    key: Array
    metrics: Array


def new_state(
    method: ParamTransform, tx: optax.GradientTransformation, params: Any, key: Array, known: Mapping[str, Any] = {}
) -> State:
    """The state before the first step; `known` are entries of the delta that start where another run ended."""
    for_init, for_steps = jax.random.split(key)
    delta = Delta({**method.init(for_init, params), **known})
    return State(
        step=jnp.zeros((), jnp.int32),
        delta=delta,
        optimizer=tx.init(partition(delta)[0]),
        key=jax.random.key_data(for_steps),
        metrics=jnp.zeros(len(METRICS), jnp.float32),
    )


def make_step(
    objective: Objective,
    method: ParamTransform,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
) -> Callable[[State, Any, dict[str, Array]], State]:
    """`step(state, params, batch) -> state`.

    Each array of the batch is (k, b, ...): k micro-batches of b rows. Their losses and gradients
    are summed and divided once by all their labels, so that k micro-batches are one big batch
    however the labels spread over them. Only the delta is differentiated. Where a batch has a
    `strength` (b,) or (b, K), each row trains the adapters of a bank that it says (`lora_jax.bank`).
    """

    def step(state: State, params: Any, batch: dict[str, Array]) -> State:
        trainable, fixed = partition(state.delta)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss_of(trainable: Any, key: Array, micro: dict[str, Array]) -> tuple[Array, Array]:
            adapted = method.apply(params, rejoin(trainable, fixed), key=key, **_strength(micro))
            return objective.loss(adapted, micro, key)

        def add(sums: Any, micro: dict[str, Array]) -> tuple[Any, None]:
            number, total = sums[0], sums[1:]
            (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(
                trainable, jax.random.fold_in(key, number), micro
            )
            total = jax.tree.map(jnp.add, total, (loss, count, grads))
            return (number + 1, *total), None

        zero = jnp.zeros((), jnp.float32)
        sums = (jnp.zeros((), jnp.int32), zero, zero, jax.tree.map(jnp.zeros_like, trainable))
        if batch["tokens"].shape[0] == 1:
            sums, _ = add(sums, jax.tree.map(lambda x: x[0], batch))
        else:
            sums, _ = jax.lax.scan(add, sums, batch)
        _, loss, count, grads = sums
        grads = jax.tree.map(lambda g: (g / jnp.maximum(count, 1)).astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, optimizer = tx.update(grads, state.optimizer, trainable)
            new_rate = rate(state.step)
        delta = rejoin(optax.apply_updates(trainable, updates), fixed)
        metrics = _metrics(state, loss, count, batch, optax.tree.norm(grads), new_rate)
        return State(state.step + 1, delta, optimizer, state.key, metrics)

    return step


def _strength(batch: dict[str, Array]) -> dict[str, Array]:
    return {"strength": batch["strength"]} if "strength" in batch else {}


def _metrics(state: State, loss: Array, count: Array, batch: dict[str, Array], norm: Array, rate: Any) -> Array:
    old = dict(zip(METRICS, state.metrics, strict=True))
    mask = batch["mask"]
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    number = (state.step + 1).astype(jnp.float32)
    bad = jnp.where(finite, jnp.zeros_like(number), number)
    new = {
        "loss": old["loss"] + loss,
        "labels": old["labels"] + count,
        "tokens": old["tokens"] + mask.size,
        "real_tokens": old["real_tokens"] + jnp.sum(mask, dtype=jnp.float32),
        "gradient_norm": norm,
        "learning_rate": rate,
        "bad_step": jnp.where(old["bad_step"] > 0, old["bad_step"], bad),
    }
    return jnp.stack([jnp.asarray(new[name], jnp.float32) for name in METRICS])


def make_validation(
    objective: Objective, method: ParamTransform | None
) -> Callable[[Array, Delta, Any, dict[str, Array]], tuple[Array, Array | None]]:
    """`validate(sums, delta, params, batch) -> (sums, outputs)`: (2,) float32, to which the batch's loss (no smoothing,
    no dropout) and count are added, and the outputs where the objective has metrics. Without a method: of the base."""

    def validate(sums: Array, delta: Delta, params: Any, batch: dict[str, Array]) -> tuple[Array, Array | None]:
        adapted = params if method is None else method.apply(params, delta, **_strength(batch))
        loss, count, outputs = objective.validation(adapted, batch)
        return sums + jnp.stack([loss, count]), outputs

    return validate
