"""The training loop: batches to a delta, resumable at any step; of one run, or of a sweep's in one program.

Nothing in it waits for the device: metrics are summed there and fetched once a logging interval.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from lora_jax import checkpoints
from lora_jax.core.transforms import Delta, ParamTransform, from_spec
from lora_jax.data.batches import Batch, Schedule, Stacked
from lora_jax.distributed import processes
from lora_jax.distributed.sharding import Placement
from lora_jax.methods.tune import without_tuned
from lora_jax.training import locks, stopping
from lora_jax.training import step as steps
from lora_jax.training.config import TrainConfig
from lora_jax.training.finite import not_finite
from lora_jax.training.logging import LabelCount, Log, Logger, Meter, Prefixed, fetch, plot_loss
from lora_jax.training.objectives import Objective, language_model, with_metrics
from lora_jax.training.optimizers import check_decay, optimizer, schedule, trained
from lora_jax.training.validation import Figures, validator
from lora_jax.training.workdir import check_resumed, claim, data_of, difference


class Member(NamedTuple):
    """A run, alone or of a sweep."""

    name: str  # of its folder in the workdir of a sweep; "" of a run alone
    config: Any  # a TrainConfig, or a ConfigDict with its keys and others besides
    method: ParamTransform  # what trains
    params: Any  # the base, with the head that its seed draws where there is a new one; None in a job
    batches: Schedule  # of its seed, in which alone those of a sweep's members differ


class Job(NamedTuple):
    """A run, or a sweep of several, made ready by `prepare` or `sweep.prepare`. An example is in `train`."""

    settings: TrainConfig  # of the loop
    workdir: Path  # with the checkpoints
    members: tuple[Member, ...]  # the run, or those of the sweep
    base: dict[str, Any]  # the base's `checkpoints.identity`
    params: Any  # the base, without the leaves that the delta holds
    state: steps.State  # new, or of the newest checkpoint; of a sweep stacked and padded. `drive` uses it up
    start: int  # the steps done
    total: int  # the steps of the run
    batches: Schedule | Stacked  # `batches(epoch)[i]` is one for `step`, once `put` has placed it
    step: Callable[[steps.State, Any, Any], steps.State]  # (state, params, batch) -> state
    validate: Callable[[steps.State], Sequence[Figures | None]] | None  # of each run, None where its loss is not finite
    put: Callable[[Batch], dict[str, jax.Array]]  # places a batch
    data: Mapping[str, Any] = {}  # of `workdir.data_of`
    shapes: tuple[steps.State, ...] | None = None  # of a sweep: each run's state without leading axis and padding
    loggers: tuple[Logger, ...] = ()  # written to besides the files

    def __repr__(self) -> str:
        return f"Job({self.workdir}, step {self.start} of {self.total}, {self.method})"

    @property
    def method(self) -> ParamTransform:
        """What trains, in the first member."""
        return self.members[0].method

    def part(self, state: steps.State, number: int) -> steps.State:
        """One run's part of the state, without padding."""
        if self.shapes is None:
            return state
        shapes = self.shapes[number]
        return jax.tree.map(lambda x, like: x[number][tuple(slice(0, n) for n in like.shape)], state, shapes)


class Result(NamedTuple):
    """What `train` returns; not `finished` where a signal ended it (`training.stopping`; all is saved).

    An example is in `train`.
    """

    delta: Delta
    step: int
    finished: bool


@locks.holding(keep=True, check=TrainConfig.of)
def prepare(
    config: Any,
    workdir: str | Path,
    *,
    method: ParamTransform,
    model: Any,
    params: Any,
    base: dict[str, Any],
    batches: Schedule,
    validation: Schedule | None = None,
    objective: Objective | None = None,
    initial: Mapping[str, Any] = {},
    placement: Placement | None = None,
    loggers: Sequence[Logger] = (),
) -> Job:
    """A run of this config in this workdir, from its start or from its newest good checkpoint. No other process writes
    the workdir until the run was trained or this process ends.

    Drop the params afterwards: the job has all that it needs, each tuned leaf once. With several processes
    (`jax.distributed`) all of them call this with the same arguments, and a workdir that all of them can write.

    Args:
      config: a TrainConfig, or a ConfigDict with its keys and others besides.
      model: a GPT-2 of `lora_jax.models`; with an objective any. In float16 (`config.dtype`) the loss is scaled.
      params, base: the base and its `checkpoints.identity`.
      objective: what the model is trained for; a language model without it.
      initial: entries of the delta that start from given values, not anew.
      placement: the mesh and the rules for it; one device without.
      loggers: written to besides metrics.jsonl and TensorBoard's events; the caller closes them.

    Raises:
      ValueError: another process writes the workdir, it holds another config's run or another base's, data's or
        method's, no checkpoint of it is good, the batch does not divide over micro-batches and devices, or a process
        has no device on the mesh.

    An example is in `train`.
    """
    workdir, settings = Path(workdir).expanduser().absolute(), TrainConfig.of(config)
    claim(workdir, config)
    placement = placement or Placement.one_device()
    processes.check_mesh(placement.mesh)
    total = settings.steps or settings.epochs * len(batches)
    rate = schedule(settings.optimizer, total)
    tx = optimizer(settings.optimizer, rate, spec=method.spec)
    params = processes.place(params, placement.shardings(params))
    put, held = processes.batch_placer(placement.mesh, batches.batch_size, settings.accumulate)
    batches = dataclasses.replace(batches, held=held)
    dtype = getattr(getattr(model, "config", None), "dtype", "float32")

    def start(params: Any) -> steps.State:
        return steps.new_state(method, tx, params, jax.random.key(settings.seed), initial, dtype=dtype)

    data = processes.on_primary(partial(data_of, batches, validation, initial))
    state, meta = _state(workdir, method, start, params, base, placement)
    check_resumed(workdir, meta.get("data", {}), data, int(state.step), total)
    check_decay(settings.optimizer, state.delta)
    claim(workdir, config, compared=True)
    params = without_tuned(params, state.delta)
    objective = with_metrics(objective or language_model(model, settings.label_smoothing), settings.metrics)
    validate = None
    if validation is not None:
        of_delta = validator(jax.jit(steps.make_validation(objective, method)), objective, validation, placement)
        validate = lambda state: of_delta(state.delta, params)  # noqa: E731
    step = steps.make_step(objective, trained(settings.optimizer, method), tx, rate)
    shardings = jax.tree.map(lambda x: x.sharding, state)  # else the compiler chooses others, and compiles again
    return Job(
        settings=settings,
        workdir=workdir,
        members=(Member("", config, method, None, batches),),
        base=base,
        params=params,
        state=state,
        start=int(state.step),
        total=total,
        batches=batches,
        step=jax.jit(step, donate_argnums=0, out_shardings=shardings),
        validate=validate,
        put=put,
        data=data,
        loggers=tuple(loggers),
    )


def _state(
    workdir: Path, method: ParamTransform, start: Callable, params: Any, base: dict[str, Any], placement: Placement
) -> tuple[steps.State, Mapping[str, Any]]:
    """The newest good checkpoint and its metadata, or where there is none the start and {}; placed on the mesh."""
    shapes = jax.eval_shape(start, params)
    adapted = jax.eval_shape(method.apply, params, shapes.delta)
    state_shardings = steps.state_shardings(shapes, placement, adapted)
    if processes.on_primary(lambda: checkpoints.latest_step(workdir)) is None:
        return jax.jit(start, out_shardings=state_shardings)(params), {}
    like = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, state_shardings)
    state = checkpoints.restore(workdir, like, base=base)
    meta = checkpoints.meta_of(workdir)
    spec = meta["spec"]
    if json.dumps(spec) != json.dumps(method.spec):  # equal also of a method that no name makes again
        then, now = from_spec(spec).apply(params, state.delta), method.apply(params, state.delta)
        if other := difference(then, now):
            raise ValueError(f"{workdir} holds the delta of another method than the config's: {other}")
    return state, meta


def train(job: Job) -> Result:
    """Trains a run to the end, or until a signal stops it, and leaves metrics, checkpoints and loss.png in the workdir,
    which other processes may write from then on.

    Raises:
      ValueError: a batch has no labels, or loss, gradient or delta are not finite; names the step. What is saved stays.
      OSError: the workdir cannot be written; names the newest complete checkpoint.

    >>> import tempfile, jax, numpy as np, lora_jax as lj
    >>> from lora_jax import checkpoints, training
    >>> from lora_jax.data.batches import packed
    >>> from lora_jax.models import gpt2
    >>> model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    >>> params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 4), "int32"))["params"]
    >>> method = lj.lora(lj.select("**/attn/*/kernel"), rank=2)
    >>> batches = packed(np.arange(128, dtype=np.int32) % 32, batch_size=4, length=16, eos=0)
    >>> parts = {"model": model, "params": params, "base": checkpoints.identity(params, "random weights")}
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     job = training.prepare(training.TrainConfig(steps=4), workdir, method=method, batches=batches, **parts)
    ...     result = training.train(job)
    ...     run = checkpoints.load(workdir)
    >>> result.step, result.finished, run.step
    (4, True, 4)
    """
    with locks.locked(job.workdir), stopping.noted():
        state, done = drive(job)
        plot_loss(job.workdir)
    return Result(state.delta, done, done == job.total)


def drive(job: Job) -> tuple[steps.State, int]:
    """The loop, of a run or of a sweep, in a block of `stopping.noted`: the state at the end, or at a signal, and the
    steps done. All is saved.

    Raises: as `train`; of a sweep a ValueError where every run diverged.
    """
    settings, state, done = job.settings, job.state, job.start
    if done == job.total:  # launched again
        return _checked(job, state, done), done
    if stopping.requested():  # stopped before
        return state, done
    epoch_steps = len(job.batches)
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints.opened(job.workdir, keep=settings.max_to_keep))
        logs = [stack.enter_context(_log(job, member)) for member in job.members]
        hidden = not processes.is_primary()
        bar = stack.enter_context(tqdm(total=job.total, initial=done, unit="step", mininterval=1.0, disable=hidden))
        checkpoints.forget_after(manager, done)
        labels, meter = LabelCount(job.workdir, epoch_steps, done), Meter(logs, bar, epoch_steps, state)
        for done, batch in enumerate(_batches(job, labels), job.start + 1):
            state = job.step(state, job.params, job.put(batch))
            bar.update()
            stop = stopping.after_step()
            epoch_ends = done == job.total or done % epoch_steps == 0
            logs_now = done == job.total or done % settings.log_every == 0
            validates = epoch_ends or done % (settings.eval_every or job.total) == 0
            saves = stop or epoch_ends or done % (settings.save_every or job.total) == 0
            if logs_now or validates or saves:
                labels.check()
            if logs_now:
                state = meter.write(done, state)
                if len(meter.bad) == len(job.members):
                    _check_finite(job, state)
            if validates or saves:
                with meter.paused(state):
                    state = _checked(job, state, done)
            if job.validate and validates:
                with meter.paused(state):
                    _validate(job, job.validate(state), logs, meter, done, state)
            if saves:
                with meter.paused(state):
                    specs = [member.method.spec for member in job.members]
                    spec = specs[0] if job.shapes is None else {"method": "sweep", "of": specs}
                    position = divmod(done, epoch_steps)
                    parts: dict[str, Any] = {"spec": spec, "base": job.base, "position": position, "data": job.data}
                    checkpoints.save(manager, done, state, **parts)
            if stop:
                break
    return state, done


def _log(job: Job, member: Member) -> Log:
    loggers = [Prefixed(logger, f"{member.name}/") for logger in job.loggers] if member.name else job.loggers
    workdir, best = job.workdir / member.name, TrainConfig.of(member.config).best
    file = workdir / "metrics.jsonl"
    if job.start and not processes.on_primary(file.exists):
        problem = f"{file} is missing, though {job.start} steps are done"
        if best:
            raise ValueError(f"{problem}: which {best} is the best so far is in it. Put it back, or begin anew")
        logging.warning("%s: it begins anew", problem)
    return Log(workdir, job.start, loggers)


def _batches(job: Job, labels: LabelCount) -> Iterator[Batch]:
    """The batches of the steps from the job's start to its end."""
    for done in range(job.start, job.total):
        epoch, index = divmod(done, len(job.batches))
        if done == job.start or index == 0:
            order = job.batches(epoch)
        batch = order[index]
        labels.note(batch)
        yield batch


def _validate(
    job: Job, figures: Sequence[Figures | None], logs: Sequence[Log], meter: Meter, done: int, state: steps.State
) -> None:
    """Logs validation's loss and metrics, and keeps a delta in adapter/ where it is the best so far."""
    if not any(figures):
        raise ValueError("the validation loss is not finite")
    diverged = [metrics["bad_step"] > 0 for metrics in fetch(state)]
    for number, (member, log, values) in enumerate(zip(job.members, logs, figures, strict=True)):
        if values is None or diverged[number]:
            continue
        best = TrainConfig.of(member.config).best
        if best and best not in values:
            raise ValueError(f"best={best!r} is no metric of validation: it has {', '.join(values)}")
        if best and processes.on_primary(partial(bool, values[best] > log.highest(best))):
            delta = job.part(state, number).delta
            checkpoints.save_adapter(job.workdir / member.name / "adapter", member.method, delta, job.base)
        log.write(done, **values)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        meter.say(f"step {done}{', ' if member.name else ''}{member.name}: {shown}")


def _checked(job: Job, state: steps.State, done: int) -> steps.State:
    """The state, before something of it is kept: a run whose delta is not finite had a bad step, as one whose loss was
    not; a ValueError where every run had one."""
    factors = not_finite(state.delta, members=job.shapes is not None)
    metrics = np.array(jax.device_get(state.metrics))
    bad_steps = np.atleast_2d(metrics)[:, steps.METRICS.index("bad_step")]
    if late := {number: name for number, name in factors.items() if not bad_steps[number]}:
        bad_steps[list(late)] = done
        state = state._replace(metrics=processes.place(metrics, state.metrics.sharding))
    _check_finite(job, state, late)
    return state


def _check_finite(job: Job, state: steps.State, factors: Mapping[int, str] = {}) -> None:
    """A ValueError where every run had a bad step: of loss or gradient, or by the `factors` of its delta that are not
    finite, {run: name}; what is saved stays."""
    bad = {number: int(metrics["bad_step"]) for number, metrics in enumerate(fetch(state))}
    if not all(bad.values()):
        return
    if job.shapes is not None:
        raise ValueError(f"every member of {job.workdir} diverged: {bad}")
    what = f"the delta is not finite ({factors[0]})" if factors else "the loss or its gradient is not finite"
    raise ValueError(f"step {bad[0]}: {what}; the checkpoints from before stay in {job.workdir}")
