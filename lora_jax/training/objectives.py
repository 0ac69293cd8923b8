"""What a model is trained for: how a batch becomes outputs, and outputs a loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.core.arrays import map_adapted, ready
from lora_jax.core.lifting.interpreter import lift
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.transforms import stable_hash
from lora_jax.models.family import family_of
from lora_jax.training.loss import chunked_loss, cross_entropy, squared_error


class Objective(NamedTuple):
    """What `make_step` and validation need to know of a task. An example is in `classifier`."""

    # (params, batch, key=None) -> outputs; params are plain or adapted, with a key the model's own dropout acts
    forward: Callable[..., Array]
    loss: Callable[..., tuple[Array, Array]]  # (params, batch, key=None) -> (sum, count), float32 scalars, in training
    # (params, batch, with_outputs=False) -> (sum, count, outputs), which smooths nothing. Outputs are an array with an
    # entry for each label, or None where they are not asked for: there are no metrics.
    validation: Callable[..., tuple[Array, Array, Array | None]]
    # (outputs of all validation, their labels) -> {name: value}, where there is more than the loss to tell
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None


Metric = Callable[[np.ndarray, np.ndarray], float]  # (outputs of all validation, their labels) -> a figure
_METRICS: dict[str, Metric] = {}


def register_metric(name: str, metric: Metric) -> None:
    """Makes a metric known to configs by this name (`config.metrics`).

    >>> import numpy as np
    >>> from lora_jax import training
    >>> from lora_jax.models import gpt2
    >>> training.register_metric("accuracy", lambda outputs, labels: (outputs == labels).mean())
    >>> objective = training.language_model(gpt2.GPT2(gpt2.SIZES["small"]))
    >>> training.with_metrics(objective, ["accuracy"]).metrics(np.array([1, 2]), np.array([1, 3]))  # by its name
    {'accuracy': 0.5}
    """
    _METRICS[name] = metric


def with_metrics(objective: Objective, metrics: Mapping[str, Metric] | Sequence[str]) -> Objective:
    """The objective with further metrics, given or registered, besides its own; a name that is not registered is a
    ValueError.

    >>> import numpy as np
    >>> from lora_jax import training
    >>> from lora_jax.models import gpt2
    >>> def accuracy(outputs, labels):
    ...     return (outputs == labels).mean()
    >>> objective = training.language_model(gpt2.GPT2(gpt2.SIZES["small"]))
    >>> objective = training.with_metrics(objective, {"accuracy": accuracy})
    >>> objective.metrics(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))
    {'accuracy': 0.75}
    """
    if not metrics:
        return objective
    if not isinstance(metrics, Mapping):
        if unknown := sorted(set(metrics) - set(_METRICS)):
            raise ValueError(f"no metric {unknown[0]!r} is registered (register_metric): there are {sorted(_METRICS)}")
        metrics = {name: _METRICS[name] for name in metrics}

    def all_metrics(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        first = objective.metrics(outputs, labels) if objective.metrics else {}
        return first | {name: float(metric(outputs, labels)) for name, metric in metrics.items()}

    return objective._replace(metrics=all_metrics)


# The logits of a batch are made and used up in so many chunks, of so many tokens at least: of 8 x 128 tokens and 50,257
# words, chunks of 256 take 0.88 s with gradients, of 64 1.16 s, one chunk 1.05 s (412 MB of temporary memory, not 103).
CHUNKS, LEAST = 8, 256


def language_model(model: Any, smoothing: float = 0.0) -> Objective:
    """Next tokens: logits (b, n, vocabulary) of labelled positions, which the loss has in chunks. The outputs of
    validation are the likeliest tokens, (b, n) int32.

    Raises:
      ValueError: the model's family has no `output_head`.

    An example is in `validate`.
    """
    apply, family = lift(model.apply), family_of(model)
    if (head := family.output_head) is None:
        raise ValueError(f"a {family.name} is no language model: its family has no output_head")

    def forward(params: Any, batch: dict[str, Array], key: Array | None = None, **options: Any) -> Array:
        names = {"tokens", "mask", "labelled", "positions", "segments"}
        return apply({"params": params}, **{name: x for name, x in batch.items() if name in names}, **options)

    def logits_of(top: Any, x: Array) -> Array:
        return apply({"params": top}, x, method=head.logits)

    def summed(
        params: Any, batch: dict[str, Array], smoothing: float, with_outputs: bool = False
    ) -> tuple[Array, Array, Array | None]:
        def loss_of(top: Any, x: Array, labels: Array, weights: Array) -> Array:
            return cross_entropy(logits_of(top, x), labels, weights, smoothing)[0]

        x, plain = forward(params, batch, method=head.hidden), untapped(params)[0]
        top = map_adapted(ready, {name: plain[name] for name in head.params(model.config)})
        drops = any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(top))  # once for all x
        chunks = 1 if drops else min(CHUNKS, x.shape[0] * x.shape[1] // LEAST)
        weights = batch["weights"].astype(jnp.float32)
        loss = chunked_loss(loss_of, top, x, batch["labels"], weights, chunks=chunks)
        outputs = jnp.argmax(logits_of(top, x), -1).astype(jnp.int32) if with_outputs else None
        return loss, jnp.sum(weights), outputs

    return Objective(
        forward,
        loss=lambda params, batch, key=None: summed(params, batch, smoothing)[:2],
        validation=lambda params, batch, with_outputs=False: summed(params, batch, 0.0, with_outputs),
    )


def classifier(model: Any, metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None) -> Objective:
    """One label a sequence: cross-entropy of logits (b, labels), or of a regression head the squared error.

    >>> import jax, numpy as np
    >>> from lora_jax import training
    >>> from lora_jax.models import encoder
    >>> shape = {"vocab_size": 32, "max_positions": 16, "hidden": 8, "layers": 1, "heads": 2, "inner": 16}
    >>> model = encoder.Encoder(encoder.EncoderConfig(**shape, head="classification", labels=3))
    >>> tokens = np.full((2, 4), 5, "int32")
    >>> batch = {"tokens": tokens, "mask": tokens > 0, "token_types": 0 * tokens}
    >>> batch |= {"labels": np.array([0, 2], "int32"), "weights": np.ones(2, "float32")}
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> loss, count = jax.jit(training.classifier(model).loss)(params, batch)
    >>> loss.shape, float(count)  # sums
    ((), 2.0)
    """
    apply, config = lift(model.apply), model.config
    if config.head == "regression" and config.labels != 1:
        raise ValueError(f"a regression on one number needs a head of one label, not of {config.labels}: labels=1")
    drops = any(getattr(config, name, 0) > 0 for name in ("dropout", "attention_dropout"))
    further = family_of(model).classifier_inputs

    def forward(params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
        rngs = {}
        if drops and key is not None:
            rngs["rngs"] = {"dropout": jax.random.fold_in(key, stable_hash("the model's dropout"))}
        return apply({"params": params}, batch["tokens"], batch["mask"], *(batch[name] for name in further), **rngs)

    def loss_of(outputs: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
        if config.head == "regression":
            return squared_error(outputs[..., 0], batch["labels"], batch["weights"])
        return cross_entropy(outputs, batch["labels"], batch["weights"])

    def loss(params: Any, batch: dict[str, Array], key: Array | None = None) -> tuple[Array, Array]:
        return loss_of(forward(params, batch, key), batch)

    def validation(
        params: Any, batch: dict[str, Array], with_outputs: bool = False
    ) -> tuple[Array, Array, Array | None]:
        outputs = forward(params, batch)
        return *loss_of(outputs, batch), outputs if with_outputs else None

    return Objective(forward, loss, validation, metrics)
