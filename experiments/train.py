"""Trains what a config says on a pretrained base, or resumes it.

    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/e2e
    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/r8 \\
      --config.lora.rank=8 --config.base=/models/gpt2-medium --config.data.path=/data/e2e

Every key of the config can be set as --config.KEY=VALUE; lora_jax/runs/config.py lists them, the
config file the names after its colon. The workdir gets config.json, metrics.jsonl, TensorBoard events, loss.png,
checkpoints/ and at the end adapter/ and summary.json; where the config has several seeds, a folder
for each and the medians in summary.json. The same command resumes a run that was stopped: Ctrl-C (SIGINT), SIGTERM and
SIGHUP save it after the step and end it with status 128 + the signal's number, a second one ends it at once; SIGKILL or
a crash cost the steps since the last checkpoint. A workdir that another process writes is refused.

Several values train at once, in one program, every combination each in its folder:

    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/sweep \\
      --config.sweep.learning_rate=1e-4,2e-4,5e-4 --config.sweep.rank=4,8

One run on many devices, and of many processes: docs/how_to/devices.md.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

import lora_jax as lj
from experiments import cli
from lora_jax import runs
from lora_jax.runs import tables

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:NAME; see above.")
flags.declare_key_flag("workdir")


def main() -> None:
    config, workdir = CONFIG.value, Path(flags.FLAGS.workdir)
    (sweep if runs.is_sweep(config) else train)(config, workdir)


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains to the end; an InterruptedError where a signal stopped it."""
    result = runs.train(config, workdir, command=cli.command("train"), started=show_start, ended=show_end)
    if not result.finished:
        run = result.members[-1] if result.members else result
        end = f"saved at step {run.step} of {run.total}" if run.step else "stopped before the first step"
        raise InterruptedError(f"{end}: the same command resumes it")


def show_start(run: runs.Prepared) -> None:
    print(run.report)
    if run.warm_start:
        print(run.warm_start)
    if run.job.start == run.job.total:
        print(f"{run.workdir} is trained already: all {run.job.total} steps are done")


def show_end(result: runs.RunResult) -> None:
    if result.summary:
        print(json.dumps(result.summary, indent=2))
    if result.adapter:
        print(f"adapter: {result.adapter}")


def sweep(config: ConfigDict, workdir: Path) -> None:
    def show(report: lj.Report, names: list[str]) -> None:
        print(f"{report}\n{len(names)} members: {'; '.join(names)}")

    result = runs.sweep(config, workdir, command=cli.command("train"), started=show)
    if not result.finished:
        raise InterruptedError(f"saved before step {result.total}: the same command resumes it")
    if result.rows:
        print(tables.table([row | {"command": None} for row in result.rows]))
        print(f"plot: {workdir / 'sweep.png'}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
