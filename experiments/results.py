"""The tables of the README from docs/results: figures there come from files, never by hand.

    python -m experiments.results                    # writes the README's tables anew
    python -m experiments.results --name=e2e --run="frozen base:runs/frozen" --run="LoRA:runs/lora"

The second form first collects runs into docs/results/NAME.json, a row for each LABEL:WORKDIR, from
what experiments.train and experiments.evaluate left there. The README says where a table goes:

    <!-- results: e2e -->
    <!-- end -->
"""

import json
import re
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from lora_jax.checkpoints import write_atomically

flags.DEFINE_string("name", None, "Collects the runs under this name.")
flags.DEFINE_multi_string("run", [], "LABEL:WORKDIR, a row of the table; as often as there are.")
flags.DEFINE_string("readme", "README.md", "The file whose tables are written.")
flags.DEFINE_string("folder", "docs/results", "Where the figures are.")

COLUMNS = {
    "trained": ("trained parameters", "{:,}"),
    "adapter_bytes": ("adapter, bytes", "{:,}"),
    "validation_loss": ("validation loss", "{:.4f}"),
    "bleu": ("test BLEU", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:,}"),
    "relative_speed": ("relative to full fine-tuning", "{:.2f}"),
}


def main() -> None:
    values = flags.FLAGS
    folder = Path(values.folder)
    if values.run and not values.name:
        raise ValueError("--run needs --name: docs/results/NAME.json is written")
    if values.name:
        rows = [collect(run) for run in values.run]
        content = json.dumps({"rows": rows}, indent=2) + "\n"
        write_atomically(folder / f"{values.name}.json", content.encode())
    readme = Path(values.readme)
    write_atomically(readme, fill(readme.read_text(), folder).encode())


def collect(run: str) -> dict[str, Any]:
    """A run's summary.json, with the BLEU of its evaluation on test if there is one."""
    label, _, workdir = run.rpartition(":")
    if not label:
        raise ValueError(f"--run={run!r}: write LABEL:WORKDIR")
    summary = Path(workdir) / "summary.json"
    if not summary.is_file():
        raise FileNotFoundError(f"{summary} does not exist: experiments.train writes it at its end")
    row = {"label": label} | json.loads(summary.read_text())
    del row["tokens_per_second"]  # runs share the machine with whatever else it does: experiments.benchmark compares
    for params in ("merged", "adapted", "base"):
        evaluation = Path(workdir) / "evaluation" / f"test-{params}" / "evaluate.json"
        if evaluation.is_file():
            found = json.loads(evaluation.read_text())
            return row | {"bleu": found["bleu"], "contexts": found["contexts"]}
    return row


def fill(text: str, folder: Path) -> str:
    """The text with each marked table written anew."""

    def table_of(match: re.Match) -> str:
        file = folder / f"{match[1]}.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, but a table is marked {match[1]!r}")
        return f"<!-- results: {match[1]} -->\n{table(json.loads(file.read_text())['rows'])}<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- end -->", table_of, text, flags=re.S)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, with the commands below."""
    shown = {name: form for name, form in COLUMNS.items() if any(name in row for row in rows)}
    lines = [["", *(title for title, _ in shown.values())], ["---", *("---:" for _ in shown)]]
    for row in rows:
        cells = (form.format(row[name]) if row.get(name) is not None else "-" for name, (_, form) in shown.items())
        lines.append([row["label"], *cells])
    parts = ["| " + " | ".join(line) + " |" for line in lines]
    commands = [row["command"] for row in rows if "command" in row]
    if commands:
        parts += ["", f"Seed {rows[0]['seed']}, {rows[0]['device']}:", "", "```sh", *commands, "```"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    cli.run(main)
