"""Validation: loss and metrics of parameters over all batches of a schedule."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.transforms import Delta
from lora_jax.data.batches import Batch, Schedule
from lora_jax.distributed import processes
from lora_jax.distributed.sharding import Placement
from lora_jax.training.objectives import Objective
from lora_jax.training.step import make_validation

Figures = dict[str, float]  # {"validation_loss": nats per label, ...} and the objective's metrics


def validate(objective: Objective, params: Any, validation: Schedule, *, placement: Placement | None = None) -> Figures:
    """Loss and metrics of parameters, plain or adapted, that do not train, on one device without a placement. Every
    label weighs the same, without smoothing or dropout.

    Raises:
      ValueError: the loss is not finite, or no batch has labels.

    >>> import math, jax, numpy as np
    >>> from lora_jax import training
    >>> from lora_jax.data.batches import packed
    >>> from lora_jax.models import gpt2
    >>> model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    >>> params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 4), "int32"))["params"]
    >>> batches = packed(np.arange(128, dtype=np.int32) % 32, batch_size=4, length=16, eos=0)
    >>> loss = training.validate(training.language_model(model), params, batches)["validation_loss"]
    >>> abs(loss - math.log(32)) < 0.1  # random weights: a guess among 32 tokens
    True
    """
    placement = placement or Placement.one_device()
    processes.check_mesh(placement.mesh)
    params = processes.place(params, placement.shardings(params))
    measure = jax.jit(make_validation(objective, None))
    (values,) = validator(measure, objective, validation, placement)(Delta(), params)
    if values is None:
        raise ValueError("the validation loss is not finite")
    return values


def validator(
    measure: Callable, objective: Objective, validation: Schedule, placement: Placement, members: int | None = None
) -> Callable[..., list[Figures | None]]:
    """`validate(*arguments)`: the figures of each run over all of validation, None where its loss is not finite.
    `measure(sums, *arguments, batch) -> (sums, outputs)` is what `make_validation` gives, compiled; of several members
    sums and outputs have a leading axis."""
    put, held = processes.batch_placer(placement.mesh, validation.batch_size)
    schedule = dataclasses.replace(validation, held=held)

    def validate(*arguments: Any) -> list[Figures | None]:
        shape = (2,) if members is None else (members, 2)
        sums = processes.place(np.zeros(shape, np.float32), placement.replicated)
        outputs = []
        for batch in schedule(0):
            placed = put(batch)
            sums, output = measure(sums, *arguments, placed)
            if output is not None and jax.process_count() > 1:  # metrics need the rows of other processes too
                output, batch = processes.replicate((output, {n: placed[n] for n in ("labels", "weights")}))
            outputs.append((output, batch))
        sums, outputs = jax.device_get(sums), jax.device_get(outputs)
        if members is None:
            return [figures(objective, sums, outputs)]
        by_member = [[(None if x is None else x[number], batch) for x, batch in outputs] for number in range(members)]
        return [figures(objective, *of_member) for of_member in zip(sums, by_member, strict=True)]

    return validate


def figures(
    objective: Objective, sums: np.ndarray, outputs: Sequence[tuple[np.ndarray | None, Batch]]
) -> Figures | None:
    """Loss and metrics of what `make_validation` gave for all batches; None where the loss is not finite."""
    total, count = sums.tolist()
    if not count:
        raise ValueError("the validation data have no labels")
    if not math.isfinite(total):
        return None
    values = {"validation_loss": total / count}
    if objective.metrics:
        predicted = [output[batch["weights"] > 0] for output, batch in outputs if output is not None]
        labels = [batch["labels"][batch["weights"] > 0] for _, batch in outputs]
        values |= objective.metrics(np.concatenate(predicted), np.concatenate(labels))
    return values
