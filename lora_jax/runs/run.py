"""A config and a workdir -> a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import Delta, checkpoints, training
from lora_jax.distributed import processes
from lora_jax.metrics.statistics import spread
from lora_jax.runs import bases, tasks
from lora_jax.runs.summary import summarize, write_summary


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
      step, total: the steps done, and those of the whole run.
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


Started = Callable[[Prepared], None]
Ended = Callable[[RunResult], None]


def _ignore(_: Any) -> None:
    pass


def prepare(config: ConfigDict, workdir: str | Path) -> Prepared:
    """A run of this config in this workdir, from its start or from its newest good checkpoint.

    Raises:
      FileNotFoundError: no base or no data where the config says.
      ValueError: the workdir holds another config's run, or the config names what there is not.
    """
    setup = tasks.load(config, bases.mesh_of(config))
    base = setup.base
    method = lj.from_spec(setup.spec)
    report = lj.check(method, base.params)
    initial, note = tasks.warm_start(config, method, base)
    job = training.prepare(
        config,
        workdir,
        method=method,
        model=base.model,
        params=base.params,
        base=base.identity,
        batches=setup.batches["train"],
        validation=setup.batches["valid"],
        objective=setup.objective,
        initial=initial,
        placement=base.placement,
    )
    return Prepared(Path(workdir), job, report, note)


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    command: str | None = None,
    started: Started = _ignore,
    ended: Ended = _ignore,
) -> RunResult:
    """Trains what a config says, or resumes it; of several `seeds` a run each, in folders seed_0, seed_1, ...

    The workdir gets config.json, metrics.jsonl, TensorBoard events, loss.png, checkpoints/, and at the end adapter/ and
    summary.json (of several seeds: the medians).

    Args:
      config: of `default_config`, or of a config file.
      workdir: made where there is none.
      command: the command line that makes the run again, for summary.json.
      started: called with each run before it trains.
      ended: called with each run's result.

    Raises:
      FileNotFoundError, ValueError, OSError: as `prepare` and `training.train`.
    """
    workdir = Path(workdir)
    if any((config.get("sweep") or {}).values()):
        raise ValueError("the config has values to sweep: runs.sweep trains them")
    if config.get("seeds"):
        return _train_seeds(config, workdir, command, started, ended)
    return _train(config, workdir, command, started, ended)


def _train(config: ConfigDict, workdir: Path, command: str | None, started: Started, ended: Ended) -> RunResult:
    training.claim(workdir, config)
    train_kind = _train_base if config.method == "none" else _train_delta
    result = train_kind(config, workdir, command, started)
    ended(result)
    return result


def _train_delta(config: ConfigDict, workdir: Path, command: str | None, started: Started) -> RunResult:
    run = prepare(config, workdir)
    started(run)
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
        summary = summarize(config, workdir, command=command, **numbers)
        write_summary(workdir, summary)
    return RunResult(workdir, True, result.step, job.total, result.delta, file, summary)


def _train_base(config: ConfigDict, workdir: Path, command: str | None, started: Started) -> RunResult:
    """Method "none": the validation loss, and the task's metrics, of the base."""
    setup = tasks.load(config, bases.mesh_of(config))
    params, placement = setup.base.params, setup.base.placement
    figures = training.validate(setup.objective, params, setup.batches["valid"], placement=placement)
    with training.Log(workdir, step=-1) as log:
        log.write(0, **figures)
    summary = None
    if processes.is_primary():
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        summary = summarize(config, workdir, command=command, trained=0, total=total, adapter_bytes=0, steps=0)
        write_summary(workdir, summary)
    return RunResult(workdir, True, summary=summary)


def _train_seeds(config: ConfigDict, workdir: Path, command: str | None, started: Started, ended: Ended) -> RunResult:
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
            members.append(_train(member, folder, command, started, ended))
            if not members[-1].finished:
                return RunResult(workdir, False, members=tuple(members))
        summaries.append(json.loads(processes.on_primary(file.read_text)))
    summary = None
    if processes.is_primary():
        scores = {name: [each[name] for each in summaries] for name in summaries[0]["validation"]}
        spreads = {name: spread(values) for name, values in scores.items()}
        summary = summaries[0] | spreads | {"seed": list(config.seeds)}
        summary |= {"command": command} if command else {}
        write_summary(workdir, summary)
    result = RunResult(workdir, True, summary=summary, members=tuple(members))
    ended(result)
    return result
