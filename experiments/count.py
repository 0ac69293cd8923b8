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

import functools
import importlib
from pathlib import Path
from typing import Any

from absl import flags

from configs.paper_rows import ROWS, PaperRow, compared
from experiments import cli, train
from lora_jax.runs import shapes, tables

flags.DEFINE_bool("all", False, "Counts every row of the paper's Tables 2, 3, 4 and 15.")
flags.declare_key_flag("config")
flags.declare_key_flag("out")


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
            tables.write_rows(Path(out), rows)
        return
    report, head = shapes.count(config)
    print(report)
    if head:
        print(f"head ({', '.join(config.head)}), which the paper does not count: {head:,} more")


@functools.cache
def trained(config: str) -> int:
    """The number of parameters that "FILE.py:NAME" trains, without a head."""
    file, _, name = config.partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return shapes.count(module.get_config(name)).report.trained


def paper_row(row: PaperRow) -> dict[str, Any]:
    """A row of the paper with our count, as JSON."""
    return compared(row, row.formula if row.config is None else trained(row.config))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = [("table", "row", "config", "trained", "paper", "verdict")]
    for row in rows:
        number = "-" if row["trained"] is None else f"{row['trained']:,}"
        lines.append((str(row["table"]), row["label"], row["config"] or "-", number, row["printed"], row["verdict"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<<>><", widths, strict=True))
    return "\n".join(form.format(*line).rstrip() for line in lines)


if __name__ == "__main__":
    cli.run(main)
