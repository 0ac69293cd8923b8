"""The losses of the paper's tasks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int, Shaped

from lora_jax.core.arrays import scaled

Sum = Float32[Array, ""]


def cross_entropy(
    logits: Float[Array, "*positions vocabulary"],
    labels: Int[Array, "*positions"],
    weights: Float[Array, "*positions"],
    smoothing: float = 0.0,
) -> tuple[Sum, Sum]:
    """Weighted sum of the label-smoothed negative log-likelihood in nats, and the sum of the weights.

    A token costs `(1 - smoothing) * nll + smoothing * mean over the vocabulary of -log p`, as in the authors' code
    (their mean gives the gold token its share of the smoothing too), computed in float32; a weight of 0 leaves a
    position out. Sums, not a mean: micro-batches and devices add up, and the caller divides once.

    >>> loss, count = cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 1]), jnp.ones(2))
    >>> round(float(loss / count), 4)  # ln(4)
    1.3863
    """
    logits = logits.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    gold = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    expected = (1 - smoothing) * gold
    if smoothing:
        expected += smoothing * jnp.mean(logits, axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - expected
    return jnp.sum(loss * weights), jnp.sum(weights)


def squared_error(
    outputs: Float[Array, "*rows"], labels: Float[Array, "*rows"], weights: Float[Array, "*rows"]
) -> tuple[Sum, Sum]:
    """Weighted sum of the squared errors, and the sum of the weights; computed in float32.

    >>> [float(x) for x in squared_error(jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.ones(2))]
    [5.0, 2.0]
    """
    error = outputs.astype(jnp.float32) - labels.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    return jnp.sum(error * error * weights), jnp.sum(weights)


def chunked_loss(
    fn: Callable[..., Sum],
    weights: Any,
    x: Float[Array, "b n *features"],
    *along: Shaped[Array, "b n ..."],
    chunks: int,
) -> Sum:
    """The sum of `fn(weights, x, *along)` over chunks along axis 1 of x and of the arrays in `along`.

    The gradient of each chunk is formed as soon as its value is: what lies between (the logits of a cross-entropy) is
    never there for all chunks at once, in neither pass, and nothing is computed twice. It has no forward mode. With one
    chunk it is `fn`.

    Args:
      fn: gives a float32 scalar, 0 where all of `along` is 0; closes over no traced array.
      weights: a pytree; of its leaves those get a gradient that are differentiated. `along` has none.
      chunks: at most so many of equal size, the last one filled up with zeros.
    """
    if chunks <= 1 or not x.shape[1]:
        return fn(weights, x, *along)
    leaves, treedef = jax.tree.flatten(weights)
    size = -(-x.shape[1] // chunks)

    def value(leaves: list[Any], x: Array, *along: Array) -> Array:
        return fn(jax.tree.unflatten(treedef, leaves), x, *along)

    @jax.custom_vjp
    def total(leaves: list[Any], x: Array, along: tuple[Array, ...]) -> Array:
        def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
            return total + value(leaves, *chunk), None

        return lax.scan(add, jnp.zeros((), jnp.float32), _split((x, *along), size))[0]

    def forward(leaves: list[Any], x: Any, along: tuple[Any, ...]) -> tuple[Array, Any]:
        plain = [w.value for w in leaves]
        trained = {i: w.value for i, w in enumerate(leaves) if w.perturbed}

        def add(sums: Any, chunk: tuple[Array, ...]) -> tuple[Any, Array]:
            x, *along = chunk

            def chunk_value(trained: dict[int, Array], x: Array) -> Array:
                return value([trained.get(i, w) for i, w in enumerate(plain)], x, *along)

            loss, (grads, x_grad) = jax.value_and_grad(chunk_value, (0, 1))(trained, x)
            return jax.tree.map(jnp.add, sums, (loss, grads)), x_grad

        start = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained)
        (loss, grads), x_grads = lax.scan(add, start, _split((x.value, *(array.value for array in along)), size))
        x_grad = jnp.moveaxis(x_grads, 0, 1).reshape(x.value.shape[0], -1, *x.value.shape[2:])
        return loss, ([grads.get(i) for i in range(len(plain))], x_grad[:, : x.value.shape[1]])

    def backward(grads: Any, scale: Array) -> tuple[Any, Any, None]:
        return *jax.tree.map(lambda grad: scaled(grad, scale), grads), None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(leaves, x, along)


def _split(arrays: tuple[Array, ...], size: int) -> tuple[Array, ...]:
    """(b, n, ...) as (chunks, b, size, ...), filled up with zeros."""

    def split(array: Array) -> Array:
        chunks = -(-array.shape[1] // size)
        padding = [(0, chunks * size - n if axis == 1 else 0) for axis, n in enumerate(array.shape)]
        parts = jnp.pad(array, padding).reshape(array.shape[0], chunks, size, *array.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    return tuple(map(split, arrays))
