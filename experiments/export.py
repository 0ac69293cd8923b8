"""Gives a run away, or takes one in: as a merged model, as an adapter of PEFT, or as an adapter of our own.

    python -m experiments.export --workdir=runs/mrpc/seed_0 --form=merged --out=mrpc-roberta
    python -m experiments.export --workdir=runs/e2e --form=peft --out=e2e-peft
    python -m experiments.export --workdir=runs/e2e --form=native --out=e2e-adapter

    python -m experiments.export --source=e2e-peft --config=configs/e2e.py:medium --workdir=runs/imported

The first three write a run's delta (of its best epoch, where the config says what is best): `merged` is a Hugging Face
folder that transformers loads, of the base's speed; `peft` one for PeftModel.from_pretrained; `native` one file that
lora_jax.checkpoints.load_adapter reads.

With --source, a folder in one of those forms, a new workdir begins with that delta at step 0: evaluate, generate and
predict take it as they take a trained run, and train goes on from it where the config's method has the same factors.
"""

import math
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax as lj
from experiments import cli, reload, train
from lora_jax import checkpoints, training
from lora_jax.distributed import sharding
from lora_jax.interop import hf, peft
from lora_jax.models.layouts import to_loop
from lora_jax.runs import bases, methods

flags.DEFINE_enum("form", None, ["merged", "peft", "native"], "What to write.")
flags.DEFINE_string("source", None, "A folder to take in: its form is found.")
flags.declare_key_flag("out")
flags.declare_key_flag("workdir")
flags.declare_key_flag("base")
flags.declare_key_flag("config")
flags.mark_flag_as_required("workdir")


def main() -> None:
    values = flags.FLAGS
    workdir = Path(values.workdir)
    if values.source:
        if not train.CONFIG.value or values.form or values.out:
            raise ValueError("--source goes with --config and a new --workdir, and without --form and --out")
        return take_in(Path(values.source), train.CONFIG.value, workdir)
    if not (values.form and values.out):
        raise ValueError("give --form and --out to write a run, or --source to take one in")
    give_away(workdir, values.form, Path(values.out), values.base)


def give_away(workdir: Path, form: str, out: Path, source: str | None = None) -> None:
    """Writes the delta of a run, or what it makes of the base."""
    config = reload.config_of(workdir)
    method, delta, step, trained_on = reload.trained(workdir, config)
    if form == "native":
        out = checkpoints.save_adapter(out, method, delta, trained_on)
    else:
        mesh = _mesh(config)
        base = bases.load(config, source, mesh)
        checkpoints.check_base(trained_on, base.identity, workdir)
        if form == "merged":
            if mesh is not None:
                adapted = jax.eval_shape(method.apply, base.params, delta)
                rules = sharding.rules_for(base.model, mesh)
                delta = jax.device_put(delta, sharding.shardings(delta, mesh, rules, adapted))
            hf.save(out, base.model, method.apply(base.params, delta), base.tokenizer, merge=True)
        else:
            peft.save(out, method, to_loop(delta), params=to_loop(base.params))
    print(f"written: {out}, of step {step}")


def _mesh(config: ConfigDict) -> Mesh | None:
    """The run's own mesh where it has several devices and they are there: its base may be too large for one."""
    shape = config.mesh.to_dict() if config.get("mesh") else {}
    return sharding.make_mesh(shape) if 1 < math.prod(shape.values()) <= jax.device_count() else None


def take_in(source: Path, config: ConfigDict, workdir: Path) -> None:
    """A workdir at step 0, with the delta of the folder."""
    if config.get("seeds"):
        config = config.copy_and_resolve_references()
        config.seeds = ()  # one delta is one run
    methods.know(config)
    base = bases.load(config)
    method, delta = found(source, base)
    training.claim(workdir, config)
    if checkpoints.latest_step(workdir) is not None:
        raise ValueError(f"{workdir} holds a run already: give a new --workdir")
    method.apply(lj.without_tuned(base.params, delta), delta)  # an error where it does not fit
    tx, dtype = training.optimizer(config.optimizer, lambda step: 0.0, spec=method.spec), base.model.config.dtype
    state = training.new_state(method, tx, base.params, jax.random.key(config.seed), delta, dtype=dtype)
    with checkpoints.manager(workdir) as manager:
        checkpoints.save(manager, 0, state, spec=method.spec, base=base.identity)
    file = checkpoints.save_adapter(workdir / "adapter", method, delta, base.identity)
    print(f"taken from {source}: {len(delta)} entries; {workdir} begins with them at step 0, and {file} holds them")


def found(source: Path, base: bases.Base) -> tuple[lj.ParamTransform, lj.Delta]:
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
    return merged(source, base)


def merged(source: Path, base: bases.Base) -> tuple[lj.ParamTransform, lj.Delta]:
    """A whole model as a delta that replaces every leaf of the base."""
    head: dict[str, Any] = {}
    if kind := getattr(base.model.config, "head", None):
        head = {"head": kind, "labels": base.model.config.labels}
    params = hf.load(source, **head)[1]
    if base.model.config.scan_layers:
        raise ValueError(f"{source}: a whole model is taken in with --config.model.scan_layers=False")
    method = lj.tune(lj.select("**"))
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (params, base.params)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{source} is no model of the shapes of the base {base.identity['source']}")
    return method, method.init(jax.random.key(0), params)


if __name__ == "__main__":
    cli.run(main)
