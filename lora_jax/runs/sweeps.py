"""A config's sweep: every combination of its values, trained in one program (`lora_jax.training.sweep`)."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import checkpoints, training
from lora_jax.distributed import processes
from lora_jax.runs import bases, methods, setups
from lora_jax.runs.summary import summarize, write_summary
from lora_jax.runs.tasks import Task
from lora_jax.training import sweep as training_sweep

KEYS = {"learning_rate": "optimizer.learning_rate", "weight_decay": "optimizer.weight_decay", "seed": "seed"}


class SweepResult(NamedTuple):
    """What `sweep` returns.

    Attributes:
      workdir: of the sweep.
      finished: False where SIGTERM ended it; all is saved, and the same call resumes it.
      total: the steps of the sweep.
      members: the result of each member by the name of its folder; None for one that diverged.
      rows: a row of a table for each member, as in sweep.json; none on all but the first process.
    """

    workdir: Path
    finished: bool
    total: int
    members: dict[str, training.Result | None]
    rows: list[dict[str, Any]]


def is_sweep(config: ConfigDict) -> bool:
    """Whether a config has values to sweep."""
    return any((config.get("sweep") or {}).values())


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
      workdir: made where there is none.
      task: what to learn, instead of the task that the config names.
      metrics: of validation, besides the task's own: name -> (outputs, labels) -> figure.
      loggers: get every entry of the metrics too, with the member's folder before each name; closed at the end.
      command: the command line that makes the sweep again, for the summaries.
      started: called, before it trains, with the table of what trains in the first member, and the names of all.

    Raises:
      FileNotFoundError, ValueError, OSError: as `training.sweep.prepare` and `train`.
    """
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)
        job, configs, reports = _prepare(config, Path(workdir), task, metrics, loggers)
        started(reports[0], list(configs))
        results = training_sweep.train(job)
    workdir = Path(workdir)
    if results is None:
        return SweepResult(workdir, False, job.total, {}, [])
    done = dict(zip(configs, results, strict=True))
    rows = _write(workdir, configs, reports, done, command) if processes.is_primary() else []
    return SweepResult(workdir, True, job.total, done, rows)


def _prepare(
    config: ConfigDict,
    workdir: Path,
    task: Task | None,
    metrics: Mapping[str, training.Metric],
    loggers: Sequence[training.Logger],
) -> tuple[training.Job, dict[str, ConfigDict], list[lj.Report]]:
    """The sweep, ready to train, the config of each member by its name, and the tables of what trains."""
    if config.method == "none" or config.get("warm_start"):
        raise ValueError("a sweep trains new adapters: no method 'none', no warm_start")
    configs = members(config)
    first, *_ = configs.values()
    mesh = bases.mesh_of(config)
    setup = setups.load(first, mesh, task=task, metrics=metrics)
    base = setup.base
    params = {first.seed: base.params}
    prepared = []
    for name, member in configs.items():
        if member.seed not in params:  # another seed draws another head, where the head is new
            params[member.seed] = bases.load(member, mesh=mesh, task=task).params if member.get("head") else base.params
        method = lj.from_spec(methods.spec(member, base.model, base.new))
        batches = dataclasses.replace(setup.batches["train"], seed=member.seed)
        prepared.append(training_sweep.Member(name, member, method, params[member.seed], batches))
    reports = [lj.check(member.method, base.params) for member in prepared]
    job = training_sweep.prepare(
        config,
        workdir,
        prepared,
        base=base.identity,
        objective=setup.objective,
        validation=setup.batches["valid"],
        placement=base.placement,
        dtype=base.model.config.dtype,
        loggers=loggers,
    )
    return job, configs, reports


def _write(
    workdir: Path,
    configs: dict[str, ConfigDict],
    reports: list[lj.Report],
    results: dict[str, training.Result | None],
    command: str | None,
) -> list[dict[str, Any]]:
    """Writes the members' summaries, sweep.json and sweep.png; returns the rows."""
    rows = []
    for (name, config), report in zip(configs.items(), reports, strict=True):
        folder = workdir / name
        row: dict[str, Any] = {"label": name, "trained": report.trained}
        if (result := results[name]) is not None:
            size = (folder / "adapter" / "adapter.safetensors").stat().st_size
            numbers = {"trained": report.trained, "total": report.total, "adapter_bytes": size, "steps": result.step}
            row |= summarize(config, folder, command=command, **numbers)
            write_summary(folder, row)
        rows.append(row)
    checkpoints.write_atomically(workdir / "sweep.json", (json.dumps({"rows": rows}, indent=2) + "\n").encode())
    _plot(workdir, list(configs))
    return rows


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


def _plot(workdir: Path, names: list[str]) -> None:
    """The curves of all members: loss in training and validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, measured in zip(figure.subplots(1, 2), ("loss", "validation_loss"), strict=True):
        for name in names:
            entries = [entry for entry in training.read_metrics(workdir / name) if measured in entry]
            steps, values = [entry["step"] for entry in entries], [entry[measured] for entry in entries]
            axes.plot(steps, values, "o-" if measured == "validation_loss" else "-", label=name, markersize=4)
        axes.set(xlabel="step", ylabel=f"{measured.replace('_', ' ')} per label")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(workdir / "sweep.png", dpi=120)
