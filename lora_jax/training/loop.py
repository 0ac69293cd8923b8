"""The training loop: batches to a delta, resumable at any step.

Nothing in it waits for the device: metrics are summed there and fetched once a logging interval.
"""

import contextlib
import itertools
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from lora_jax import checkpoints
from lora_jax.core.transforms import Delta, ParamTransform, from_spec, without_tuned
from lora_jax.data.batches import Batch, Schedule
from lora_jax.distributed import processes
from lora_jax.distributed.sharding import Rules, make_mesh, shardings
from lora_jax.training import step as steps
from lora_jax.training.feeding import Put, putter, seen, validation_putter
from lora_jax.training.logging import Log, plot_loss
from lora_jax.training.meter import Labels, Meter, check
from lora_jax.training.objectives import Objective, language_model
from lora_jax.training.optimizers import optimizer, schedule
from lora_jax.training.workdir import claim, difference

_ASKED = itertools.count(1)
EVERYWHERE: Rules = {"**": P()}


class Job(NamedTuple):
    """A run made ready by `prepare`."""

    config: Any
    workdir: Path
    method: ParamTransform
    base: dict[str, str]
    params: Any  # without the leaves that the delta holds
    state: steps.State  # new, or of the newest checkpoint; `train` uses it up
    start: int  # its step
    total: int
    batches: Schedule
    step: Callable[[steps.State, Any, Any], steps.State]
    validate: Callable[[Delta], dict[str, float]] | None
    put: Put


class Result(NamedTuple):
    """What `train` returns; not `finished` where SIGTERM ended it (all is saved)."""

    delta: Delta
    step: int
    finished: bool


def prepare(
    config: Any,
    workdir: str | Path,
    *,
    method: ParamTransform,
    model: Any,
    params: Any,
    base: dict[str, str],
    batches: Schedule,
    validation: Schedule | None = None,
    objective: Objective | None = None,
    known: Mapping[str, Any] = {},
    mesh: Mesh | None = None,
    rules: Rules = EVERYWHERE,
) -> Job:
    """A run of this config in this workdir, from its start or from its newest good checkpoint.

    Drop the params afterwards: the job has all that it needs, each tuned leaf once. With several processes
    (`jax.distributed`) all of them call this with the same arguments; the workdir is one that all see.

    Args:
      config: a ConfigDict with `seed`, `epochs`, `steps`, `label_smoothing` (without an objective), `accumulate`,
        `log_every`, `eval_every`, `save_every`, `keep` and `optimizer` (configs/e2e.py); where it
        has `best`, the delta with the highest validation metric of that name is kept in adapter/.
      workdir: created where it does not exist.
      method: what trains.
      model: a GPT-2 of `lora_jax.models`; with an objective any. Where its `config.dtype` is float16, the loss is
        scaled.
      params: the base.
      base: its `checkpoints.identity`.
      batches, validation: schedules of `lora_jax.data`.
      objective: what the model is trained for; a language model without it.
      known: entries of the delta that start from given values, not anew.
      mesh, rules: of `lora_jax.sharding`; one device without.

    Raises:
      ValueError: the workdir holds another config's run or another base's or method's, no checkpoint
        of it is good, the batch does not divide over micro-batches and devices, or a process has no
        device on the mesh.
    """
    workdir = Path(workdir).absolute()
    claim(workdir, config)
    mesh = make_mesh({}) if mesh is None else mesh
    processes.check_mesh(mesh)
    total = config.steps or config.epochs * len(batches)
    rate = schedule(config.optimizer, total)
    tx = optimizer(config.optimizer, rate, spec=method.spec)
    params = processes.place(params, shardings(params, mesh, rules))
    put, batches = putter(mesh, batches, config.accumulate)
    dtype = getattr(getattr(model, "config", None), "dtype", "float32")

    def start(params: Any) -> steps.State:
        return steps.new_state(method, tx, params, jax.random.key(config.seed), known, dtype=dtype)

    state = _state(workdir, method, start, params, base, mesh, rules)
    params = without_tuned(params, state.delta)
    objective = objective or language_model(model, config.label_smoothing)
    step = steps.make_step(objective, method, tx, rate)
    return Job(
        config=config,
        workdir=workdir,
        method=method,
        base=base,
        params=params,
        state=state,
        start=int(state.step),
        total=total,
        batches=batches,
        step=jax.jit(step, donate_argnums=0, out_shardings=where(state)),
        validate=_validator(objective, method, params, validation, mesh) if validation is not None else None,
        put=put,
    )


def where(state: Any) -> Any:
    """The shardings of a state, in which a step leaves it: else the compiler chooses others, and compiles again."""
    return jax.tree.map(lambda x: x.sharding, state)


def _state(
    workdir: Path,
    method: ParamTransform,
    start: Callable[[Any], steps.State],
    params: Any,
    base: dict[str, str],
    mesh: Mesh,
    rules: Rules,
) -> steps.State:
    """The newest good checkpoint, or where there is none the start; placed on the mesh."""
    shapes = jax.eval_shape(start, params)
    adapted = jax.eval_shape(method.apply, params, shapes.delta)
    places = steps.state_shardings(shapes, mesh, rules, adapted)
    if processes.by_first(lambda: checkpoints.latest_step(workdir)) is None:
        return jax.jit(start, out_shardings=places)(params)

    def placed(x: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    state = checkpoints.restore(workdir, jax.tree.map(placed, shapes, places), base=base)
    spec = checkpoints.meta_of(workdir)["spec"]
    same = json.dumps(spec) == json.dumps(method.spec)  # also of a method that no name makes again
    if not same and (
        found := difference(from_spec(spec).apply(params, state.delta), method.apply(params, state.delta))
    ):
        raise ValueError(f"{workdir} holds the delta of another method than the config's: {found}")
    return state


def train(job: Job) -> Result:
    """Trains to the end, or to SIGTERM, and leaves metrics, checkpoints and loss.png in the workdir.

    Raises:
      ValueError: a batch has no labels, or loss or gradient are not finite; names the step. The
        checkpoints before it stay.
      OSError: the workdir cannot be written; names the newest checkpoint that is whole.
    """
    config, state, done = job.config, job.state, job.start
    if done == job.total:  # launched again
        plot_loss(job.workdir)
        return Result(state.delta, done, True)
    epoch_steps = len(job.batches)
    labels = Labels(job.workdir, epoch_steps, done)
    with (
        written(job.workdir),
        sigterm() as stopping,
        checkpoints.opened(job.workdir, keep=config.keep) as manager,
        Log(job.workdir, done) as log,
        progress(done, job.total) as bar,
    ):
        checkpoints.forget_after(manager, done)
        meter = Meter([log], bar, epoch_steps, state)
        for done, batch in enumerate(batches(job.batches, job.start, job.total, labels), job.start + 1):
            state = job.step(state, job.params, job.put(batch))
            bar.update()
            stop, last = stopping(done), done == job.total
            epoch_ends = last or done % epoch_steps == 0
            logs = last or due(done, config.log_every)
            measures = epoch_ends or due(done, config.eval_every)
            saves = stop or epoch_ends or due(done, config.save_every)
            if logs or measures or saves:
                labels.check()
            if logs:
                state = meter.write(done, state)
                if meter.bad:
                    check(state, job.workdir)
            if job.validate and measures:
                with meter.paused(state):
                    found = job.validate(state.delta)
                    record(config, job.workdir, job.method, job.base, log, done, found, state.delta)
                    meter.say(f"step {done}: {shown(found)}")
            if saves:
                with meter.paused(state):
                    _save(job, manager, done, state)
            if stop:
                break
    plot_loss(job.workdir)
    return Result(state.delta, done, done == job.total)


def record(
    config: Any,
    workdir: Path,
    method: ParamTransform,
    base: dict[str, str],
    log: Log,
    done: int,
    found: dict[str, float],
    delta: Delta,
) -> None:
    """Logs validation's loss and metrics, and keeps the delta in adapter/ where it is the best so far."""
    name = config.get("best")
    if name and name not in found:
        raise ValueError(f"best={name!r} is no metric of validation: it has {', '.join(found)}")
    if name and processes.by_first(lambda: bool(found[name] > log.highest(name))):
        checkpoints.save_adapter(workdir / "adapter", method, delta, base)
    log.write(done, **found)


def shown(found: dict[str, float]) -> str:
    """Validation's figures in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())


def due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def batches(schedule: Schedule, start: int, total: int, labels: Labels) -> Iterator[Batch]:
    """The batches of the steps from start to total."""
    for done in range(start, total):
        epoch, index = divmod(done, len(schedule))
        if done == start or index == 0:
            order = schedule(epoch)
        batch = order[index]
        labels.note(batch)
        yield batch


def _save(job: Job, manager: ocp.CheckpointManager, done: int, state: steps.State) -> None:
    check(state, job.workdir)
    checkpoints.save(
        manager,
        done,
        state,
        spec=job.method.spec,
        base=job.base,
        position=divmod(done, len(job.batches)),
    )


@contextlib.contextmanager
def written(workdir: Path) -> Iterator[None]:
    """What fails inside because a file cannot be written (the disk is full) says what of the run is whole."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # says so already
            raise
        checkpoints.raise_unwritten(workdir, error)


def progress(done: int, total: int) -> tqdm:
    """The bar of a run, shown by the first process."""
    return tqdm(total=total, initial=done, unit="step", mininterval=1.0, disable=not processes.first())


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[int], bool]]:
    """`stopping(step)`, to be asked after each step: whether the run has been told to end. Of several processes one may
    have been told: then it is true for all of them, after the same step."""
    if jax.distributed.is_initialized():  # its preemption service takes the signal
        # It wants numbers that grow as long as the process lives, whichever run a step is of, and from one asker: the
        # stop is planned for the step after the largest last number (`checkpoints.manager` keeps orbax from asking).
        yield lambda step: multihost_utils.reached_preemption_sync_point(next(_ASKED))
        return
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # no signals arrive elsewhere
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def validate(
    objective: Objective,
    params: Any,
    validation: Schedule,
    *,
    mesh: Mesh | None = None,
    rules: Rules = EVERYWHERE,
) -> dict[str, float]:
    """Loss and metrics of parameters that do not train (a frozen base): see `Job.validate`."""
    mesh = make_mesh({}) if mesh is None else mesh
    processes.check_mesh(mesh)
    params = processes.place(params, shardings(params, mesh, rules))
    return _validator(objective, None, params, validation, mesh)(Delta())


def _validator(
    objective: Objective,
    method: ParamTransform | None,
    params: Any,
    validation: Schedule,
    mesh: Mesh,
) -> Callable[[Delta], dict[str, float]]:
    """`delta -> {"validation_loss": nats per label, ...}` and the objective's metrics, over all of validation: every
    label weighs the same, without smoothing or dropout."""
    validate = jax.jit(steps.make_validation(objective, method))
    put, validation = validation_putter(mesh, validation)

    def measure(delta: Delta) -> dict[str, float]:
        sums = processes.place(np.zeros(2, np.float32), NamedSharding(mesh, P()))
        outputs = []
        for batch in validation(0):
            placed = put(batch)
            sums, output = validate(sums, delta, params, placed)
            outputs.append(seen(output, batch, placed))
        found = figures(objective, jax.device_get(sums), jax.device_get(outputs))
        if found is None:
            raise ValueError("the validation loss is not finite")
        return found

    return measure


def figures(
    objective: Objective, sums: np.ndarray, outputs: Sequence[tuple[np.ndarray | None, Batch]]
) -> dict[str, float] | None:
    """Validation's loss and metrics of what `make_validation` gave for all batches; None where it is not finite."""
    total, count = sums.tolist()
    if not count:
        raise ValueError("the validation data have no labels")
    if not math.isfinite(total):
        return None
    found = {"validation_loss": total / count}
    if objective.metrics:
        predicted = [output[batch["weights"] > 0] for output, batch in outputs if output is not None]
        labels = [batch["labels"][batch["weights"] > 0] for _, batch in outputs]
        found |= objective.metrics(np.concatenate(predicted), np.concatenate(labels))
    return found
