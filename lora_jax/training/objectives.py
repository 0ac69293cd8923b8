"""What a model is trained for: how a batch becomes outputs, and outputs a loss."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array

from lora_jax.lifting import lift
from lora_jax.training.loss import cross_entropy, squared_error
from lora_jax.transforms import stable_hash


class Forward(Protocol):
    """Outputs of a batch from parameters, plain or adapted; with a key the model's own dropout acts."""

    def __call__(self, params: Any, batch: dict[str, Array], key: Array | None = None) -> Array: ...


class Objective(NamedTuple):
    """What `make_step` and validation need to know of a task.

    Attributes:
      forward: (params, batch, key=None) -> outputs.
      loss: (outputs, batch) -> (sum, count), two float32 scalars, in training.
      validation_loss: the same in validation, which smooths nothing.
      metrics: (outputs of all validation, their labels) -> {name: value}, where there is more than the loss to tell.
    """

    forward: Forward
    loss: Callable[[Array, dict[str, Array]], tuple[Array, Array]]
    validation_loss: Callable[[Array, dict[str, Array]], tuple[Array, Array]]
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None


def language_model(model: Any, smoothing: float = 0.0) -> Objective:
    """Next tokens: logits (b, n, vocabulary) of a batch's labelled positions."""
    apply = lift(model.apply)

    def forward(params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
        packing = {name: batch[name] for name in ("positions", "segments") if name in batch}
        variables = {"params": params}
        return apply(variables, batch["tokens"], batch["mask"], labelled=batch["labelled"], **packing)

    def loss(logits: Array, batch: dict[str, Array], smoothing: float = smoothing) -> tuple[Array, Array]:
        return cross_entropy(logits, batch["labels"], batch["weights"], smoothing)

    return Objective(forward, loss, lambda logits, batch: loss(logits, batch, 0.0))


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

    def loss(outputs: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
        if config.head == "regression":
            return squared_error(outputs[..., 0], batch["labels"], batch["weights"])
        return cross_entropy(outputs, batch["labels"], batch["weights"])

    return Objective(forward, loss, loss, metrics)
