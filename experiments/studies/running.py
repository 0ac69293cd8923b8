"""Trains the members of a study, those that are not done, and writes its table and its plot."""

import importlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lora_jax import runs, training
from lora_jax.core.globs import matches_any
from lora_jax.core.selection import flatten
from lora_jax.data.json_files import read_json
from lora_jax.runs import bases, budget, sweeps, tables
from lora_jax.runs.config import ATTENTION_AND_MLP_KERNELS, check, is_sweep
from lora_jax.runs.tasks import task_named
from lora_jax.training import locks, stopping


class Run(NamedTuple):
    """A run that is done."""

    name: str  # of its member
    folder: Path
    config: ConfigDict
    summary: dict[str, Any] | None  # None where it diverged

    @property
    def rate(self) -> float:
        return self.config.optimizer.learning_rate

    @property
    def loss(self) -> float:
        """That of validation after the last step; infinite where the run diverged."""
        return math.inf if self.summary is None else self.summary["validation_loss"]


@stopping.noted()
def run(config: ConfigDict, workdir: Path, source: str | None, out: Path) -> None:
    """Runs a study, or resumes it; an InterruptedError where it is stopped.

    Args:
      source: the data, if not where the config says.
      out: the file of the rows, NAME.json; beside it stands NAME.png.
    """
    study = importlib.import_module(f"experiments.studies.{config.study}")
    folder = workdir / config.runs
    done = study.train(config, folder) if hasattr(study, "train") else _of_members(study, config, folder, source)
    read = study.read(config, done) if hasattr(study, "read") else done
    rows = study.rows(config, read)
    tables.write_rows(out, rows)
    study.plot(config, read, rows, out.with_suffix(".png"))
    print(f"{tables.table(rows)}\nwritten: {out} and {out.with_suffix('.png')}")


def _of_members(study: Any, config: ConfigDict, folder: Path, source: str | None) -> list[Run]:
    """The runs of a study's members, trained where they are not done."""
    source = source or config.run.data.path
    if "folder" in config:
        config.folder = str(folder)
    members = study.members(config, partial(_data, config, source, folder))
    if not members and config.run.steps > 1:
        raise ValueError(f"the study {config.study!r} has no members: one of its values is empty")
    for member in members.values():
        for one in sweeps.members(member).values() if is_sweep(member) else [member]:
            check(one)
    _check_ranks(config)
    print(plan(members, folder, config.seconds), flush=True)
    return [run for name, member in members.items() for run in _trained(name, member, folder / name)]


def _check_ranks(config: ConfigDict) -> None:
    """A ValueError for a rank above the sizes of a matrix of the base, before anything trains."""
    ranks = config.get("ranks") or ()
    largest = max(ranks.values() if isinstance(ranks, ConfigDict) else ranks, default=0)
    if largest:
        shapes = flatten(bases.unread(config.run, task=task_named(config.run.data.name)).shapes)[0]
        sides = {path: leaf.shape[-2:] for path, leaf in shapes if matches_any(ATTENTION_AND_MLP_KERNELS, path)}
        path = min(sides, key=lambda path: min(sides[path]))
        if largest > min(sides[path]):
            raise ValueError(f"ranks: {largest} is above the smaller side of {path}, {sides[path]}")


def plan(members: Mapping[str, ConfigDict], folder: Path, seconds: float) -> str:
    """What is to be trained, in words."""
    left = {name: member for name, member in members.items() if not _end(member, folder / name).is_file()}
    counts = {name: len(sweeps.members(member)) if is_sweep(member) else 1 for name, member in members.items()}
    steps = sum(counts[name] * member.steps for name, member in left.items())
    minutes = sum(counts[name] * member.steps * member.data.batch_size / 8 for name, member in left.items()) / 60
    todo = f"{sum(counts[name] for name in left)} of {sum(counts.values())} runs are to be trained, {steps:,} steps"
    return f"{todo}: about {minutes * seconds:.0f} minutes at {seconds:g} s for 8 examples (config.seconds)"


def swept(config: ConfigDict, **values: Any) -> ConfigDict:
    """The config as a sweep of values, by their names under `sweep`; those of one value are set.

    A rate that has one value only is refused: the best of one says nothing.
    """
    config = config.copy_and_resolve_references()
    rates = values.get("learning_rate")
    if rates is not None and len(set(rates)) < 2:
        raise ValueError(f"rates={tuple(rates)}: a study takes the best of two learning rates or more")
    for name, given in values.items():
        if not given:
            raise ValueError(f"the study has no value for {name}: give one or more")
        config.sweep[name] = tuple(given)
    return config


def _data(config: ConfigDict, source: str, folder: Path, count: int | None = None) -> str:
    """The folder of so many training pairs of E2E, written where it is not there; other data as they are."""
    if config.run.data.name != "e2e":
        return source
    count = config.train[-1] if count is None else count
    path = folder / "data" / str(count)
    if not (path / "test.txt").is_file():
        budget.write_pairs("e2e", source, path, {"train": count, "valid": config.valid, "test": config.valid})
    return str(path)


def _end(member: ConfigDict, folder: Path) -> Path:
    """The file that is written at the end of a member."""
    return folder / ("sweep.json" if is_sweep(member) else "summary.json")


def _trained(name: str, member: ConfigDict, folder: Path) -> list[Run]:
    """The runs of a member."""
    with locks.locked(folder):
        training.claim(folder, member)  # another config's results are refused
    if not _end(member, folder).is_file():
        stopping.check(folder)
        train: Callable[..., Any] = runs.sweep if is_sweep(member) else runs.train
        print(f"{name}: {folder}", flush=True)
        if not train(member, folder).finished:
            raise InterruptedError(f"{folder} was stopped: the same command resumes it")
    configs = {folder / label: one for label, one in sweeps.members(member).items()} if is_sweep(member) else None
    return [Run(name, at, one, _summary(at)) for at, one in (configs or {folder: member}).items()]


def _summary(folder: Path) -> dict[str, Any] | None:
    file = folder / "summary.json"
    return read_json(file, strict=False) if file.is_file() else None
