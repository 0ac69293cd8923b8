"""A sweep: K runs on one base as one compiled step, each as if it had trained alone.

Members may differ in learning rate, weight decay, alpha, rank and seed. Factors of a smaller rank are padded with zeros
to the largest: zero columns of A beside zero rows of B have gradients of exactly zero, which Adam and decay leave so,
and no mask is needed. The state of all members is one checkpoint of the sweep's workdir; at the end each member has a
folder there with its adapter, its checkpoint and its metrics, a workdir as any other.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lora_jax import checkpoints
from lora_jax.core.transforms import from_spec, traits_of
from lora_jax.data.batches import Schedule, Stacked
from lora_jax.distributed import processes
from lora_jax.distributed.sharding import Placement
from lora_jax.methods.tune import without_tuned
from lora_jax.training import locks, stopping
from lora_jax.training import step as steps
from lora_jax.training.config import OptimizerConfig, TrainConfig
from lora_jax.training.logging import Logger, fetch, plot_loss
from lora_jax.training.loop import Job, Member, Result, drive
from lora_jax.training.objectives import Objective, with_metrics
from lora_jax.training.optimizers import check_decay, optimizer, schedule, trained
from lora_jax.training.validation import validator
from lora_jax.training.workdir import check_resumed, claim, data_of

_RATES = ("learning_rate", "weight_decay")


@locks.holding(keep=True, check=lambda _, members: [TrainConfig.of(member.config) for member in members])
def prepare(
    config: Any,
    workdir: str | Path,
    members: Sequence[Member],
    *,
    base: dict[str, Any],
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
      ValueError: another process writes the workdir, it holds another config's sweep or another base's, or the members
        differ in what cannot be swept.
    """
    workdir, of_loop = Path(workdir).expanduser().absolute(), TrainConfig.of(config)
    settings = [TrainConfig.of(member.config) for member in members]
    _claim(workdir, config, members)
    placement = placement or Placement.one_device()
    processes.check_mesh(placement.mesh)
    total = settings[0].steps or settings[0].epochs * len(members[0].batches)
    objective = with_metrics(objective, settings[0].metrics)
    spec, values = _common([member.method.spec for member in members])
    for name in _RATES:
        rates = [getattr(of_member.optimizer, name) for of_member in settings]
        values |= {name: jnp.asarray(rates, jnp.float32)} if len(set(rates)) > 1 else {}
    apart = len({member.batches.seed for member in members}) > 1
    size, micro = members[0].batches.batch_size, settings[0].accumulate
    put, held = processes.batch_placer(placement.mesh, size, micro, len(members) if apart else None)
    schedules = tuple(dataclasses.replace(member.batches, held=held) for member in members)
    data = processes.on_primary(partial(data_of, members[0].batches, validation))
    states, shapes, meta = _states(workdir, members, base, placement.replicated, dtype)
    check_resumed(workdir, meta.get("data", {}), data, int(states.step[0]), total)
    check_decay(settings[0].optimizer, states.delta)
    _claim(workdir, config, members, compared=True)
    params = without_tuned(members[0].params, states.delta)
    params = processes.place(params, placement.shardings(params))
    values = processes.place(values, placement.replicated)
    together = jax.default_backend() != "cpu" if together is None else together
    step_one, measure_one = _of_member(objective, settings[0].optimizer, total, spec)
    step = _over_members(step_one, (0, 0, None, 0 if apart else None), together)
    step = jax.jit(step, donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, states))
    validate = None
    if validation is not None:
        measure = jax.jit(_over_members(measure_one, (0, 0, 0, None, None), together))
        of_states = validator(measure, objective, validation, placement, len(members))
        validate = lambda states: of_states(states, values, params)  # noqa: E731
    kept = [member._replace(params=None, batches=batches) for member, batches in zip(members, schedules, strict=True)]
    return Job(
        settings=of_loop,
        workdir=workdir,
        members=tuple(kept),
        base=base,
        params=params,
        state=states,
        start=int(states.step[0]),
        total=total,
        batches=Stacked(schedules) if apart else schedules[0],
        step=lambda states, params, batch: step(states, values, params, batch),
        validate=validate,
        put=put,
        data=data,
        shapes=tuple(shapes),
        loggers=tuple(loggers),
    )


def _claim(workdir: Path, config: Any, members: Sequence[Member], compared: bool = False) -> None:
    """`claim`, of the sweep and of each member."""
    claim(workdir, config, compared=compared)
    for member in members:
        with locks.locked(workdir / member.name):
            claim(workdir / member.name, member.config, sweep=workdir, compared=compared)


def train(sweep: Job) -> list[Result | None] | None:
    """Trains to the end, or until a signal stops it; leaves metrics, a checkpoint and an adapter in each member's
    folder.

    Returns: the result of each member, None for one whose loss, gradient or delta was not finite; None where a signal
      ended it (all is saved).

    Raises: as `loop.train`; a ValueError where every member diverged.
    """
    with locks.locked(sweep.workdir, *(sweep.workdir / member.name for member in sweep.members)), stopping.noted():
        return _train(sweep)


def _train(sweep: Job) -> list[Result | None] | None:
    states, done = drive(sweep)
    if done != sweep.total:
        return None
    results: list[Result | None] = []
    for number, (member, metrics) in enumerate(zip(sweep.members, fetch(states), strict=True)):
        folder, spec = sweep.workdir / member.name, member.method.spec
        plot_loss(folder)
        if metrics["bad_step"]:
            results.append(None)
            continue
        state = sweep.part(states, number)
        if processes.on_primary(partial(checkpoints.latest_step, folder)) != done:
            with checkpoints.opened(folder) as manager:
                parts: dict[str, Any] = {"position": divmod(done, len(member.batches)), "data": sweep.data}
                checkpoints.save(manager, done, state, spec=spec, base=sweep.base, **parts)
        if not TrainConfig.of(member.config).best:  # else the best is there already
            checkpoints.save_adapter(folder / "adapter", member.method, state.delta, sweep.base)
        results.append(Result(state.delta, done, True))
    return results


def _of_member(
    objective: Objective, options: OptimizerConfig, total: int, spec: dict[str, Any]
) -> tuple[Callable, Callable]:
    """A member's `step(state, values, params, batch)` and `measure(sums, state, values, params, batch)`."""

    def step(state: steps.State, values: dict[str, Any], params: Any, batch: Any) -> steps.State:
        rates = {name: values[name] for name in _RATES if name in values}
        rate = schedule(options, total, rates.pop("learning_rate", None))
        tx = optimizer(options, rate, **rates, spec=spec)
        method = trained(options, from_spec(_filled(spec, values)))
        return steps.make_step(objective, method, tx, rate)(state, params, batch)

    def measure(sums: Array, state: steps.State, values: dict[str, Any], params: Any, batch: Any) -> Any:
        return steps.make_validation(objective, from_spec(_filled(spec, values)))(sums, state.delta, params, batch)

    return step, measure


def _over_members(function: Callable, axes: tuple[int | None, ...], together: bool) -> Callable:
    """The function for all members at once, or for one after the other, of arguments with these axes."""
    if together:
        return jax.vmap(function, in_axes=axes)

    def mapped(*arguments: Any) -> Any:
        def call(of_member: list[Any]) -> Any:  # None where all members share an argument
            picked = zip(arguments, of_member, axes, strict=True)
            return function(*(shared if axis is None else one for shared, one, axis in picked))

        return jax.lax.map(call, [None if axis is None else x for x, axis in zip(arguments, axes, strict=True)])

    return mapped


def _states(
    workdir: Path, members: Sequence[Member], base: dict[str, Any], place: jax.NamedSharding, dtype: Any
) -> tuple[steps.State, list[steps.State], Mapping[str, Any]]:
    """The states of all members, stacked, new or of the newest good checkpoint; the shapes of each; and the
    checkpoint's metadata, {} of new ones."""
    settings = [TrainConfig.of(member.config) for member in members]
    specs = [json.dumps(member.method.spec) for member in members]
    tx = optimizer(settings[0].optimizer, optax.constant_schedule(0.0), spec=members[0].method.spec)
    starts = {  # members that differ in the seed alone share a compiled start
        spec: jax.jit(partial(steps.new_state, member.method, tx, dtype=dtype))
        for spec, member in zip(specs, members, strict=True)
    }
    keys = [jax.random.key(of_member.seed) for of_member in settings]
    calls = [(starts[spec], member.params, key) for spec, member, key in zip(specs, members, keys, strict=True)]
    shapes = [jax.eval_shape(start, params, key) for start, params, key in calls]
    largest = jax.tree.map(lambda *xs: tuple(map(max, zip(*(x.shape for x in xs), strict=True))), *shapes)
    if processes.on_primary(lambda: checkpoints.latest_step(workdir)) is not None:

        def stacked(x: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return x.update(shape=(len(members), *shape), sharding=place)

        like = jax.tree.map(stacked, shapes[0], largest)
        return checkpoints.restore(workdir, like, base=base), shapes, checkpoints.meta_of(workdir)

    def padded(x: Array, shape: tuple[int, ...]) -> Array:
        edges = [(0, most - size, 0) for size, most in zip(x.shape, shape, strict=True)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)

    states = [jax.tree.map(padded, start(params, key), largest) for start, params, key in calls]
    return processes.place(jax.tree.map(lambda *xs: jnp.stack(xs), *states), place), shapes, {}


def _common(specs: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spec of all members, of the largest rank, and the members' values for it: `{"alpha": {part: (K,)}}`."""
    parts = [spec["of"] if spec["method"] == "chain" else [spec] for spec in specs]
    common, alphas = [], {}
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
            of_part = [spec["rank"] if spec["alpha"] is None else spec["alpha"] for spec in of_members]
            alphas[number] = jnp.asarray(of_part, jnp.float32)
        common.append(merged)
    return (specs[0] | {"of": common} if specs[0]["method"] == "chain" else common[0]), {"alpha": alphas}


def _filled(spec: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The spec with a member's own values."""
    parts = [dict(part) for part in (spec["of"] if spec["method"] == "chain" else [spec])]
    for number, alpha in values["alpha"].items():
        parts[number]["alpha"] = alpha
    return spec | {"of": parts} if spec["method"] == "chain" else parts[0]
