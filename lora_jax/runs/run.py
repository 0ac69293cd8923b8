"""A config and a workdir -> a run."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import Delta, checkpoints, training
from lora_jax.distributed import processes
from lora_jax.metrics.statistics import spread
from lora_jax.runs import bases, setups
from lora_jax.runs.summary import summarize, write_summary
from lora_jax.runs.tasks import Task


class Prepared(NamedTuple):
    """A run, ready to train.

    Attributes:
      workdir: of the run.
      job: what `training.train` takes.
      report: the table of what trains.
      warm_start: what it starts from, in words; "" where it starts anew.
    """

    workdir: Path
    job: training.Job
    report: lj.Report
    warm_start: str = ""


class RunResult(NamedTuple):
    """What `train` returns.

    Attributes:
      workdir: of the run.
      finished: False where SIGTERM ended it; all is saved, and the same call resumes it.
      step, total: the steps done, and the steps of the run.
      delta: trained; None of method "none", and of several seeds.
      adapter: the file of the delta; None where nothing trained or not all is done.
      summary: what summary.json holds; None on all but the first process, and where not all is done.
      members: of a config with several seeds, each seed's; those whose summary was there already are not among them.
    """

    workdir: Path
    finished: bool
    step: int = 0
    total: int = 0
    delta: Delta | None = None
    adapter: Path | None = None
    summary: dict[str, Any] | None = None
    members: tuple["RunResult", ...] = ()


def ignore(_: Any) -> None:
    """What `started` and `ended` do if nothing is given."""


def prepare(
    config: ConfigDict,
    workdir: str | Path,
    *,
    task: Task | None = None,
    method: lj.ParamTransform | None = None,
    metrics: Mapping[str, training.Metric] = {},
    loggers: Sequence[training.Logger] = (),
) -> Prepared:
    """A run of this config in this workdir, from its start or from its newest good checkpoint.

    Args: as for `train`, which closes the loggers; this does not.

    Raises:
      FileNotFoundError: no base or no data where the config says.
      ValueError: the workdir holds another config's run, or the config names what there is not.
    """
    setup = setups.load(config, bases.mesh_of(config), task=task, method=method, metrics=metrics)
    base = setup.base
    if setup.method is None:
        raise ValueError(f"{workdir}: method 'none' trains nothing; runs.train evaluates the base")
    report = lj.check(setup.method, base.params)
    initial, note = setups.warm_start(config, setup.method, base)
    job = training.prepare(
        config,
        workdir,
        method=setup.method,
        model=base.model,
        params=base.params,
        base=base.identity,
        batches=setup.batches["train"],
        validation=setup.batches["valid"],
        objective=setup.objective,
        initial=initial,
        placement=base.placement,
        loggers=loggers,
    )
    return Prepared(Path(workdir), job, report, note)


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    task: Task | None = None,
    method: lj.ParamTransform | None = None,
    metrics: Mapping[str, training.Metric] = {},
    loggers: Sequence[training.Logger] = (),
    command: str | None = None,
    started: Callable[[Prepared], None] = ignore,
    ended: Callable[[RunResult], None] = ignore,
) -> RunResult:
    """Trains what a config says, or resumes it; of several `seeds` a run each, in folders seed_0, seed_1, ...

    The workdir gets config.json, metrics.jsonl, TensorBoard events, loss.png, checkpoints/, and at the end adapter/ and
    summary.json (of several seeds: the medians).

    Args:
      config: of `default_config`, or of a config file.
      workdir: made where there is none.
      task: what to learn, instead of the task that the config names.
      method: what trains, in place of both the config's method and its head.
      metrics: of validation, besides the task's own: name -> (outputs, labels) -> figure.
      loggers: get every entry of the metrics too, of several seeds with "seed_0/" before each name; closed at the end.
      command: the command line that makes the run again, for summary.json.
      started: called with each run before it trains.
      ended: called with each run's result.

    Raises:
      FileNotFoundError, ValueError, OSError: as `prepare` and `training.train`.
    """
    workdir = Path(workdir)
    if any((config.get("sweep") or {}).values()):
        raise ValueError("the config has values to sweep: runs.sweep trains them")
    parts = {"task": task, "method": method, "metrics": metrics}
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)
        options = _Options(parts, tuple(loggers), command, started, ended)
        return (_train_seeds if config.get("seeds") else _train)(config, workdir, options)


class _Options(NamedTuple):
    """What `train` was given for each of its runs."""

    parts: dict[str, Any]
    loggers: tuple[training.Logger, ...]
    command: str | None
    started: Callable[[Prepared], None]
    ended: Callable[[RunResult], None]


def _train(config: ConfigDict, workdir: Path, options: _Options) -> RunResult:
    training.claim(workdir, config)
    nothing = config.method == "none" and options.parts["method"] is None
    result = (_train_base if nothing else _train_delta)(config, workdir, options)
    options.ended(result)
    return result


def _train_delta(config: ConfigDict, workdir: Path, options: _Options) -> RunResult:
    run = prepare(config, workdir, **options.parts, loggers=options.loggers)
    options.started(run)
    job = run.job
    result = training.train(job)
    if not result.finished:
        return RunResult(workdir, False, result.step, job.total, result.delta)
    file, summary = workdir / "adapter" / "adapter.safetensors", None
    if not config.get("best"):  # else the best is there already
        checkpoints.save_adapter(file, job.method, result.delta, job.base)
    if processes.is_primary():
        numbers = {"trained": run.report.trained, "total": run.report.total}
        numbers |= {"adapter_bytes": file.stat().st_size, "steps": result.step}
        summary = summarize(config, workdir, command=options.command, **numbers)
        write_summary(workdir, summary)
    return RunResult(workdir, True, result.step, job.total, result.delta, file, summary)


def _train_base(config: ConfigDict, workdir: Path, options: _Options) -> RunResult:
    """Method "none": the validation loss, and the task's metrics, of the base."""
    setup = setups.load(config, bases.mesh_of(config), **options.parts)
    params, placement = setup.base.params, setup.base.placement
    objective = training.with_metrics(setup.objective, config.get("metrics", ()))
    figures = training.validate(objective, params, setup.batches["valid"], placement=placement)
    with training.Log(workdir, -1, options.loggers) as log:
        log.write(0, **figures)
    summary = None
    if processes.is_primary():
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        summary = summarize(config, workdir, command=options.command, trained=0, total=total, adapter_bytes=0, steps=0)
        write_summary(workdir, summary)
    return RunResult(workdir, True, summary=summary)


def _train_seeds(config: ConfigDict, workdir: Path, options: _Options) -> RunResult:
    """A run for each of the config's seeds; their medians and ranges go into summary.json."""
    configs = {}
    for seed in config.seeds:
        configs[workdir / f"seed_{seed}"] = member = config.copy_and_resolve_references()
        member.seed, member.seeds = seed, ()
    for folder, member in configs.items():
        if processes.on_primary(folder.is_dir):
            training.claim(folder, member)  # before anything is written: another config is refused
    training.claim(workdir, config)
    members, summaries = [], []
    for folder, member in configs.items():
        file = folder / "summary.json"
        if not processes.on_primary(file.is_file):
            loggers = tuple(training.Prefixed(logger, f"{folder.name}/") for logger in options.loggers)
            members.append(_train(member, folder, options._replace(loggers=loggers)))
            if not members[-1].finished:
                return RunResult(workdir, False, members=tuple(members))
        summaries.append(json.loads(processes.on_primary(file.read_text)))
    summary = None
    if processes.is_primary():
        scores = {name: [each[name] for each in summaries] for name in summaries[0]["validation"]}
        spreads = {name: spread(values) for name, values in scores.items()}
        summary = summaries[0] | spreads | {"seed": list(config.seeds)}
        summary |= {"command": options.command} if options.command else {}
        write_summary(workdir, summary)
    result = RunResult(workdir, True, summary=summary, members=tuple(members))
    options.ended(result)
    return result
