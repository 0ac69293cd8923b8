"""A sweep: K runs on one base as one compiled step, each as if it had trained alone.

Members may differ in learning rate, weight decay, alpha, rank and seed. Factors of a smaller rank are padded with zeros
to the largest: zero columns of A beside zero rows of B have gradients of exactly zero, which Adam and decay leave so,
and no mask is needed. The state of all members is one checkpoint of the sweep's workdir; at the end each member has a
folder there with its adapter, its checkpoint and its metrics, a workdir as any other.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import checkpoints
from lora_jax.core.transforms import ParamTransform, from_spec, traits_of, without_tuned
from lora_jax.data.batches import Schedule
from lora_jax.distributed import processes
from lora_jax.distributed.sharding import Rules, make_mesh, shardings
from lora_jax.training import loop
from lora_jax.training import step as steps
from lora_jax.training.feeding import Put, putter, seen, validation_putter
from lora_jax.training.logging import Log, plot_loss
from lora_jax.training.meter import Labels, Meter, fetch
from lora_jax.training.objectives import Objective
from lora_jax.training.optimizers import optimizer, schedule
from lora_jax.training.workdir import claim

_RATES = ("learning_rate", "weight_decay")


class Member(NamedTuple):
    """A run of a sweep, as `prepare` takes it: what `prepare` of a run of its own would get.

    Attributes:
      name: its folder in the sweep's workdir.
      config: of a run of its own.
      params: the base, with the head that its seed draws where there is a new one.
      batches: the schedule of its seed; the members' differ in nothing else.
    """

    name: str
    config: Any
    method: ParamTransform
    params: Any
    batches: Schedule


class Sweep(NamedTuple):
    """A sweep made ready by `prepare`. States and values have a leading axis of K members."""

    config: Any
    workdir: Path
    members: tuple[Member, ...]
    shapes: list[steps.State]  # of each member's state, unpadded
    base: dict[str, str]
    params: Any
    values: dict[str, Array]
    states: steps.State
    start: int
    total: int
    step: Callable[[steps.State, dict[str, Array], Any, Any], steps.State]
    validate: Callable[[steps.State], list[dict[str, float] | None]] | None
    put: Put


def prepare(
    config: Any,
    workdir: str | Path,
    members: Sequence[Member],
    *,
    base: dict[str, str],
    objective: Objective,
    validation: Schedule | None = None,
    mesh: Mesh | None = None,
    rules: Rules = loop.EVERYWHERE,
    together: bool | None = None,
) -> Sweep:
    """A sweep in this workdir, from its start or from its newest good checkpoint.

    Args:
      config: of the sweep, kept in the workdir; else as `loop.prepare`'s.
      together: whether the members' products are computed at once (`jax.vmap`), or one member after the other
        (`jax.lax.map`). None: at once, but on a CPU one after the other.

    Raises:
      ValueError: the workdir holds another config's sweep or another base's, or the members differ in what cannot be
        swept.
    """
    workdir = Path(workdir).absolute()
    claim(workdir, config)
    for member in members:
        claim(workdir / member.name, member.config)
    mesh = make_mesh({}) if mesh is None else mesh
    processes.check_mesh(mesh)
    first = members[0]
    total = first.config.steps or first.config.epochs * len(first.batches)
    spec, values = _common([member.method.spec for member in members])
    for name in _RATES:
        found = [member.config.optimizer[name] for member in members]
        values |= {name: jnp.asarray(found, jnp.float32)} if len(set(found)) > 1 else {}

    def one(state: steps.State, values: dict[str, Array], params: Any, batch: Any) -> steps.State:
        options, own = first.config.optimizer, {name: values[name] for name in _RATES if name in values}
        rate = schedule(options, total, own.pop("learning_rate", None))
        tx = optimizer(options, rate, **own, spec=spec)
        return steps.make_step(objective, from_spec(_filled(spec, values)), tx, rate)(state, params, batch)

    def measure(sums: Array, state: steps.State, values: dict[str, Array], params: Any, batch: Any) -> Any:
        return steps.make_validation(objective, from_spec(_filled(spec, values)))(sums, state.delta, params, batch)

    together = jax.default_backend() != "cpu" if together is None else together
    apart = len({member.batches.seed for member in members}) > 1
    put, held = putter(mesh, first.batches, first.config.accumulate, len(members) if apart else None)
    states, shapes = _states(workdir, members, base, NamedSharding(mesh, P()))
    params = without_tuned(first.params, states.delta)
    params = processes.place(params, shardings(params, mesh, rules))
    values = processes.place(values, NamedSharding(mesh, P()))
    step = _over_members(one, (0, 0, None, 0 if apart else None), together)
    sweep = Sweep(
        config=config,
        workdir=workdir,
        members=tuple(m._replace(params=None, batches=replace(m.batches, held=held.held)) for m in members),
        shapes=shapes,
        base=base,
        params=params,
        values=values,
        states=states,
        start=int(states.step[0]),
        total=total,
        step=jax.jit(step, donate_argnums=0, out_shardings=loop.where(states)),
        validate=None,
        put=put,
    )
    if validation is None:
        return sweep
    measured = jax.jit(_over_members(measure, (0, 0, 0, None, None), together))
    return sweep._replace(validate=_validator(sweep, measured, objective, validation, mesh))


def _over_members(function: Callable, axes: tuple[int | None, ...], together: bool) -> Callable:
    """The function for all members at once, or for one after the other, of arguments with these axes."""
    if together:
        return jax.vmap(function, in_axes=axes)

    def mapped(*arguments: Any) -> Any:
        own = [x for x, axis in zip(arguments, axes, strict=True) if axis == 0]

        def call(own: list[Any]) -> Any:
            rest = iter(own)
            return function(*(next(rest) if axis == 0 else x for x, axis in zip(arguments, axes, strict=True)))

        return jax.lax.map(call, own)

    return mapped


def _states(
    workdir: Path, members: Sequence[Member], base: dict[str, str], place: NamedSharding
) -> tuple[steps.State, list[steps.State]]:
    """The states of all members, stacked, new or of the newest good checkpoint; and the shapes of each."""
    tx = optimizer(members[0].config.optimizer, optax.constant_schedule(0.0), spec=members[0].method.spec)
    dtype = members[0].config.get("model", {}).get("dtype", "float32")
    starts: dict[str, Callable] = {}  # members that differ in the seed alone share a compiled start
    for member in members:

        def start(params: Any, key: Array, method: ParamTransform = member.method) -> steps.State:
            return steps.new_state(method, tx, params, key, dtype=dtype)

        starts.setdefault(json.dumps(member.method.spec), jax.jit(start))
    calls = [
        (starts[json.dumps(member.method.spec)], member.params, jax.random.key(member.config.seed))
        for member in members
    ]
    shapes = [jax.eval_shape(start, params, key) for start, params, key in calls]
    largest = jax.tree.map(lambda *xs: tuple(map(max, zip(*(x.shape for x in xs), strict=True))), *shapes)
    if processes.by_first(lambda: checkpoints.latest_step(workdir)) is not None:

        def stacked(x: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((len(members), *shape), x.dtype, sharding=place)

        return checkpoints.restore(workdir, jax.tree.map(stacked, shapes[0], largest), base=base), shapes

    def padded(x: Array, shape: tuple[int, ...]) -> Array:
        edges = [(0, most - size, 0) for size, most in zip(x.shape, shape, strict=True)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)

    states = [jax.tree.map(padded, start(params, key), largest) for start, params, key in calls]
    return processes.place(jax.tree.map(lambda *xs: jnp.stack(xs), *states), place), shapes


def _member(sweep: Sweep, states: Any, number: int, shapes: Any) -> Any:
    """A member's part of a stacked tree, without padding."""
    return jax.tree.map(lambda x, own: x[number][tuple(slice(0, n) for n in own.shape)], states, shapes)


def train(sweep: Sweep) -> list[loop.Result | None] | None:
    """Trains to the end, or to SIGTERM; leaves metrics, a checkpoint and an adapter in each member's folder.

    Returns: the result of each member, None for one whose loss or gradient was not finite; None where SIGTERM ended it
      (all is saved).

    Raises:
      ValueError: a batch has no labels, or every member diverged.
      OSError: the workdir cannot be written; names the newest checkpoint that is whole.
    """
    config, states, done = sweep.config, sweep.states, sweep.start
    epoch_steps = len(sweep.members[0].batches)
    labels = Labels(sweep.workdir, epoch_steps, done)
    with contextlib.ExitStack() as stack:
        stack.enter_context(loop.written(sweep.workdir))
        stopping = stack.enter_context(loop.sigterm())
        manager = stack.enter_context(checkpoints.opened(sweep.workdir, keep=config.keep))
        entries = [stack.enter_context(Log(sweep.workdir / member.name, done)) for member in sweep.members]
        bar = stack.enter_context(loop.progress(done, sweep.total))
        checkpoints.forget_after(manager, done)
        meter = Meter(entries, bar, epoch_steps, states)
        for done, batch in enumerate(_batches(sweep, labels), sweep.start + 1):
            states = sweep.step(states, sweep.values, sweep.params, sweep.put(batch))
            bar.update()
            stop = stopping(done)
            epoch_ends = done == sweep.total or done % epoch_steps == 0
            logs = done == sweep.total or loop.due(done, config.log_every)
            measures = epoch_ends or loop.due(done, config.eval_every)
            saves = stop or epoch_ends or loop.due(done, config.save_every)
            if logs or measures or saves:
                labels.check()
            if logs:
                states = meter.write(done, states)
                if len(meter.bad) == len(sweep.members):
                    raise ValueError(f"every member of {sweep.workdir} diverged: {meter.bad}")
            if sweep.validate and measures:
                with meter.paused(states):
                    _record(sweep, entries, meter, done, states)
            if saves:
                with meter.paused(states):
                    _save(sweep, manager, done, states)
            if stop:
                break
    return _finish(sweep, states) if done == sweep.total else None


def _record(sweep: Sweep, logs: list[Log], meter: Meter, done: int, states: steps.State) -> None:
    assert sweep.validate is not None
    for number, found in enumerate(sweep.validate(states)):
        member = sweep.members[number]
        if found is None:
            continue
        delta = _member(sweep, states.delta, number, sweep.shapes[number].delta)
        folder = sweep.workdir / member.name
        loop.record(member.config, folder, member.method, sweep.base, logs[number], done, found, delta)
        meter.say(f"step {done}, {member.name}: {loop.shown(found)}")


def _save(sweep: Sweep, manager: Any, done: int, states: steps.State) -> None:
    spec = {"method": "sweep", "of": [member.method.spec for member in sweep.members]}
    position = divmod(done, len(sweep.members[0].batches))
    checkpoints.save(manager, done, states, spec=spec, base=sweep.base, position=position)


def _finish(sweep: Sweep, states: steps.State) -> list[loop.Result | None]:
    """Each member's folder as the workdir of a run of its own."""
    results: list[loop.Result | None] = []
    for number, (member, metrics) in enumerate(zip(sweep.members, fetch(states), strict=True)):
        folder = sweep.workdir / member.name
        plot_loss(folder)
        if metrics["bad_step"]:
            results.append(None)
            continue
        state = _member(sweep, states, number, sweep.shapes[number])
        if processes.by_first(partial(checkpoints.latest_step, folder)) != sweep.total:
            with checkpoints.opened(folder) as manager:
                position = divmod(sweep.total, len(member.batches))
                spec = member.method.spec
                checkpoints.save(manager, sweep.total, state, spec=spec, base=sweep.base, position=position)
        if not member.config.get("best"):  # else the best is there already
            checkpoints.save_adapter(folder / "adapter", member.method, state.delta, sweep.base)
        results.append(loop.Result(state.delta, sweep.total, True))
    return results


def _batches(sweep: Sweep, labels: Labels) -> Any:
    """The batches from the sweep's start to its end: one for all members, or where their seeds differ one for each,
    stacked and padded to the longest."""
    schedules = [member.batches for member in sweep.members]
    if len({each.seed for each in schedules}) == 1:
        yield from loop.batches(schedules[0], sweep.start, sweep.total, labels)
        return
    epoch_steps = len(schedules[0])
    for done in range(sweep.start, sweep.total):
        epoch, index = divmod(done, epoch_steps)
        if done == sweep.start or index == 0:
            orders = [each(epoch) for each in schedules]
        bucket = max(order.bucket_of[index] for order in orders)  # the lengths ascend
        own = [order.padded(index, bucket) for order in orders]
        batch = {name: np.stack([batch[name] for batch in own]) for name in own[0]}
        labels.note(batch)
        yield batch


def _validator(
    sweep: Sweep, measure: Callable, objective: Objective, validation: Schedule, mesh: Mesh
) -> Callable[[steps.State], list[dict[str, float] | None]]:
    """The members' figures of all of validation; None for one whose loss is not finite."""
    put, validation = validation_putter(mesh, validation)

    def validate(states: steps.State) -> list[dict[str, float] | None]:
        sums = processes.place(np.zeros((len(sweep.members), 2), np.float32), NamedSharding(mesh, P()))
        outputs = []
        for batch in validation(0):
            placed = put(batch)
            sums, output = measure(sums, states, sweep.values, sweep.params, placed)
            outputs.append(seen(output, batch, placed))
        per_member = jax.device_get(sums)
        outputs = jax.device_get(outputs)
        return [
            loop.figures(
                objective, own, [(None if output is None else output[number], batch) for output, batch in outputs]
            )
            for number, own in enumerate(per_member)
        ]

    return validate


# --- what differs ---------------------------------------------------------------------------------


def _common(specs: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The spec of all members, of the largest rank, and what `_filled` puts into it: `{"N/alpha": (K,)}` of part N."""
    parts = [spec["of"] if spec["method"] == "chain" else [spec] for spec in specs]
    common, values = [], {}
    for number, own in enumerate(zip(*parts, strict=True)):
        first = own[0]
        different = {name for name in first if any(spec.get(name) != first[name] for spec in own)}
        if wrong := different - {"alpha", "rank"}:
            raise ValueError(f"members of a sweep differ in {first['method']}'s {sorted(wrong)[0]!r}")
        merged = dict(first)
        if "rank" in different:
            at_rank = traits_of(first)[0][1].at_rank
            if at_rank is None:
                raise ValueError(f"the rank of {first['method']!r} cannot be swept: its traits have no at_rank")
            merged["rank"] = max(spec["rank"] for spec in own)
            own = tuple(at_rank(spec, merged["rank"]) for spec in own)
        if different and "alpha" in first:
            alphas = [spec["rank"] if spec["alpha"] is None else spec["alpha"] for spec in own]
            values[f"{number}/alpha"] = jnp.asarray(alphas, jnp.float32)
        common.append(merged)
    return (specs[0] | {"of": common} if specs[0]["method"] == "chain" else common[0]), values


def _filled(spec: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The spec with a member's own values."""
    parts = [dict(part) for part in (spec["of"] if spec["method"] == "chain" else [spec])]
    for name, value in values.items():
        number, _, option = name.partition("/")
        if option:
            parts[int(number)][option] = value
    return spec | {"of": parts} if spec["method"] == "chain" else parts[0]
