"""A config's sweep: every combination of its values, trained in one program (`lora_jax.training.sweep`)."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import training
from lora_jax.distributed import processes
from lora_jax.methods.arguments import brief
from lora_jax.runs import bases, methods, tables
from lora_jax.runs.config import check, need_config
from lora_jax.runs.run import load_setup
from lora_jax.runs.tasks import Task
from lora_jax.training import locks, stopping
from lora_jax.training import sweep as training_sweep
from lora_jax.training.logging import warns_of_plot

KEYS = {"learning_rate": "optimizer.learning_rate", "weight_decay": "optimizer.weight_decay", "seed": "seed"}


class SweepResult(NamedTuple):
    """What `sweep` returns. An example is in `train`."""

    workdir: Path
    finished: bool  # False where SIGINT, SIGTERM or SIGHUP ended it; all is saved, and the same call resumes it
    total: int  # the steps of the sweep
    members: dict[str, training.Result | None]  # by the names of their folders; None for one that diverged
    rows: list[dict[str, Any]]  # of sweep.json, one for each member; none on all but the first process


def _check(config: ConfigDict) -> None:
    """A ValueError where a member cannot be trained; before anything is written."""
    need_config(config)
    if config.method == "none" or config.get("warm_start"):
        raise ValueError("a sweep trains new adapters: no method 'none', no warm_start")
    for member in members(config).values():
        check(member)


@brief
@stopping.noted()
@locks.holding(check=_check)
def sweep(
    config: ConfigDict,
    workdir: str | Path,
    *,
    task: Task | None = None,
    metrics: Mapping[str, training.Metric] = {},
    loggers: Sequence[training.Logger] = (),
    command: str | None = None,
    started: Callable[[lj.Report, list[str]], None] = lambda report, names: None,
) -> SweepResult:
    """Trains every combination of the values under `config.sweep`, or resumes them, each in a folder of its own.

    Each folder becomes a workdir as any other; sweep.json has a row for each, sweep.png their curves.

    Args:
      config: of `default_config` or a config file, with values under `sweep`.
      task, metrics, command: as for `train`.
      loggers: get every entry of the metrics too, with the member's folder before each name; closed at the end.
      started: called, before it trains, with the table of what trains in the first member, and the names of all.

    Raises:
      FileNotFoundError, ValueError, OSError: as `training.sweep.prepare` and `train`.

    An example is in `train`.
    """
    workdir = Path(workdir).expanduser()
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)
        job, reports = _prepare(config, workdir, task, metrics, loggers)
        names = [member.name for member in job.members]
        started(reports[0], names)
        results = training_sweep.train(job)
    if results is None:
        return SweepResult(workdir, False, job.total, {}, [])
    rows: list[dict[str, Any]] = []
    if processes.is_primary():
        for member, report, result in zip(job.members, reports, results, strict=True):
            row = {"label": member.name, "trained": report.trained}
            if result is not None:
                numbers = {**row, "total": report.total, "steps": result.step}
                row = tables.summarize(member.config, workdir / member.name, command=command, **numbers)
            rows.append(row)
        tables.write_rows(workdir / "sweep.json", rows)
        with warns_of_plot(workdir / "sweep.png"):
            tables.plot_losses(workdir / "sweep.png", {name: workdir / name for name in names})
    return SweepResult(workdir, True, job.total, dict(zip(names, results, strict=True)), rows)


def _prepare(
    config: ConfigDict,
    workdir: Path,
    task: Task | None,
    metrics: Mapping[str, training.Metric],
    loggers: Sequence[training.Logger],
) -> tuple[training.Job, list[lj.Report]]:
    """The sweep, ready to train, and the tables of what trains in each member."""
    configs = members(config)
    first, *_ = configs.values()
    mesh = bases.mesh_of(config)
    unread = bases.unread(first, mesh=mesh, task=task)  # the methods are checked before a weight is read
    methods_of = {n: lj.from_spec(methods.spec(member, unread.model, unread.new)) for n, member in configs.items()}
    reports = [lj.check(method, unread.shapes) for method in methods_of.values()]
    base, _, batches, objective, _ = load_setup(first, mesh, task=task, metrics=metrics, unread=unread)
    params = {first.seed: base.params}
    prepared = []
    for name, member in configs.items():
        if member.seed not in params:  # another seed draws another head, where the head is new
            params[member.seed] = bases.load(member, mesh=mesh, task=task).params if member.get("head") else base.params
        schedule = dataclasses.replace(batches["train"], seed=member.seed)
        prepared.append(training_sweep.Member(name, member, methods_of[name], params[member.seed], schedule))
    parts: dict[str, Any] = {"base": base.identity, "objective": objective, "validation": batches["valid"]}
    parts |= {"placement": base.placement, "dtype": base.model.config.dtype, "loggers": loggers}
    return training_sweep.prepare(config, workdir, prepared, **parts), reports


def members(config: ConfigDict) -> dict[str, ConfigDict]:
    """The config of each member, as of a run of its own, by the name of its folder."""
    given = {name: tuple(values) for name, values in config.sweep.items() if values}
    if config.get("seeds"):
        given.setdefault("seed", tuple(config.seeds))
    plain = config.copy_and_resolve_references()
    for name in plain.sweep:
        plain.sweep[name] = None
    if "seeds" in plain:
        plain.seeds = ()
    configs: dict[str, ConfigDict] = {}
    for values in itertools.product(*given.values()):
        options = dict(zip(given, values, strict=True))
        label = ",".join(f"{name}={value:g}" for name, value in options.items())
        if label in configs:
            raise ValueError(f"sweep: {label} is there twice")
        configs[label] = plain.copy_and_resolve_references()
        configs[label].update_from_flattened_dict({_key(name, config): value for name, value in options.items()})
    return configs


def _key(name: str, config: ConfigDict) -> str:
    """The key of the config that a name under `sweep` stands for."""
    if name in KEYS:
        return KEYS[name]
    for part in config.method.split("+"):
        if part in config and name in config[part]:
            return f"{part}.{name}"
    raise ValueError(f"sweep.{name}: the method {config.method!r} has no {name}")
