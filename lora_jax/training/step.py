"""One training step, and one of validation: pure functions for `jax.jit`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale
from jax import Array
from jaxtyping import Float32, Int32, UInt32

from lora_jax.core.freezing import combine, partition
from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.distributed.sharding import Placement
from lora_jax.training.objectives import Objective

# What steps add up on the device until the metrics are fetched: the sums of losses, labels, tokens computed and tokens
# that are not padding, the newest gradient norm and learning rate, and the first step with a non-finite loss or
# gradient (0: none).
METRICS = ("loss", "labels", "tokens", "real_tokens", "gradient_norm", "learning_rate", "bad_step")
Sums = Float32[Array, " 2"]  # of losses, and of weights


class State(NamedTuple):
    """All that a run needs to resume; every leaf is a device array. An example is in `make_step`."""

    step: Int32[Array, ""]  # the steps done; the position in the data follows from it
    delta: Delta  # float32
    optimizer: Any  # the state of the optimizer, for the trainable half of the delta
    key: UInt32[Array, " 2"]  # the data of the run's key; step i draws from `fold_in(key, i)`
    metrics: Float32[Array, " 7"]  # see METRICS
    # In float16, whose gradients would vanish else: what the loss is multiplied by (Micikevicius et al. 2018, arXiv
    # 1710.03740). A step that overflows halves it and changes nothing else. None: no scaling.
    scaler: DynamicScale | None = None


def new_state(
    method: ParamTransform,
    tx: optax.GradientTransformation,
    params: Any,
    key: Array,
    initial: Mapping[str, Any] = {},
    *,
    dtype: Any = jnp.float32,
) -> State:
    """The state before the first step. `initial` are entries of the delta that start where another run ended; `dtype`
    is the model's: in float16 the loss is scaled.

    An example is in `make_step`.
    """
    for_init, for_steps = jax.random.split(key)
    delta = Delta({**method.init(for_init, params), **initial})
    half = jnp.dtype(dtype) == jnp.float16
    return State(
        step=jnp.zeros((), jnp.int32),
        delta=delta,
        optimizer=tx.init(partition(delta)[0]),
        key=jax.random.key_data(for_steps),
        metrics=jnp.zeros(len(METRICS), jnp.float32),
        # Losses are sums over hundreds of labels: the usual 2^16 of means would overflow in the first steps.
        scaler=DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(2**10)) if half else None,
    )


def state_shardings(state: State, placement: Placement, adapted: Any) -> State:
    """Where a state lies: delta and optimizer by `sharding.shardings`, the rest on every device.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lj
    >>> from lora_jax import sharding, training
    >>> params, method = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> state = training.new_state(method, optax.sgd(0.1), params, jax.random.key(0))
    >>> placement = sharding.Placement.one_device()
    >>> shardings = training.state_shardings(state, placement, method.apply(params, state.delta))
    >>> jax.device_put(state, shardings).step.sharding == placement.replicated
    True
    """
    delta, optimizer = placement.shardings((state.delta, state.optimizer), adapted)
    return jax.tree.map(lambda _: placement.replicated, state)._replace(delta=delta, optimizer=optimizer)


def make_step(
    objective: Objective, method: ParamTransform, tx: optax.GradientTransformation, rate: optax.Schedule
) -> Callable[[State, Any, dict[str, Array]], State]:
    """`step(state, params, batch) -> state`.

    Each array of the batch is (k, b, ...): k micro-batches of b rows. Their losses and gradients are summed and divided
    once by all their labels, so that k micro-batches are one big batch however the labels spread over them. Only the
    delta is differentiated. Where a batch has a `strength` (b,) or (b, K), each row trains those adapters of a bank
    that it selects (`lora_jax.bank`).

    >>> import jax, numpy as np, optax, lora_jax as lj
    >>> from lora_jax import training
    >>> from lora_jax.data.batches import packed
    >>> from lora_jax.models import gpt2
    >>> model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    >>> params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 4), "int32"))["params"]
    >>> method, rate = lj.lora(lj.select("**/attn/*/kernel"), rank=2), optax.constant_schedule(0.1)
    >>> state = training.new_state(method, optax.sgd(rate), params, jax.random.key(1))
    >>> step = jax.jit(training.make_step(training.language_model(model), method, optax.sgd(rate), rate))
    >>> for batch in packed(np.arange(128, dtype=np.int32) % 32, batch_size=4, length=16, eos=0)(epoch=0):
    ...     state = step(state, params, {name: x[None] for name, x in batch.items()})  # one micro-batch each
    >>> int(state.step), float(state.metrics[training.METRICS.index("labels")])
    (2, 127.0)
    """

    def step(state: State, params: Any, batch: dict[str, Array]) -> State:
        trainable, fixed = partition(state.delta)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss_of(trainable: Any, key: Array, micro: dict[str, Array]) -> tuple[Array, Array]:
            adapted = method.apply(params, combine(trainable, fixed), key=key, **_strength(micro))
            return objective.loss(adapted, micro, key)

        scaler, finite, loss, count, grads = _summed(loss_of, trainable, batch, key, state.scaler)
        grads = jax.tree.map(lambda g: (g / jnp.maximum(count, 1)).astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, optimizer = tx.update(grads, state.optimizer, trainable)
            new_rate = rate(state.step)
        norm, new = optax.tree.norm(grads), optax.apply_updates(trainable, updates)
        if scaler is None:
            finite = jnp.isfinite(norm)
        else:  # a step that overflowed is left out
            old = trainable, state.optimizer, state.metrics[METRICS.index("gradient_norm")]
            new, optimizer, norm = jax.tree.map(lambda x, y: jnp.where(finite, x, y), (new, optimizer, norm), old)
            finite |= scaler.scale >= 1  # else it is not the scale that overflows
        metrics = dict(zip(METRICS, state.metrics, strict=True))
        finite = jnp.isfinite(loss) & finite
        number = (state.step + 1).astype(jnp.float32)
        bad = jnp.where(finite, jnp.zeros_like(number), number)
        metrics |= {
            "loss": metrics["loss"] + loss,
            "labels": metrics["labels"] + count,
            "tokens": metrics["tokens"] + batch["mask"].size,
            "real_tokens": metrics["real_tokens"] + jnp.sum(batch["mask"], dtype=jnp.float32),
            "gradient_norm": norm,
            "learning_rate": new_rate,
            "bad_step": jnp.where(metrics["bad_step"] > 0, metrics["bad_step"], bad),
        }
        summed = jnp.stack([jnp.asarray(metrics[name], jnp.float32) for name in METRICS])
        return State(state.step + 1, combine(new, fixed), optimizer, state.key, summed, scaler)

    return step


def _summed(
    loss_of: Callable, trainable: Any, batch: dict[str, Array], key: Array, scaler: DynamicScale | None
) -> tuple[DynamicScale | None, Any, Array, Array, Any]:
    """Over the micro-batches of a batch: scaler, whether all gradients were finite (where there is a scaler), and the
    sums of losses, counts and gradients."""

    def add(sums: Any, micro: dict[str, Array]) -> tuple[Any, None]:
        number, scaler, finite, *total = sums
        arguments = trainable, jax.random.fold_in(key, number), micro
        if scaler is None:
            (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(*arguments)
        else:
            scaler, ok, (loss, count), grads = scaler.value_and_grad(loss_of, has_aux=True)(*arguments)
            finite &= ok
        total = jax.tree.map(jnp.add, total, [loss, count, grads])
        return (number + 1, scaler, finite, *total), None

    zero = jnp.zeros((), jnp.float32)
    finite = None if scaler is None else jnp.array(True)
    sums = (jnp.zeros((), jnp.int32), scaler, finite, zero, zero, jax.tree.map(jnp.zeros_like, trainable))
    if batch["tokens"].shape[0] == 1:
        return add(sums, jax.tree.map(lambda x: x[0], batch))[0][1:]
    return jax.lax.scan(add, sums, batch)[0][1:]


def _strength(batch: dict[str, Array]) -> dict[str, Array]:
    return {"strength": batch["strength"]} if "strength" in batch else {}


def make_validation(
    objective: Objective, method: ParamTransform | None
) -> Callable[[Sums, Delta, Any, dict[str, Array]], tuple[Sums, Array | None]]:
    """`validate(sums, delta, params, batch) -> (sums, outputs)`: the sums, to which the batch's loss (no smoothing,
    no dropout) and count are added, and the outputs where the objective has metrics. Without a method: of the base."""

    def validate(sums: Sums, delta: Delta, params: Any, batch: dict[str, Array]) -> tuple[Sums, Array | None]:
        adapted = params if method is None else method.apply(params, delta, **_strength(batch))
        loss, count, outputs = objective.validation(adapted, batch, objective.metrics is not None)
        return sums + jnp.stack([loss, count]), outputs

    return validate
