"""What a model is trained for: how a batch becomes outputs, and outputs a loss."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.core.arrays import map_adapted
from lora_jax.core.lifting.interpreter import lift
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.transforms import stable_hash
from lora_jax.training.loss import chunked_loss, cross_entropy, squared_error


class Forward(Protocol):
    """Outputs of a batch from parameters, plain or adapted; with a key the model's own dropout acts."""

    def __call__(self, params: Any, batch: dict[str, Array], key: Array | None = None) -> Array: ...


class Objective(NamedTuple):
    """What `make_step` and validation need to know of a task.

    Attributes:
      forward: (params, batch, key=None) -> outputs.
      loss: (params, batch, key=None) -> (sum, count), two float32 scalars, in training.
      validation: (params, batch) -> (sum, count, outputs), which smooths nothing; the outputs only where there are
        metrics.
      metrics: (outputs of all validation, their labels) -> {name: value}, where there is more than the loss to tell.
    """

    forward: Forward
    loss: Callable[..., tuple[Array, Array]]
    validation: Callable[[Any, dict[str, Array]], tuple[Array, Array, Array | None]]
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None


# The logits of a batch are made and used up in so many pieces, of so many tokens at least: of 8 x 128 tokens and 50,257
# words, pieces of 256 take 0.88 s with gradients, of 64 1.16 s, the whole 1.05 s (412 MB of temporary memory, not 103).
PIECES, LEAST = 8, 256


def language_model(model: Any, smoothing: float = 0.0) -> Objective:
    """Next tokens of a GPT-2: logits (b, n, vocabulary) of labelled positions, which the loss has in pieces."""
    apply = lift(model.apply)

    def inputs(batch: dict[str, Array]) -> dict[str, Array]:
        names = {"tokens", "mask", "labelled", "positions", "segments"}
        return {name: x for name, x in batch.items() if name in names}

    def forward(params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
        return apply({"params": params}, **inputs(batch))

    def loss(
        params: Any, batch: dict[str, Array], key: Array | None = None, smoothing: float = smoothing
    ) -> tuple[Array, Array]:
        def of(top: Any, x: Array, labels: Array, weights: Array) -> Array:
            return cross_entropy(apply({"params": top}, x, method="head"), labels, weights, smoothing)[0]

        x = apply({"params": params}, **inputs(batch), method="hidden")
        name = "wte" if model.config.tie else "lm_head"
        top = map_adapted(lambda w: w.ready(), {name: untapped(params)[0][name]})
        drops = any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(top))  # once for all x
        pieces = 1 if drops else min(PIECES, x.shape[0] * x.shape[1] // LEAST)
        weights = batch["weights"].astype(jnp.float32)
        return chunked_loss(of, top, x, batch["labels"], weights, pieces=pieces), jnp.sum(weights)

    return Objective(forward, loss, lambda params, batch: (*loss(params, batch, smoothing=0.0), None))


def classifier(model: Any, metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None) -> Objective:
    """One label a text: cross-entropy of logits (b, labels), or of a regression head the squared error."""
    apply = lift(model.apply)
    config = model.config
    drops = config.dropout > 0 or config.attention_dropout > 0

    def forward(params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
        rngs = {}
        if drops and key is not None:
            rngs["rngs"] = {"dropout": jax.random.fold_in(key, stable_hash("the model's dropout"))}
        return apply({"params": params}, batch["tokens"], batch["mask"], batch["token_types"], **rngs)

    def loss_of(outputs: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
        if config.head == "regression":
            return squared_error(outputs[..., 0], batch["labels"], batch["weights"])
        return cross_entropy(outputs, batch["labels"], batch["weights"])

    def loss(params: Any, batch: dict[str, Array], key: Array | None = None) -> tuple[Array, Array]:
        return loss_of(forward(params, batch, key), batch)

    def validation(params: Any, batch: dict[str, Array]) -> tuple[Array, Array, Array | None]:
        outputs = forward(params, batch)
        return *loss_of(outputs, batch), outputs if metrics else None

    return Objective(forward, loss, validation, metrics)
