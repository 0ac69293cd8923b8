"""Trains what a config says on a pretrained base, or goes on with it.

    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/e2e
    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/r8 \\
      --config.lora.rank=8 --config.base=/models/gpt2-medium --config.data.path=/data/e2e

Every key of the config can be set as --config.KEY=VALUE; the config file lists them and the names
after its colon. The workdir gets config.json, metrics.jsonl, TensorBoard events, loss.png,
checkpoints/ and at the end adapter/ and summary.json. The same command goes on where a run was
stopped: by Ctrl-C, SIGTERM (saves first), SIGKILL or a crash.
"""

import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

import lora_jax as lj
from experiments import bases, cli
from lora_jax import checkpoints, sharding, training
from lora_jax.data import pairs, tasks
from lora_jax.data.batches import Schedule, bucketed
from lora_jax.models import gpt2

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:NAME; see above.")
flags.declare_key_flag("workdir")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    config, workdir = CONFIG.value, Path(flags.FLAGS.workdir)
    training.claim(workdir, config)
    if config.method == "none":
        return evaluate_base(config, workdir)
    job, report = ready(config, workdir)
    if job.start == job.total:
        print(f"{workdir} is trained already: all {job.total} steps are done")
    result = training.train(job)
    if not result.finished:
        return print(f"saved at step {result.step} of {job.total}: the same command goes on")
    file = checkpoints.save_adapter(workdir / "adapter", job.method, result.delta, job.base)
    trained = {"trained": report.trained, "total": report.total}
    summarize(config, workdir, **trained, adapter_bytes=file.stat().st_size, steps=result.step)
    print(f"adapter: {file}")


def ready(config: ConfigDict, workdir: Path) -> tuple[training.Job, lj.Report]:
    """The run, ready to train, and the table of what trains (printed)."""
    model, params, base, batches = load(config)
    method = lj.from_spec(spec(config))
    report = lj.check(method, params)
    print(report)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    job = training.prepare(
        config,
        workdir,
        method=method,
        model=model,
        params=params,
        base=base,
        batches=batches["train"],
        validation=batches["valid"],
        mesh=mesh,
        rules=sharding.gpt2_rules(model.config.vocab_size, mesh),
    )
    return job, report


def spec(config: ConfigDict) -> dict[str, Any]:
    """The spec of the config's method."""
    if config.method not in config:
        raise ValueError(f"method is {config.method!r}, but the config has no options of that name")
    # By way of JSON: to_dict sorts keys, and of a mapping from globs the first match wins.
    options = {"method": config.method, **json.loads(config[config.method].to_json())}
    return options if config.method == "tune" else options | {"axes": dict(gpt2.AXES)}


def load(config: ConfigDict) -> tuple[gpt2.GPT2, Any, dict[str, str], dict[str, Schedule]]:
    """Model, params, the base's identity, and the schedules of "train" and "valid"."""
    task = tasks.named(config.data.name)
    data = {split: task.load(config.data.path, split) for split in ("train", "valid")}
    model, params, tokenizer, identity = bases.load(config)
    schedules = {}
    for split, examples in data.items():
        encoded = pairs.encode(
            examples,
            tokenizer,
            eos=model.config.eos_token_id,
            length=min(config.data.length, model.config.n_positions),
            long=config.data.long,
        )
        schedules[split] = bucketed(encoded, config.data.batch_size, config.seed, buckets=config.data.buckets)
    return model, params, identity, schedules


def evaluate_base(config: ConfigDict, workdir: Path) -> None:
    """Method "none": the validation loss of the base."""
    model, params, _, batches = load(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    rules = sharding.gpt2_rules(model.config.vocab_size, mesh)
    loss = training.validation_loss(model, params, batches["valid"], mesh=mesh, rules=rules)
    with training.Log(workdir, step=-1) as log:
        log.write(0, validation_loss=loss)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    summarize(config, workdir, trained=0, total=total, adapter_bytes=0, steps=0)


def summarize(config: ConfigDict, workdir: Path, **numbers: int) -> None:
    """Writes and prints summary.json: the run in one table row."""
    entries = training.read_metrics(workdir)
    speeds = [e["tokens_per_second"] for e in entries if "tokens_per_second" in e]
    losses = [e["validation_loss"] for e in entries if "validation_loss" in e]
    summary = {
        "command": shlex.join(["python", "-m", "experiments.train", *sys.argv[1:]]),
        "method": config.method,
        "base": config.base,
        "seed": config.seed,
        **numbers,
        "validation_loss": losses[-1],
        "tokens_per_second": round(statistics.median(speeds)) if speeds else None,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    content = json.dumps(summary, indent=2) + "\n"
    checkpoints.write_atomically(workdir / "summary.json", content.encode())
    print(content, end="")


if __name__ == "__main__":
    cli.run(main)
