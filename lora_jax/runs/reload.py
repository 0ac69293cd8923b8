"""A run from its workdir, ready to use."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict
from tokenizers import Tokenizer

import lora_jax as lj
from lora_jax import Delta, ParamTransform, checkpoints, training
from lora_jax.runs import bases, methods
from lora_jax.runs.tasks import Task, task_named

Kind = Literal["base", "adapted", "merged"]


class Loaded(NamedTuple):
    """A run's model.

    Attributes:
      workdir: of the run.
      config: of the run, as it resolved.
      model: of `lora_jax.models`.
      params: of the base alone, adapted, or merged, as `kind` says.
      tokenizer: the base's.
      method, delta: what was trained; None for the base alone.
      step: of the checkpoint; 0 for the base alone.
      base: the base's `checkpoints.identity`.
      task: what the run learnt.
      kind: "base", "adapted" or "merged".
    """

    workdir: Path
    config: ConfigDict
    model: Any
    params: Any
    tokenizer: Tokenizer
    method: ParamTransform | None
    delta: Delta | None
    step: int
    base: dict[str, str]
    task: Task
    kind: Kind

    @property
    def spec(self) -> dict[str, Any]:
        """The spec of the run's method; {} for the base alone."""
        return self.method.spec if self.method else {}


def load(workdir: str | Path, *, params: Kind = "adapted", base: str | None = None, task: Task | None = None) -> Loaded:
    """The model of a workdir: of its best epoch where its config has `best`, else of its newest checkpoint.

    Args:
      workdir: of `train`, or a member's folder of `sweep`.
      params: "adapted", the base adapted by the run; "merged", the same as plain arrays; "base", the base alone.
      base: where the base is, if no longer where the run's config says.
      task: what `train` was given, if it was given one.

    Raises:
      FileNotFoundError: no run there, or no base.
      ValueError: the base is another than the run's, or the workdir holds several runs.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    if params != "base" and config.method == "none":
        raise ValueError(f"{workdir} trained nothing (method none): there is --params=base only")
    task = task or task_named(config.data.name)
    model, plain, tokenizer, identity, *_ = bases.load(config, base, task=task)
    if params == "base":
        return Loaded(workdir, config, model, plain, tokenizer, None, None, 0, identity, task, params)
    method, delta, step, trained_on = trained(workdir, config)
    checkpoints.check_base(trained_on, identity, workdir)
    adapted = method.apply(lj.without_tuned(plain, delta), delta)
    used = lj.merge(adapted) if params == "merged" else adapted
    return Loaded(workdir, config, model, used, tokenizer, method, delta, step, identity, task, params)


def trained(workdir: Path, config: ConfigDict) -> tuple[ParamTransform, Delta, int, dict[str, str]]:
    """Method, delta, step and base's identity of a run: of its best epoch, where its config says what is best, or else
    of its newest checkpoint."""
    if config.get("seeds") or any((config.get("sweep") or {}).values()):
        runs = sorted(str(path.parent) for path in workdir.glob("*/config.json"))
        raise ValueError(f"{workdir} holds several runs: name one, --workdir={' or '.join(runs)}")
    if not config.get("best"):
        run = checkpoints.load(workdir)
        return run.method, run.delta, run.step, checkpoints.meta_of(workdir)["base"]
    if not (workdir / "adapter").is_dir():
        raise FileNotFoundError(f"{workdir} has no best epoch yet: it was stopped before its first validation")
    method, delta, info = checkpoints.load_adapter(workdir / "adapter")
    validated = [entry for entry in training.read_metrics(workdir) if config.best in entry]
    best = max(validated, key=lambda entry: entry[config.best], default={"step": 0})  # an imported one has none
    return method, delta, best["step"], info["base"]


def adapter(path: str | Path, base: bases.Base) -> tuple[ParamTransform, Delta]:
    """Method and delta of a workdir's newest checkpoint, or of an adapter's file or folder, for that base.

    Raises:
      FileNotFoundError: there is none. ValueError: it is damaged, or another base's.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        return bases.adapter(path, base)
    read_config(path)  # registers a method from a file
    run = checkpoints.load(path)
    checkpoints.check_base(checkpoints.meta_of(path)["base"], base.identity, path)
    return run.method, run.delta


def read_config(workdir: str | Path) -> ConfigDict:
    """The config of the run in a workdir; the methods from files that it names are registered."""
    file = Path(workdir) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: is {workdir} the workdir of a run?")
    config = ConfigDict(json.loads(file.read_text()))
    methods.register_own(config)
    return config


def check_writes(task: Task, config: ConfigDict, workdir: str | Path, *, text: bool) -> None:
    """A ValueError where the run of a task that writes text should classify, or the reverse."""
    if text != (task.text is not None):
        others = "experiments.predict" if text else "experiments.evaluate and experiments.generate"
        raise ValueError(f"{workdir} is a run of {config.data.name}: give it to {others}")
