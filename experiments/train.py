"""Trains what a config says on a pretrained base, or goes on with it.

    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/e2e
    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/r8 \\
      --config.lora.rank=8 --config.base=/models/gpt2-medium --config.data.path=/data/e2e

Every key of the config can be set as --config.KEY=VALUE; the config file lists them and the names
after its colon. The workdir gets config.json, metrics.jsonl, TensorBoard events, loss.png,
checkpoints/ and at the end adapter/ and summary.json; where the config has several seeds, a folder
for each and the medians in summary.json. The same command goes on where a run was stopped: by
Ctrl-C, SIGTERM (saves first), SIGKILL or a crash.

Several values train at once, in one program, every combination in a folder of its own:

    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/sweep \\
      --config.sweep.learning_rate=1e-4,2e-4,5e-4 --config.sweep.rank=4,8

One run on many devices, and of many processes: docs/distributed.md.
"""

import json
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

import lora_jax as lj
from experiments import cli, summaries, sweeps
from lora_jax import checkpoints, training
from lora_jax.distributed import processes, sharding
from lora_jax.runs import bases
from lora_jax.runs import tasks as setups

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:NAME; see above.")
flags.declare_key_flag("workdir")


def main() -> None:
    config, workdir = CONFIG.value, Path(flags.FLAGS.workdir)
    if sweeps.asked(config):
        return sweeps.train(config, workdir)
    if config.get("seeds"):
        return train_seeds(config, workdir)
    train(config, workdir)


def train(config: ConfigDict, workdir: Path) -> bool:
    """Trains one run to its end, or until it is stopped: then False."""
    training.claim(workdir, config)
    if config.method == "none":
        evaluate_base(config, workdir)
        return True
    job, report = ready(config, workdir)
    if job.start == job.total:
        print(f"{workdir} is trained already: all {job.total} steps are done")
    result = training.train(job)
    if not result.finished:
        print(f"saved at step {result.step} of {job.total}: the same command goes on")
        return False
    file = workdir / "adapter" / "adapter.safetensors"
    if not config.get("best"):  # else the best is there already
        checkpoints.save_adapter(file, job.method, result.delta, job.base)
    if processes.first():
        trained = {"trained": report.trained, "total": report.total}
        numbers = trained | {"adapter_bytes": file.stat().st_size, "steps": result.step}
        summaries.write(workdir, summaries.of(config, workdir, **numbers))
    print(f"adapter: {file}")
    return True


def train_seeds(config: ConfigDict, workdir: Path) -> None:
    """A run for each of the config's seeds, in seed_0, seed_1, ...; their medians and ranges go into summary.json."""
    runs, found = {}, []
    for seed in config.seeds:
        runs[workdir / f"seed_{seed}"] = own = config.copy_and_resolve_references()
        own.seed, own.seeds = seed, ()
    for folder, own in runs.items():
        if processes.by_first(folder.is_dir):
            training.claim(folder, own)  # before anything is written: another config is refused
    training.claim(workdir, config)
    for folder, own in runs.items():
        file = folder / "summary.json"
        if not processes.by_first(file.is_file) and not train(own, folder):
            return
        found.append(json.loads(processes.by_first(file.read_text)))
    if not processes.first():
        return
    scores = {name: [summary[name] for summary in found] for name in found[0]["validation"]}
    spreads = {name: cli.spread(values) for name, values in scores.items()}
    summaries.write(workdir, found[0] | spreads | {"seed": list(config.seeds), "command": cli.command("train")})


def ready(config: ConfigDict, workdir: Path) -> tuple[training.Job, lj.Report]:
    """The run, ready to train, and the table of what trains (printed)."""
    mesh = bases.mesh_of(config)
    setup = setups.load(config, mesh)
    model, params = setup.base.model, setup.base.params
    method = lj.from_spec(setup.spec)
    report = lj.check(method, params)
    print(report)
    job = training.prepare(
        config,
        workdir,
        method=method,
        model=model,
        params=params,
        base=setup.base.identity,
        batches=setup.batches["train"],
        validation=setup.batches["valid"],
        objective=setup.objective,
        known=setups.warm_start(config, method, setup.base),
        mesh=mesh,
        rules=sharding.rules_for(model, mesh),
    )
    return job, report


def evaluate_base(config: ConfigDict, workdir: Path) -> None:
    """Method "none": the validation loss, and the task's metrics, of the base."""
    mesh = bases.mesh_of(config)
    setup = setups.load(config, mesh)
    params = setup.base.params
    rules = sharding.rules_for(setup.base.model, mesh)
    found = training.validate(setup.objective, params, setup.batches["valid"], mesh=mesh, rules=rules)
    with training.Log(workdir, step=-1) as log:
        log.write(0, **found)
    if processes.first():
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        summaries.write(workdir, summaries.of(config, workdir, trained=0, total=total, adapter_bytes=0, steps=0))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
