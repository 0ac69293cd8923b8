"""The tables of the documentation from docs/results: figures there come from files, never by hand.

    python -m experiments.results                    # writes the tables of README.md and of docs/**/*.md anew
    python -m experiments.results --name=e2e --run="frozen base:runs/frozen" --run="LoRA:runs/lora"
    python -m experiments.results --readme=page.md   # those of one page

The second form first collects runs into docs/results/NAME.json, a row for each LABEL:WORKDIR, from
what experiments.train and experiments.evaluate left there; rows of other labels stay. Other
experiments write such a file themselves, with --out. A page says where a table goes:

    <!-- results: e2e -->
    <!-- end -->

and `results: benchmark_cpu step` takes those rows whose labels begin with step.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from lora_jax.checkpoints import write_atomically
from lora_jax.runs import tables

flags.DEFINE_string("name", None, "Collects the runs under this name.")
flags.DEFINE_multi_string("run", [], "LABEL:WORKDIR, a row of the table; as often as there are.")
flags.DEFINE_string("readme", None, "The one page whose tables are written; by default README.md and all of docs.")
flags.DEFINE_string("folder", "docs/results", "Where the figures are.")


def main() -> None:
    values = flags.FLAGS
    folder = Path(values.folder)
    if bool(values.run) != bool(values.name):
        raise ValueError("--name and --run go together: docs/results/NAME.json gets a row for each run")
    if values.name:
        rows = [row for run in values.run for row in collect(run)]
        tables.add_rows(folder / f"{values.name}.json", rows)
    for page in [Path(values.readme)] if values.readme else pages():
        text = page.read_text()
        if (filled := tables.fill(text, folder)) != text:
            write_atomically(page, filled.encode())
            print(f"wrote the tables of {page}")


def pages() -> list[Path]:
    """README.md and the pages of the documentation, without what is built of them."""
    return [Path("README.md"), *(page for page in sorted(Path("docs").rglob("*.md")) if page.parts[1] != "_build")]


def collect(run: str) -> list[dict[str, Any]]:
    """The rows of LABEL:WORKDIR."""
    label, _, workdir = run.rpartition(":")
    if not label:
        raise ValueError(f"--run={run!r}: write LABEL:WORKDIR")
    return tables.rows_of(label, workdir)


if __name__ == "__main__":
    cli.run(main)
