"""The losses of the paper's tasks."""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(logits: Array, labels: Array, weights: Array, smoothing: float = 0.0) -> tuple[Array, Array]:
    """Weighted sum of the label-smoothed negative log-likelihood, and the sum of the weights.

    A token costs `(1 - smoothing) * nll + smoothing * mean over the vocabulary of -log p`, as in
    the authors' code (their mean gives the gold token its share of the smoothing too). Sums, not a
    mean: micro-batches and devices add up, and the caller divides once.

    Args:
      logits: (..., vocabulary), any float dtype; computed in float32.
      labels: (...) int.
      weights: (...) float; 0 leaves a position out.
      smoothing: 0 is the plain negative log-likelihood, in nats.

    Returns: (sum, count), two float32 scalars.
    """
    logits = logits.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    gold = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    expected = (1 - smoothing) * gold
    if smoothing:
        expected += smoothing * jnp.mean(logits, axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - expected
    return jnp.sum(loss * weights), jnp.sum(weights)


def squared_error(outputs: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted sum of the squared errors, and the sum of the weights; all (...) float, computed in float32."""
    error = outputs.astype(jnp.float32) - labels.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    return jnp.sum(error * error * weights), jnp.sum(weights)
