"""A run from its workdir, ready to use; and out to folders of other forms, and in from them."""

import logging
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tokenizers import Tokenizer

import lora_jax as lj
from lora_jax import Delta, ParamTransform, checkpoints, training
from lora_jax.data.json_files import read_json
from lora_jax.distributed import sharding
from lora_jax.interop import hf, peft
from lora_jax.methods.arguments import brief
from lora_jax.models.family import family_of
from lora_jax.models.layouts import to_loop
from lora_jax.runs import bases, cards, methods
from lora_jax.runs.config import check, is_sweep
from lora_jax.runs.tasks import Task, TextTask, task_in, task_named
from lora_jax.training import locks

Kind = Literal["base", "adapted", "merged"]
Form = Literal["merged", "peft", "native"]


class Loaded(NamedTuple):
    """A run's model. An example is in `train`."""

    workdir: Path
    config: ConfigDict  # of the run, as it resolved
    model: Any  # of `lora_jax.models`
    params: Any  # of the base alone, adapted, or merged, as `kind` says
    tokenizer: Tokenizer  # the base's
    method: ParamTransform | None  # None for the base alone, as the delta
    delta: Delta | None
    step: int  # of the checkpoint; 0 for the base alone
    base: dict[str, Any]  # its `checkpoints.identity`
    task: Task  # what the run learnt
    kind: Kind

    def __repr__(self) -> str:
        return f"Loaded({self.workdir}, {self.kind}, step {self.step}, base {self.source})"

    @property
    def source(self) -> str:
        """Where the base was loaded from."""
        return self.base["source"]

    @property
    def spec(self) -> dict[str, Any]:
        """The spec of the run's method; {} for the base alone."""
        return self.method.spec if self.method else {}


@brief
def load(workdir: str | Path, *, params: Kind = "adapted", base: str | None = None, task: Task | None = None) -> Loaded:
    """The model of a workdir: of its best epoch where its config has `best`, else of its newest checkpoint.

    Args:
      workdir: of `train`, or a member's folder of `sweep`.
      params: "adapted", the base adapted by the run; "merged", the same as plain arrays; "base", the base alone.
      base: where the base is, if no longer where the run's config says.
      task: what `train` was given, if it was given one.

    Raises:
      FileNotFoundError: no run there, or no base.
      ValueError: the base is another than the run's, the workdir holds several runs, or its method or task is in a
        Python file that has not run (`run_file`): reading a run never runs one.

    An example is in `train`.
    """
    workdir = Path(workdir).expanduser()
    config = read_config(workdir)
    if params != "base" and config.method == "none":
        raise ValueError(f"{workdir} trained nothing (method none): there is --params=base only")
    task = task or task_in(config)
    head_trained = params != "base" and bool(config.get("head"))
    model, plain, tokenizer, identity, *_ = bases.load(config, base, task=task, head_trained=head_trained)
    if params == "base":
        return Loaded(workdir, config, model, plain, tokenizer, None, None, 0, identity, task, params)
    method, delta, step, trained_on = trained(workdir, config)
    checkpoints.check_base(trained_on, identity, workdir)
    adapted = method.apply(lj.without_tuned(plain, delta), delta)
    used = lj.merge(adapted) if params == "merged" else adapted
    return Loaded(workdir, config, model, used, tokenizer, method, delta, step, identity, task, params)


def trained(workdir: Path, config: ConfigDict) -> tuple[ParamTransform, Delta, int, dict[str, Any]]:
    """Method, delta, step and base's identity of a run: of its best epoch, where its config says what is best, or else
    of its newest checkpoint."""
    if config.get("seeds") or is_sweep(config):
        runs = sorted(str(path.parent) for path in workdir.glob("*/config.json"))
        raise ValueError(f"{workdir} holds several runs: name one, --workdir={' or '.join(runs)}")
    if not config.get("best"):
        run = checkpoints.load(workdir)
        return run.method, run.delta, run.step, checkpoints.meta_of(workdir)["base"]
    if not (workdir / "adapter").is_dir():
        raise FileNotFoundError(f"{workdir} has no best epoch yet: it was stopped before its first validation")
    method, delta, info = checkpoints.load_adapter(workdir / "adapter")
    validated = [entry for entry in training.read_metrics(workdir) if config.best in entry]
    if not validated and checkpoints.latest_step(workdir):  # an imported one, of step 0, has none
        logging.warning("%s has no %s: the best epoch's step counts as 0", workdir / "metrics.jsonl", config.best)
    best = max(validated, key=lambda entry: entry[config.best], default={"step": 0})
    return method, delta, best["step"], info["base"]


def adapter(path: str | Path, base: bases.Base) -> tuple[ParamTransform, Delta]:
    """Method and delta, for that base, of a workdir's newest checkpoint, or of a folder of any form of `export_run`, of
    which a model is a delta that replaces every leaf of the base.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is of no form, damaged, or another base's.
    """
    path = Path(path).expanduser()
    checkpoints.finish_replacing(path)
    file = path / "config.json"
    if file.is_file() and "model_type" not in read_json(file, strict=False):  # of a run, not of a model
        run = checkpoints.load(path)
        checkpoints.check_base(checkpoints.meta_of(path)["base"], base.identity, path)
        return run.method, run.delta
    if (path / "adapter_config.json").is_file():
        return peft.load(path, base.params)
    if (path / "adapter.safetensors").is_file() or not path.is_dir():
        return bases.adapter(path, base)
    if not file.is_file():
        raise ValueError(f"{path} holds no adapter.safetensors, adapter_config.json or config.json")
    config = base.model.config
    if config.scan_layers:
        raise ValueError(f"{path}: a merged model is imported with --config.model.scan_layers=False")
    classifies = family_of(base.model).with_head and config.head
    head = {"head": config.head, "labels": config.labels} if classifies else {}
    params, method = hf.load(path, **head)[1], lj.tune(lj.select("**"))
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, base.params):
        raise ValueError(f"{path} is no model of the shapes of the base {base.identity['source']}")
    return method, method.init(jax.random.key(0), params)


def read_config(workdir: str | Path) -> ConfigDict:
    """The config of the run in a workdir; no file that it names is run."""
    file = Path(workdir).expanduser() / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: is {workdir} the workdir of a run?")
    config = ConfigDict(read_json(file, strict=False))
    if missing := [key for key in ("base", "data", "method") if key not in config]:
        raise ValueError(f"{file} has no {missing[0]!r}: it is not the config of a run of experiments.train")
    return config


def text_task(task: Task, config: ConfigDict, workdir: str | Path) -> TextTask:
    """How the run's texts are scored; a ValueError where it writes none."""
    if task.text is None:
        raise ValueError(f"{workdir} is a run of {config.data.name}: give it to experiments.predict")
    return task.text


class Imported(NamedTuple):
    """What `import_run` made: the delta, and the file that holds it besides the workdir's checkpoint of step 0.

    An example is in `train`.
    """

    delta: Delta
    adapter: Path


def export_run(workdir: str | Path, form: Form, out: str | Path, *, base: str | None = None) -> tuple[Path, int]:
    """Writes the delta of a run, or what it makes of the base, and beside it a model card, README.md (`runs.cards`). A
    README.md that is there already, and is not the card of an earlier export as it was written, stays.

    Args:
      workdir: of a run; of its best epoch, where its config says what is best.
      form: "merged", a Hugging Face folder that transformers loads, of the base's speed; "peft", one for
        `PeftModel.from_pretrained`; "native", what `checkpoints.load_adapter` reads.
      out: the folder.
      base: where the base is, if no longer where the run's config says.

    Returns:
      What was written, and the step of the run that it is of.

    An example is in `train`.
    """
    workdir, out = Path(workdir).expanduser(), Path(out).expanduser()
    config = read_config(workdir)
    method, delta, step, trained_on = trained(workdir, config)
    source = str(base or config.base)
    exported = cards.Exported(workdir, config, form, source, method, delta, step)
    if form == "native":
        file = checkpoints.save_adapter(out, method, delta, trained_on)
        if file.parent == out:
            cards.write(out, exported)
        return file, step
    shape = config.mesh.to_dict() if config.get("mesh") else {}
    # The mesh of the run where it has several devices and they are there: its base may be too large for one.
    mesh = sharding.make_mesh(shape) if 1 < math.prod(shape.values()) <= jax.device_count() else None
    loaded = bases.load(config, source, mesh, head_trained=bool(config.get("head")))
    checkpoints.check_base(trained_on, loaded.identity, workdir)
    if form == "merged":
        if mesh is not None:
            adapted = jax.eval_shape(method.apply, loaded.params, delta)
            delta = jax.device_put(delta, loaded.placement.shardings(delta, adapted))
        params = method.apply(loaded.params, delta)
        hf.save(out, loaded.model, params, loaded.tokenizer, merge=True, like=source)
        if (save_format := task_in(config).save_format) is not None:
            save_format(config, loaded, out)
    else:
        name = hf.origin_of(source).name or str(source)
        peft.save(out, method, to_loop(delta), params=to_loop(loaded.params), base=name)
    cards.write(out, exported)
    return out, step


def import_run(source: str | Path, config: ConfigDict, workdir: str | Path) -> Imported:
    """Makes a workdir whose run is at step 0, with the delta of a folder of any form of `export_run`.

    `load` takes it as it takes a trained run, and `train` resumes it where the config's method has the same factors.

    Raises:
      ValueError: the folder is of no form, or of another base; the workdir holds a run already.

    An example is in `train`.
    """
    workdir = Path(workdir).expanduser()
    if config.get("seeds"):
        config = config.copy_and_resolve_references()
        config.seeds = ()  # one delta is one run
    check(config)
    methods.register_own(config)
    base = bases.load(config, task=task_named(config.data.name))
    method, delta = adapter(source, base)
    with locks.locked(workdir):
        training.claim(workdir, config)
        if checkpoints.latest_step(workdir) is not None:
            raise ValueError(f"{workdir} holds a run already: give a new --workdir")
        method.apply(lj.without_tuned(base.params, delta), delta)  # an error where it does not fit
        tx = training.optimizer(config.optimizer, lambda step: 0.0, spec=method.spec)
        key, dtype = jax.random.key(config.seed), base.model.config.dtype
        state = training.new_state(method, tx, base.params, key, delta, dtype=dtype)
        file = checkpoints.save_adapter(workdir / "adapter", method, delta, base.identity)  # refuses what is not finite
        with checkpoints.manager(workdir) as manager:
            checkpoints.save(manager, 0, state, spec=method.spec, base=base.identity)
        return Imported(delta, file)
