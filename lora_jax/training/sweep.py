"""A sweep: K runs on one base as one compiled step, each as if it had trained alone.

Members may differ in learning rate, weight decay, alpha, rank and seed. Factors of a smaller rank are padded with zeros
to the largest: zero columns of A beside zero rows of B have gradients of exactly zero, which Adam and decay leave so,
and no mask is needed. The state of all members is one checkpoint of the sweep's workdir; at the end each member has a
folder there with its adapter, its checkpoint and its metrics, a workdir as any other.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding

from lora_jax import checkpoints
from lora_jax.core.transforms import ParamTransform, from_spec, traits_of, without_tuned
from lora_jax.data.batches import Schedule, Stacked
from lora_jax.distributed import processes
from lora_jax.distributed.sharding import Placement
from lora_jax.training import step as steps
from lora_jax.training.config import TrainConfig
from lora_jax.training.feeding import batch_placer
from lora_jax.training.logging import Logger, plot_loss
from lora_jax.training.loop import Job, Member, Result, drive, shardings_of
from lora_jax.training.meter import fetch
from lora_jax.training.objectives import Objective, with_metrics
from lora_jax.training.optimizers import optimizer, schedule
from lora_jax.training.validation import validator
from lora_jax.training.workdir import claim

_RATES = ("learning_rate", "weight_decay")


def prepare(
    config: Any,
    workdir: str | Path,
    members: Sequence[Member],
    *,
    base: dict[str, str],
    objective: Objective,
    validation: Schedule | None = None,
    placement: Placement | None = None,
    dtype: Any = "float32",
    together: bool | None = None,
    loggers: Sequence[Logger] = (),
) -> Job:
    """A sweep in this workdir, from its start or from its newest good checkpoint.

    Args:
      config: of the sweep, kept in the workdir; else as `loop.prepare`'s.
      members: each with what `loop.prepare` of a run of its own would get.
      dtype: the model's; in float16 the losses are scaled.
      together: whether the members' products are computed at once (`jax.vmap`), or one member after the other
        (`jax.lax.map`). None: at once, but on a CPU one after the other.
      loggers: written to besides the files of each member, whose name stands before the names of its entries.

    Raises:
      ValueError: the workdir holds another config's sweep or another base's, or the members differ in what cannot be
        swept.
    """
    workdir = Path(workdir).absolute()
    claim(workdir, config)
    for member in members:
        claim(workdir / member.name, member.config)
    placement = placement or Placement.one_device()
    processes.check_mesh(placement.mesh)
    settings = [TrainConfig.of(member.config) for member in members]
    options, batches = settings[0].optimizer, members[0].batches
    objective = with_metrics(objective, settings[0].metrics)
    total = settings[0].steps or settings[0].epochs * len(batches)
    spec, values = _common([member.method.spec for member in members])
    for name in _RATES:
        rates = [getattr(each.optimizer, name) for each in settings]
        values |= {name: jnp.asarray(rates, jnp.float32)} if len(set(rates)) > 1 else {}

    def step_one(state: steps.State, values: dict[str, Array], params: Any, batch: Any) -> steps.State:
        rates = {name: values[name] for name in _RATES if name in values}
        rate = schedule(options, total, rates.pop("learning_rate", None))
        tx = optimizer(options, rate, **rates, spec=spec)
        return steps.make_step(objective, from_spec(_filled(spec, values)), tx, rate)(state, params, batch)

    def measure_one(sums: Array, state: steps.State, values: dict[str, Array], params: Any, batch: Any) -> Any:
        return steps.make_validation(objective, from_spec(_filled(spec, values)))(sums, state.delta, params, batch)

    together = jax.default_backend() != "cpu" if together is None else together
    apart = len({member.batches.seed for member in members}) > 1
    put, held = batch_placer(placement.mesh, batches, settings[0].accumulate, len(members) if apart else None)
    schedules = tuple(replace(member.batches, held=held.held) for member in members)
    states, shapes = _states(workdir, members, settings, base, placement.replicated, dtype)
    params = without_tuned(members[0].params, states.delta)
    params = processes.place(params, placement.shardings(params))
    values = processes.place(values, placement.replicated)
    stepped = _over_members(step_one, (0, 0, None, 0 if apart else None), together)
    step = jax.jit(stepped, donate_argnums=0, out_shardings=shardings_of(states))
    validate = None
    if validation is not None:
        measured = jax.jit(_over_members(measure_one, (0, 0, 0, None, None), together))
        of_states = validator(measured, objective, validation, placement, len(members))
        validate = lambda states: of_states(states, values, params)  # noqa: E731
    return Job(
        settings=TrainConfig.of(config),
        workdir=workdir,
        members=tuple(
            member._replace(params=None, batches=batches) for member, batches in zip(members, schedules, strict=True)
        ),
        base=base,
        params=params,
        state=states,
        start=int(states.step[0]),
        total=total,
        batches=Stacked(schedules) if apart else schedules[0],
        step=lambda states, params, batch: step(states, values, params, batch),
        validate=validate,
        put=put,
        shapes=tuple(shapes),
        loggers=tuple(loggers),
    )


def train(sweep: Job) -> list[Result | None] | None:
    """Trains to the end, or to SIGTERM; leaves metrics, a checkpoint and an adapter in each member's folder.

    Returns: the result of each member, None for one whose loss or gradient was not finite; None where SIGTERM ended it
      (all is saved).

    Raises:
      ValueError: a batch has no labels, or every member diverged.
      OSError: the workdir cannot be written; names the newest complete checkpoint.
    """
    states, done = drive(sweep)
    return _finish(sweep, states) if done == sweep.total else None


def _finish(sweep: Job, states: steps.State) -> list[Result | None]:
    """Each member's folder as the workdir of a run of its own."""
    results: list[Result | None] = []
    for number, (member, metrics) in enumerate(zip(sweep.members, fetch(states), strict=True)):
        folder = sweep.workdir / member.name
        plot_loss(folder)
        if metrics["bad_step"]:
            results.append(None)
            continue
        state = sweep.part(states, number)
        if processes.on_primary(partial(checkpoints.latest_step, folder)) != sweep.total:
            with checkpoints.opened(folder) as manager:
                position = divmod(sweep.total, len(member.batches))
                spec = member.method.spec
                checkpoints.save(manager, sweep.total, state, spec=spec, base=sweep.base, position=position)
        if not TrainConfig.of(member.config).best:  # else the best is there already
            checkpoints.save_adapter(folder / "adapter", member.method, state.delta, sweep.base)
        results.append(Result(state.delta, sweep.total, True))
    return results


def _over_members(function: Callable, axes: tuple[int | None, ...], together: bool) -> Callable:
    """The function for all members at once, or for one after the other, of arguments with these axes."""
    if together:
        return jax.vmap(function, in_axes=axes)

    def mapped(*arguments: Any) -> Any:
        stacked = [x for x, axis in zip(arguments, axes, strict=True) if axis == 0]

        def call(of_member: list[Any]) -> Any:
            rest = iter(of_member)
            return function(*(next(rest) if axis == 0 else x for x, axis in zip(arguments, axes, strict=True)))

        return jax.lax.map(call, stacked)

    return mapped


def _states(
    workdir: Path,
    members: Sequence[Member],
    settings: Sequence[TrainConfig],
    base: dict[str, str],
    place: NamedSharding,
    dtype: Any,
) -> tuple[steps.State, list[steps.State]]:
    """The states of all members, stacked, new or of the newest good checkpoint; and the shapes of each."""
    tx = optimizer(settings[0].optimizer, optax.constant_schedule(0.0), spec=members[0].method.spec)
    starts: dict[str, Callable] = {}  # members that differ in the seed alone share a compiled start
    for member in members:

        def start(params: Any, key: Array, method: ParamTransform = member.method) -> steps.State:
            return steps.new_state(method, tx, params, key, dtype=dtype)

        starts.setdefault(json.dumps(member.method.spec), jax.jit(start))
    calls = [
        (starts[json.dumps(member.method.spec)], member.params, jax.random.key(each.seed))
        for member, each in zip(members, settings, strict=True)
    ]
    shapes = [jax.eval_shape(start, params, key) for start, params, key in calls]
    largest = jax.tree.map(lambda *xs: tuple(map(max, zip(*(x.shape for x in xs), strict=True))), *shapes)
    if processes.on_primary(lambda: checkpoints.latest_step(workdir)) is not None:

        def stacked(x: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((len(members), *shape), x.dtype, sharding=place)

        return checkpoints.restore(workdir, jax.tree.map(stacked, shapes[0], largest), base=base), shapes

    def padded(x: Array, shape: tuple[int, ...]) -> Array:
        edges = [(0, most - size, 0) for size, most in zip(x.shape, shape, strict=True)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)

    states = [jax.tree.map(padded, start(params, key), largest) for start, params, key in calls]
    return processes.place(jax.tree.map(lambda *xs: jnp.stack(xs), *states), place), shapes


# --- what differs ---------------------------------------------------------------------------------


def _common(specs: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The spec of all members, of the largest rank, and what `_filled` puts into it: `{"N/alpha": (K,)}` of part N."""
    parts = [spec["of"] if spec["method"] == "chain" else [spec] for spec in specs]
    common, values = [], {}
    for number, of_members in enumerate(zip(*parts, strict=True)):
        first = of_members[0]
        different = {name for name in first if any(spec.get(name) != first[name] for spec in of_members)}
        if wrong := different - {"alpha", "rank"}:
            raise ValueError(f"members of a sweep differ in {first['method']}'s {sorted(wrong)[0]!r}")
        merged = dict(first)
        if "rank" in different:
            at_rank = traits_of(first)[0][1].at_rank
            if at_rank is None:
                raise ValueError(f"the rank of {first['method']!r} cannot be swept: its traits have no at_rank")
            merged["rank"] = max(spec["rank"] for spec in of_members)
            of_members = tuple(at_rank(spec, merged["rank"]) for spec in of_members)
        if different and "alpha" in first:
            alphas = [spec["rank"] if spec["alpha"] is None else spec["alpha"] for spec in of_members]
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
