"""A config and a workdir -> a run."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import Delta, checkpoints, training
from lora_jax.core.selection import flatten
from lora_jax.data.batches import Schedule
from lora_jax.data.json_files import read_json
from lora_jax.distributed import processes
from lora_jax.methods.arguments import brief
from lora_jax.metrics.statistics import spread
from lora_jax.runs import bases, methods, tables
from lora_jax.runs.config import check, check_run
from lora_jax.runs.tasks import Task, load_split, task_named
from lora_jax.training import locks, stopping


class Setup(NamedTuple):
    """All that a run needs."""

    base: bases.Base
    method: lj.ParamTransform | None  # what trains; None of method "none"
    batches: dict[str, Schedule]  # of "train" and "valid"
    objective: training.Objective  # with its metrics
    report: lj.Report | None = None  # what trains; None of method "none"


def load_setup(
    config: ConfigDict,
    mesh: Mesh | None = None,
    *,
    task: Task | None = None,
    method: lj.ParamTransform | None = None,
    metrics: Mapping[str, training.Metric] = {},
    unread: bases.Unread | None = None,
) -> Setup:
    """The setup of a config, with what was given of `train`'s arguments; with a mesh its base is read straight onto it,
    once the method is checked on its shapes. `unread` is that base where it is open already.

    Raises:
      FileNotFoundError: no base or no data where the config says.
      ValueError: the method does not fit the base.
    """
    task = task or task_named(config.data.name)
    data = {split: load_split(task, config, split) for split in ("train", "valid")}
    unread = unread or bases.unread(config, mesh=mesh, task=task)
    if method is None and config.method != "none":
        method = lj.from_spec(methods.spec(config, unread.model, unread.new))
    report = lj.check(method, unread.shapes) if method else None
    objective = training.with_metrics(task.objective(config, unread.model), metrics)
    named = training.with_metrics(objective, config.get("metrics", ()))  # names that there are
    if named.metrics is None and config.get("best") not in (None, "", "validation_loss"):
        raise ValueError(f"best={config.best!r} is no metric of validation: it has validation_loss")
    base, spec = unread.read(), method.spec if method else {}
    schedules = {split: task.batches(examples, config, base, spec) for split, examples in data.items()}
    return Setup(base, method, schedules, objective, report)


class Prepared(NamedTuple):
    """A run, ready to train. An example is in `train`."""

    workdir: Path
    job: training.Job  # what `training.train` takes
    report: lj.Report  # the table of what trains
    warm_start: str = ""  # what it starts from, in words; "" where it starts anew


class RunResult(NamedTuple):
    """What `train` returns. An example is in `train`."""

    workdir: Path
    finished: bool  # False where SIGINT, SIGTERM or SIGHUP ended it; all is saved, and the same call resumes it
    step: int = 0  # the steps done
    total: int = 0  # the steps of the run
    delta: Delta | None = None  # trained; None of method "none", and of several seeds
    adapter: Path | None = None  # the file of the delta; None where nothing trained or not all is done
    summary: dict[str, Any] | None = None  # of summary.json; None where not all is done, and on all other processes
    members: tuple["RunResult", ...] = ()  # of several seeds, each seed's run, but for those that were done before


def ignore(_: Any) -> None:
    """What `started` and `ended` do if nothing is given."""


@brief
@locks.holding(keep=True, check=check)
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

    The arguments are those of `train`, which closes the loggers; this does not.

    Raises:
      FileNotFoundError: no base or no data where the config says.
      ValueError: the workdir holds another config's run, or the config names what there is not.

    An example is in `train`.
    """
    setup = load_setup(config, bases.mesh_of(config), task=task, method=method, metrics=metrics)
    base = setup.base
    if setup.method is None or setup.report is None:
        raise ValueError(f"{workdir}: method 'none' trains nothing; runs.train evaluates the base")
    initial, note = _warm_start(config, setup.method, base)
    parts: dict[str, Any] = {"method": setup.method, "objective": setup.objective, "initial": initial}
    parts |= {"model": base.model, "params": base.params, "base": base.identity, "placement": base.placement}
    parts |= {"batches": setup.batches["train"], "validation": setup.batches["valid"], "loggers": loggers}
    job = training.prepare(config, workdir, **parts)
    return Prepared(Path(workdir).expanduser(), job, setup.report, note)


@brief
@stopping.noted()
@locks.holding(check=check_run)
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
    summary.json (of several seeds: the medians); no other process writes it meanwhile. The first SIGINT (Ctrl-C),
    SIGTERM or SIGHUP ends the run after the step, all saved: the result is not `finished`. A second one acts as before.

    Args:
      config: of `default_config`, or of a config file.
      workdir: made where there is none.
      task: what to learn, instead of the task that the config names.
      method: what trains, in place of both the config's method and its head.
      metrics: of validation, besides the task's own: name -> (outputs, labels) -> figure.
      loggers: get every entry of the metrics too, of several seeds with "seed_0/" before each name; closed at the end.
      command: the command line that makes the run again, for summary.json.
      started, ended: called with each run before it trains, and with each run's result.

    Raises:
      FileNotFoundError, ValueError, OSError: as `prepare` and `training.train`.

    >>> import tempfile, jax, numpy as np
    >>> from pathlib import Path
    >>> from datasets import Dataset
    >>> from lora_jax import runs
    >>> from lora_jax.data import text
    >>> from lora_jax.interop import hf
    >>> from lora_jax.models import gpt2
    >>> folder = tempfile.TemporaryDirectory()  # of a tiny base with random weights, and of the runs
    >>> here = Path(folder.name)
    >>> _ = (here / "text.txt").write_text("name : Alba Alba is a pub .")
    >>> tokenizer = text.train_tokenizer([here / "text.txt"], vocab_size=270)
    >>> sizes = {"vocab_size": 270, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    >>> model = gpt2.GPT2(gpt2.GPT2Config(**sizes, eos_token_id=0))
    >>> params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 4), "int32"))["params"]
    >>> hf.save(here / "base", model, params, tokenizer)

    The data are of a task; most are read from files, these are made up:

    >>> def load(path, split):
    ...     return Dataset.from_dict({"context": ["name : Alba"] * 4, "completion": ["Alba is a pub ."] * 4})
    >>> runs.register_task("pubs", runs.generation(runs.TextTask(load, style="samsum")))
    >>> config = runs.default_config("generation")
    >>> config.base, config.data.name, config.data.batch_size = str(here / "base"), "pubs", 2
    >>> config.epochs, config.optimizer.warmup_steps = 1, 1
    >>> config.decode.num_beams, config.decode.max_new_tokens = 1, 4
    >>> result = runs.train(config, here / "run")  # doctest: +ELLIPSIS
    step 2: validation loss 5...
    >>> result.finished, result.step, result.summary["trained"]
    (True, 2, 256)

    The run in its workdir, used, evaluated, exported, and imported into another workdir:

    >>> loaded = runs.load(here / "run")
    >>> len(runs.complete(loaded, ["name : Alba"]))  # of one context one text
    1
    >>> sorted(runs.evaluate(loaded, split="valid").result["scores"]["all"])
    ['rouge1', 'rouge2', 'rougeL']
    >>> out, step = runs.export_run(here / "run", "native", here / "exported")
    >>> imported = runs.import_run(out, config, here / "imported")
    >>> runs.load(here / "imported").step
    0

    Two learning rates at once, and a run that is prepared and not trained:

    >>> config.sweep.learning_rate = (1e-4, 1e-3)
    >>> swept = runs.sweep(config, here / "sweep")  # doctest: +ELLIPSIS
    step 2, learning_rate=0.0001: validation loss 5...
    step 2, learning_rate=0.001: validation loss 5...
    >>> [row["label"] for row in swept.rows]
    ['learning_rate=0.0001', 'learning_rate=0.001']
    >>> config.sweep.learning_rate = None
    >>> runs.prepare(config, here / "prepared").report.trained
    256
    >>> folder.cleanup()
    """
    workdir = Path(workdir).expanduser()
    run = partial(_train, task=task, method=method, metrics=metrics, command=command, started=started, ended=ended)
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)
        if not config.get("seeds"):
            return run(config, workdir, loggers)
        result = _train_seeds(config, workdir, loggers, run, command)
        if result.finished:
            ended(result)
        return result


def _warm_start(config: ConfigDict, method: lj.ParamTransform, base: bases.Base) -> tuple[dict[str, Any], str]:
    """The entries of the adapter that the config starts from, those which fit; and a line that names the others."""
    if not config.get("warm_start"):
        return {}, ""
    path = Path(config.warm_start)
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if folder == path and (path / "config.json").is_file():
        seeds = sorted(str(seed) for seed in path.glob("seed_*"))
        why = f"name one of its seeds: {', '.join(seeds)}" if seeds else "it was stopped before its adapter was written"
        raise FileNotFoundError(f"warm_start={path} is a run without an adapter: {why}")
    their_method, delta = bases.adapter(folder, base)
    wanted = jax.eval_shape(method.init, jax.random.key(0), base.params)
    shapes = {name: jax.tree.map(np.shape, factors) for name, factors in delta.items()}
    fitting = {n: delta[n] for n, factors in wanted.items() if shapes.get(n) == jax.tree.map(np.shape, factors)}
    if not fitting:
        raise ValueError(f"{path}: nothing of this adapter fits the method of the config")
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), wanted)
    flat, treedef = flatten(base.params)  # a tuned leaf may have another shape there: a head
    their_base = jax.tree.unflatten(treedef, [delta.get(path, {}).get("value", leaf) for path, leaf in flat])
    adapted = method.apply(base.params, lj.Delta(zeros | fitting))
    if other := training.difference(their_method.apply(their_base, delta), adapted, among=fitting):
        raise ValueError(f"{path} is of another method than the config's: {other}")
    left = sorted(set(delta) - set(fitting))
    note = f"starts from {path}: {len(fitting)} entries" + (f"; these do not fit: {', '.join(left)}" if left else "")
    return fitting, note


@locks.holding()
def _train(
    config: ConfigDict,
    workdir: Path,
    loggers: Sequence[training.Logger],
    *,
    command: str | None,
    started: Callable[[Prepared], None],
    ended: Callable[[RunResult], None],
    done: Sequence[Path] = (),
    **parts: Any,
) -> RunResult:
    """One run, with the task, method and metrics that `train` was given, on the data of those that are `done`."""
    training.claim(workdir, config)
    if config.method == "none" and parts["method"] is None:
        result, trained, total = RunResult(workdir, True), 0, _validate_base(config, workdir, loggers, parts)
    else:
        run = prepare(config, workdir, loggers=loggers, **parts)
        for other in done:
            training.check_resumed(other, checkpoints.meta_of(other).get("data", {}), run.job.data)
        started(run)
        job, (_, trained, total) = run.job, run.report
        delta, step, finished = training.train(job)
        file = workdir / "adapter" / "adapter.safetensors"
        if finished and not config.get("best"):  # else the best is there already
            checkpoints.save_adapter(file, job.method, delta, job.base)
        result = RunResult(workdir, finished, step, job.total, delta, file if finished else None)
    if result.finished and processes.is_primary():
        numbers = {"trained": trained, "total": total, "steps": result.step}
        result = result._replace(summary=tables.summarize(config, workdir, command=command, **numbers))
    ended(result)
    return result


def _validate_base(
    config: ConfigDict, workdir: Path, loggers: Sequence[training.Logger], parts: Mapping[str, Any]
) -> int:
    """Method "none": logs validation's loss and metrics of the base; returns the base's number of parameters."""
    base, _, batches, objective, _ = load_setup(config, bases.mesh_of(config), **parts)
    stopping.check(workdir)
    objective = training.with_metrics(objective, config.get("metrics", ()))
    figures = training.validate(objective, base.params, batches["valid"], placement=base.placement)
    with training.Log(workdir, -1, loggers) as log:
        log.write(0, **figures)
    return sum(math.prod(leaf.shape) for _, leaf in flatten(base.params)[0])


def _train_seeds(
    config: ConfigDict,
    workdir: Path,
    loggers: Sequence[training.Logger],
    run: Callable[..., RunResult],
    command: str | None,
) -> RunResult:
    """A run for each of the config's seeds; their medians and ranges go into summary.json."""
    configs = {}
    for seed in config.seeds:
        folder = workdir / f"seed_{seed}"
        configs[folder] = member = config.copy_and_resolve_references()
        member.seed, member.seeds = seed, ()
        if processes.on_primary(folder.is_dir):
            with locks.locked(folder):
                training.claim(folder, member)  # before anything is written: another config is refused
    training.claim(workdir, config)
    members: list[RunResult] = []
    summaries, done = [], []
    for folder, member in configs.items():
        file = folder / "summary.json"
        if processes.on_primary(file.is_file):
            done += [folder] if processes.on_primary(partial(checkpoints.latest_step, folder)) else []
        else:
            if stopping.requested():
                return RunResult(workdir, False, members=tuple(members))
            prefixed = [training.Prefixed(logger, f"{folder.name}/") for logger in loggers]
            members.append(run(member, folder, prefixed, done=done))
            if not members[-1].finished:
                return RunResult(workdir, False, members=tuple(members))
        summaries.append(processes.on_primary(partial(read_json, file, strict=False)))
    summary = None
    if processes.is_primary():
        names = summaries[0]["validation"]
        summary = summaries[0] | {name: spread([row[name] for row in summaries]) for name in names}
        summary |= {"seed": list(config.seeds)} | ({"command": command} if command else {})
        tables.write_json(workdir / "summary.json", summary)
    return RunResult(workdir, True, summary=summary, members=tuple(members))
