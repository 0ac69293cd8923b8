"""What trains, counted from shapes alone: no weights are read or made.

    python -m experiments.count --config=configs/e2e.py:medium
    python -m experiments.count --config=configs/glue.py:base,mrpc,adapter_p --config.adapter.rank=32
    python -m experiments.count --config=configs/e2e.py:small --config.base=FOLDER
    python -m experiments.count --all --out=docs/results/count.json

The first three print a config's table: every path that trains, and their sum. The base is of the size that the config
names, or as the config.json of a FOLDER says. A head trains too but stands apart, since the paper counts none; the
pooler that a BERT may lack, and then has to learn, is not known without its weights.

--all prints every row of the paper's Tables 2, 3, 4 and 15: the exact count of the config of that row, the paper's
figure, and whether they are equal to the digits that it prints. Where they are not, the arithmetic says what is; no
config was made to fit a figure. --out writes these rows as JSON, for experiments.results.
"""

import dataclasses
import functools
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

import lora_jax as lj
from configs import nlg
from experiments import cli, train
from experiments.paper_rows import ROWS, PaperRow
from lora_jax.checkpoints import write_atomically
from lora_jax.core.selection import flatten, matches
from lora_jax.data import glue
from lora_jax.interop import hf
from lora_jax.models import encoder, gpt2
from lora_jax.runs import methods

flags.DEFINE_bool("all", False, "Counts every row of the paper's Tables 2, 3, 4 and 15.")
flags.declare_key_flag("config")
flags.declare_key_flag("out")

# The bases that the configs name, by these names.
NAMED: dict[str, Any] = {
    **{name: gpt2.SIZES[size] for size, name in nlg.SIZES.items()},
    "gpt3": gpt2.SIZES["gpt3"],
    **{f"FacebookAI/{size}": encoder.SIZES[size] for size in ("roberta-base", "roberta-large")},
}
UNITS = {"M": 1e6, "B": 1e9}


class Counted(NamedTuple):
    """What trains without the head, as the paper counts, and how many numbers of the head train besides."""

    report: lj.Report
    head: int


def main() -> None:
    config, every, out = train.CONFIG.value, flags.FLAGS.all, flags.FLAGS.out
    if every == bool(config):
        raise ValueError("give --config=FILE.py:NAME to count one config, or --all for the rows of the paper")
    if out and not every:
        raise ValueError("--out goes with --all")
    if every:
        rows = list(map(paper_row, ROWS))
        print(table(rows))
        if out:
            write_atomically(out, (json.dumps({"rows": rows}, indent=2) + "\n").encode())
        return
    counted = count(config)
    print(counted.report)
    if counted.head:
        print(f"head ({', '.join(config.head)}), which the paper does not count: {counted.head:,} more")


def count(config: ConfigDict) -> Counted:
    """What a config trains.

    Raises:
      ValueError: it names no base whose shape is known, or one of another kind than its task; the method does not fit.
    """
    model = of_base(config)
    params, heads = shapes(model), config.get("head", ())
    in_head = lambda path: any(matches(glob, path) for glob in heads)  # noqa: E731
    rows: list[Any] = []
    if config.method != "none":
        rows = lj.check(lj.from_spec(methods.spec(config, model)), params).rows
    own = [row for row in rows if not in_head(row.path)]
    total = sum(leaf.size for path, leaf in flatten(params)[0] if not in_head(path))
    trained = sum(row.trained for row in own)
    return Counted(lj.Report(own, trained, total), sum(row.trained for row in rows) - trained)


def of_base(config: ConfigDict) -> Any:
    """The model of a config's base, as the config's `model` says, with the head of its task."""
    shape, task, changes = shape_of(config.base), glue.TASKS.get(config.data.name), config.model.to_dict()
    kind: Any = encoder.EncoderConfig if task else gpt2.GPT2Config
    if not isinstance(shape, kind):
        raise ValueError(f"{config.base} is of {type(shape).__name__}, but {config.data.name} needs {kind.__name__}")
    if task is None:
        return gpt2.GPT2(dataclasses.replace(shape, **changes))
    changes |= {"head": "classification" if task.labels else "regression", "labels": task.outputs}
    return encoder.Encoder(dataclasses.replace(shape, **changes, pooler=shape.family == "bert"))


def shape_of(base: str) -> Any:
    """The model config of a base: its folder's, or that of the size it names."""
    if Path(base).is_dir():
        return hf.without_weights(base).config
    if base in NAMED:
        return NAMED[base]
    raise ValueError(
        f"the shape of the base {base!r} is not known: give a folder with its config.json (--config.base=FOLDER), "
        f"or one of {', '.join(NAMED)}"
    )


@functools.cache
def shapes(model: Any) -> Any:
    """The parameters of a model as shapes."""
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


@functools.cache
def trained(config: str) -> int:
    """What "FILE.py:NAME" trains, without a head."""
    file, _, name = config.partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return count(module.get_config(name)).report.trained


def paper_row(row: PaperRow) -> dict[str, Any]:
    """A row of the paper with our count, as JSON: label, table, config, trained, printed, verdict.

    Raises:
      ValueError: the count is not the paper's, and the row does not say why.
    """
    number = row.formula if row.config is None else trained(row.config)
    if number is not None and agrees(number, row.printed):
        verdict = "; ".join(filter(None, ["equal", row.note]))
    elif row.note:
        verdict = row.note
    else:
        raise ValueError(f"Table {row.table}, {row.label}: {number:,} is not {row.printed}, and no note says why")
    found = {"label": row.label, "table": row.table, "config": row.config, "trained": number}
    return found | {"printed": row.printed, "verdict": verdict}


def agrees(number: int, printed: str) -> bool:
    """Whether a count rounds to a printed figure.

    >>> agrees(11_089_152, "11.09M"), agrees(11_064_576, "11.09M")
    (True, False)
    """
    figure, unit = printed[:-1], printed[-1]
    decimals = len(figure.partition(".")[2])
    return f"{number / UNITS[unit]:,.{decimals}f}" == figure


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    header = ("table", "row", "config", "trained", "paper", "verdict")
    lines = [header]
    for row in rows:
        number = "-" if row["trained"] is None else f"{row['trained']:,}"
        lines.append((str(row["table"]), row["label"], row["config"] or "-", number, row["printed"], row["verdict"]))
    widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
    sides = ["<", "<", "<", ">", ">", "<"]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(form.format(*line).rstrip() for line in lines)


if __name__ == "__main__":
    cli.run(main)
