"""The figures of the studies: grids of heat maps, and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.extras import extra

Curve = tuple[Sequence[float], Sequence[float]]


def heat_maps(file: Path, rows: Mapping[str, Mapping[str, Any]], *, top: float, x: str = "j", y: str = "i") -> None:
    """A row of maps for each title, {title: {title above the map: (n, m)}}, all on one scale from 0 to `top`."""
    with extra("train"):
        from matplotlib.figure import Figure  # slow to import

    columns = max(len(maps) for maps in rows.values())
    figure = Figure(figsize=(1 + 2.4 * columns, 0.6 + 2.3 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), columns, squeeze=False)
    for of_row, (title, maps) in zip(all_axes, rows.items(), strict=True):
        for axes in of_row[len(maps) :]:
            axes.set_visible(False)
        for axes, (above, grid) in zip(of_row, maps.items(), strict=False):
            n, m = np.shape(grid)
            image = axes.imshow(
                grid, vmin=0, vmax=top, aspect="auto", cmap="viridis", extent=(0.5, m + 0.5, n + 0.5, 0.5)
            )
            axes.set_title(above, size=9)
            axes.tick_params(labelsize=7)
            axes.locator_params(integer=True, nbins=5)
            axes.set_xlabel(x, size=8)
        of_row[0].set_ylabel(f"{title}\n{y}", size=9)
    figure.colorbar(image, ax=all_axes, shrink=0.8)
    figure.savefig(file, dpi=90)


def curves(
    file: Path, panels: Mapping[str, Mapping[str, Curve]], *, x: str, y: str, log: bool = True, marker: str = "o-"
) -> None:
    """A diagram for each title with a line for each name, {title: {name: (xs, ys)}}; what is not finite is left out."""
    with extra("train"):
        from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(1 + 5 * len(panels), 4.5), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, (xs, ys) in lines.items():
            pairs = [(a, b) for a, b in zip(xs, ys, strict=True) if np.isfinite(b)]
            axes.plot(*np.transpose(pairs), marker, label=name, markersize=4)
        axes.set(xlabel=x, ylabel=y, title=title, xscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=100)
