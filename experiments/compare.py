"""Whether two runs differ: paired bootstrap over what experiments.evaluate left of both.

    python -m experiments.compare --runs=runs/lora,runs/full --split=test --params=adapted

For each score: the first run's minus the second's, with its 95% interval, and p: how often the choice of test contexts
alone would give a difference as large.
"""

from pathlib import Path

from absl import flags

from experiments import cli
from lora_jax.metrics import paired
from lora_jax.runs.evaluation import prepared, read_predictions
from lora_jax.runs.reload import read_config
from lora_jax.runs.tasks import task_in

flags.DEFINE_list("runs", None, "Two workdirs.")
flags.declare_key_flag("code")
flags.declare_key_flag("split")
flags.DEFINE_string(
    "params", "adapted", "Of which evaluation: adapted, base, merged, or adapted-first200 of --limit=200."
)
flags.DEFINE_enum("missing", None, ["first", "empty"], "As for experiments.evaluate.")
flags.mark_flag_as_required("runs")


def main() -> None:
    values = flags.FLAGS
    if len(values.runs) != 2:
        raise ValueError(f"--runs={','.join(values.runs)}: give two workdirs with a comma between")
    folders = [Path(run) / "evaluation" / f"{values.split or 'test'}-{values.params}" for run in values.runs]
    first, second = (read_predictions(folder) for folder in folders)
    if [row["context"] for row in first] != [row["context"] for row in second]:
        raise ValueError(f"{folders[0]} and {folders[1]} are of other contexts")
    task = task_in(read_config(values.runs[0])).text
    if task is None:
        raise ValueError(f"{values.runs[0]} is a run that writes no texts")
    (hypotheses, references), (others, _) = prepared(first, task), prepared(second, task)
    for name, row in paired(hypotheses, others, references, style=task.style, missing=values.missing).items():
        print(f"{name:10}{row['difference']:+.4f}  [{row['low']:+.4f}, {row['high']:+.4f}]  p = {row['p']:.4f}")


if __name__ == "__main__":
    cli.run(main)
