"""Are two adapters alike? A table and heat maps from their files alone, without a base and without a run.

    python -m experiments.study --adapters=FOLDER,FOLDER --out=compared.json

Each is a folder that PEFT wrote, an adapter of ours (a folder or file of `checkpoints.save_adapter`), or a workdir. For
every weight that both change: the cosine of the updates, their distance, and phi of their A's as in section 7.2 of Hu
et al. 2021 beside what random subspaces have. Two adapters of random starts that learnt the same task share the top
directions and little else; one continued from the other shares nearly all.
"""

import itertools
from pathlib import Path

import numpy as np

from experiments.studies.plots import heat_maps
from experiments.studies.reading import Row, shared_directions
from lora_jax import analysis, checkpoints
from lora_jax.interop import peft
from lora_jax.runs import tables

MOST = 8  # weights in the plot


def compare(folders: list[str], out: Path | None) -> None:
    """Prints the table of every two adapters; with `out` writes it, and the heat maps of the first two beside it."""
    if len(folders) < 2:
        raise ValueError(f"--adapters={folders[0]}: name two folders or more, with a comma between")
    read = {folder: updates_of(Path(folder).expanduser()) for folder in folders}
    rows: list[Row] = []
    for one, other in itertools.combinations(read, 2):
        title = f"{Path(one).name} and {Path(other).name}: " if len(read) > 2 else ""
        rows += [{**row, "label": title + row["label"]} for row in rows_of(analysis.compare(read[one], read[other]))]
    print(tables.table(rows))
    if out is not None:
        tables.write_rows(out, rows)
        plot(analysis.compare(*itertools.islice(read.values(), 2)), out.with_suffix(".png"))
        print(f"written: {out} and {out.with_suffix('.png')}")


def updates_of(path: Path) -> dict[str, analysis.Update]:
    """The updates of an adapter, from its files."""
    if (path / "adapter_config.json").is_file():
        return peft.updates(path)
    if (path / "checkpoints").is_dir():
        trained = checkpoints.load(path)
        return analysis.updates(trained.method, trained.delta)
    if not path.exists():
        raise FileNotFoundError(f"--adapters: there is no {path}")
    method, delta, _ = checkpoints.load_adapter(path)
    return analysis.updates(method, delta)


def rows_of(compared: dict[str, analysis.Comparison]) -> list[Row]:
    """A row for each weight, and each layer of a stack."""
    rows = []
    for path, pair in compared.items():
        phi, random = pair.input
        for layer in range(len(phi)):
            row: Row = {"label": path if len(phi) == 1 else f"{path}, layer {layer + 1}"}
            row |= shared_directions(phi[layer], random, at=(1, 4, 8))
            rows.append(row | {"alignment": float(pair.alignment[layer]), "distance": float(pair.distance[layer])})
    return rows


def plot(compared: dict[str, analysis.Comparison], file: Path) -> None:
    """phi of the inputs of the first, the last and some weights between."""
    grids = [
        (path if len(pair.input.phi) == 1 else f"{path}, {layer + 1}", np.asarray(grid))
        for path, pair in compared.items()
        for layer, grid in enumerate(pair.input.phi)
    ]
    chosen = sorted({round(n * (len(grids) - 1) / (MOST - 1)) for n in range(MOST)})
    heat_maps(file, {"phi of A": {grids[n][0][-28:]: grids[n][1] for n in chosen}}, top=1.0)
