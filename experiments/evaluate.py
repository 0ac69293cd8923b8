"""Scores a run: one text for every distinct context of a split, by the official scores of its data.

    python -m experiments.evaluate --workdir=runs/e2e
    python -m experiments.evaluate --workdir=runs/e2e --params=base --split=valid --limit=100 --num_beams=1

Decodes as the config says, or the flags. Writes evaluation/SPLIT-PARAMS/ into the workdir: predictions.jsonl (context,
prediction, references) and evaluate.json (the numbers that it prints, with 95% bootstrap intervals). The same command
resumes what was stopped. experiments.compare compares two runs.
"""

from typing import Any

from absl import flags

from experiments import cli, reload
from lora_jax import runs

flags.declare_key_flag("split")
flags.declare_key_flag("data")
flags.DEFINE_integer("limit", None, "Only so many contexts, the first ones.", lower_bound=1)
flags.DEFINE_enum(
    "missing",
    None,
    ["first", "empty"],
    "WebNLG, DART: what stands for references that a context lacks to have as many as the others: its first one (the "
    "authors' way) or an empty one (multi-bleu's).",
)
flags.adopt_module_key_flags(reload)
flags.declare_key_flag("workdir")
flags.mark_flag_as_required("workdir")


def main() -> None:
    values = flags.FLAGS
    folder, result = runs.evaluate(
        reload.load(),
        split=values.split or "test",
        data=values.data,
        limit=values.limit,
        missing=values.missing,
        command=cli.command("evaluate"),
        **reload.options(),
    )
    show(result)
    print(f"written: {folder}")


def show(result: dict[str, Any]) -> None:
    """Prints the result as a table."""
    for name, value in result.items():
        if name != "scores":
            print(f"{name:18}{value:.4f}" if isinstance(value, float) else f"{name:18}{value}")
    for part, scores in result["scores"].items():
        for name, value in scores.items():
            label = name if part == "all" else f"{name} ({part})"
            print(f"{label:18}{value['score']:.4f}  [{value['low']:.4f}, {value['high']:.4f}]")


if __name__ == "__main__":
    cli.run(main)
