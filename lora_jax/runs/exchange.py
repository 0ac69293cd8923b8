"""Exporting and importing runs: as a merged model, as an adapter of PEFT, or as an adapter of lora_jax."""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import Delta, ParamTransform, checkpoints, training
from lora_jax.distributed import sharding
from lora_jax.interop import hf, peft
from lora_jax.models.family import family_of
from lora_jax.models.layouts import to_loop
from lora_jax.runs import bases, methods
from lora_jax.runs.reload import read_config, trained

Form = Literal["merged", "peft", "native"]


class Imported(NamedTuple):
    """What `import_run` made: the delta, and the file that holds it besides the workdir's checkpoint of step 0."""

    delta: Delta
    adapter: Path


def export_run(workdir: str | Path, form: Form, out: str | Path, *, base: str | None = None) -> tuple[Path, int]:
    """Writes the delta of a run, or what it makes of the base.

    Args:
      workdir: of a run; of its best epoch, where its config says what is best.
      form: "merged", a Hugging Face folder that transformers loads, of the base's speed; "peft", one for
        `PeftModel.from_pretrained`; "native", what `checkpoints.load_adapter` reads.
      out: the folder.
      base: where the base is, if no longer where the run's config says.

    Returns: what was written, and the step that it is of.
    """
    workdir, out = Path(workdir), Path(out)
    config = read_config(workdir)
    method, delta, step, trained_on = trained(workdir, config)
    if form == "native":
        return checkpoints.save_adapter(out, method, delta, trained_on), step
    mesh = _mesh(config)
    loaded = bases.load(config, base, mesh)
    checkpoints.check_base(trained_on, loaded.identity, workdir)
    if form == "merged":
        if mesh is not None:
            adapted = jax.eval_shape(method.apply, loaded.params, delta)
            delta = jax.device_put(delta, loaded.placement.shardings(delta, adapted))
        hf.save(out, loaded.model, method.apply(loaded.params, delta), loaded.tokenizer, merge=True)
    else:
        peft.save(out, method, to_loop(delta), params=to_loop(loaded.params))
    return out, step


def _mesh(config: ConfigDict) -> Mesh | None:
    """The mesh of the run where it has several devices and they are there: its base may be too large for one."""
    shape = config.mesh.to_dict() if config.get("mesh") else {}
    return sharding.make_mesh(shape) if 1 < math.prod(shape.values()) <= jax.device_count() else None


def import_run(source: str | Path, config: ConfigDict, workdir: str | Path) -> Imported:
    """Makes a workdir whose run is at step 0, with the delta of a folder of any form of `export_run`.

    `load` takes it as it takes a trained run, and `train` resumes it where the config's method has the same factors.

    Raises:
      ValueError: the folder is of no form, or of another base; the workdir holds a run already.
    """
    source, workdir = Path(source), Path(workdir)
    if config.get("seeds"):
        config = config.copy_and_resolve_references()
        config.seeds = ()  # one delta is one run
    methods.register_own(config)
    base = bases.load(config)
    method, delta = read_source(source, base)
    training.claim(workdir, config)
    if checkpoints.latest_step(workdir) is not None:
        raise ValueError(f"{workdir} holds a run already: give a new --workdir")
    method.apply(lj.without_tuned(base.params, delta), delta)  # an error where it does not fit
    tx = training.optimizer(config.optimizer, lambda step: 0.0, spec=method.spec)
    dtype = base.model.config.dtype
    state = training.new_state(method, tx, base.params, jax.random.key(config.seed), delta, dtype=dtype)
    with checkpoints.manager(workdir) as manager:
        checkpoints.save(manager, 0, state, spec=method.spec, base=base.identity)
    return Imported(delta, checkpoints.save_adapter(workdir / "adapter", method, delta, base.identity))


def read_source(source: Path, base: bases.Base) -> tuple[ParamTransform, Delta]:
    """Method and delta of a folder of any form.

    Raises:
      ValueError: it is of none, or of another base.
    """
    if (source / "adapter.safetensors").is_file() or source.suffix == ".safetensors":
        return bases.adapter(source, base)
    if (source / "adapter_config.json").is_file():
        return peft.load(source, base.params)
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} holds no adapter.safetensors, adapter_config.json or config.json")
    return _merged(source, base)


def _merged(source: Path, base: bases.Base) -> tuple[ParamTransform, Delta]:
    """A model as a delta that replaces every leaf of the base."""
    head: dict[str, Any] = {}
    if family_of(base.model).with_head and (kind := base.model.config.head):
        head = {"head": kind, "labels": base.model.config.labels}
    params = hf.load(source, **head)[1]
    if base.model.config.scan_layers:
        raise ValueError(f"{source}: a merged model is imported with --config.model.scan_layers=False")
    method = lj.tune(lj.select("**"))
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (params, base.params)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{source} is no model of the shapes of the base {base.identity['source']}")
    return method, method.init(jax.random.key(0), params)
