"""The benchmark's figures: ratios, rows of the documentation's tables, files, the plot."""

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.benchmark.contests import OURS, Contest
from lora_jax import checkpoints

Seconds = dict[str, dict[str, list[float]]]  # by side and part, one of each round


def wanted(name: str, globs: Sequence[str]) -> bool:
    """Whether a contest is asked for; without globs all but the sweep, which takes its time."""
    return any(fnmatch.fnmatch(name, glob) for glob in globs) if globs else name != "sweep"


def check_loss(name: str, loss: float, expected: float) -> None:
    """A ValueError unless a side's first step has our first step's loss."""
    if not abs(loss - expected) <= 1e-4 * expected:
        raise ValueError(f"{name} has a loss of {loss} in its first step, ours is {expected}: that is other work")


def ratios(contest: Contest, seconds: Seconds, sides: dict[str, Any]) -> dict[str, Any]:
    """Of each peer: its time over ours, part by part, and its memory; the same over their floors."""
    ratios_of: dict[str, Any] = {}
    ours = seconds[OURS]
    for name, theirs in seconds.items():
        if name == OURS:
            continue
        ratios_of[name] = {"peak": sides[name]["peak"] / sides[OURS]["peak"]}
        for part in contest.parts:
            if part != "floor":
                label = "ratio" if part == "unit" else part
                ratios_of[name] |= _spread(label, _over(theirs[part], ours[part]))
        if "floor" in contest.parts:
            over_floor = (_over(times["unit"], times["floor"]) for times in (theirs, ours))
            ratios_of[name] |= _spread("normalised", _over(*over_floor))
    if "floor" in contest.parts:
        ratios_of[OURS] = _spread("over_floor", _over(ours["unit"], ours["floor"]))
    return ratios_of


def _over(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _spread(label: str, values: Sequence[float]) -> dict[str, float]:
    spread = cli.spread(values)
    return {f"{label}_{name}": spread[key] for name, key in (("median", "score"), ("low", "low"), ("high", "high"))}


def rows_of(contests: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of the table for each peer of each contest."""
    rows = []
    for name, contest in contests.items():
        for peer, ratios in contest["ratios"].items():
            row = {"label": f"{name}/{peer}", **{key: contest["how"][key] for key in ("command", "device", "seed")}}
            row |= {"times_peak": ratios["peak"]} if "peak" in ratios else {}
            for label in (key.removesuffix("_median") for key in ratios if key.endswith("_median")):
                row[f"times_{label}"] = {
                    w: ratios[f"{label}_{k}"] for w, k in (("score", "median"), ("low", "low"), ("high", "high"))
                }
            rows.append(row)
    return rows


def write(file: Path, content: dict[str, Any]) -> None:
    """The file, its rows for the documentation's tables, the ratios by their paths, and the plot."""
    tree: dict[str, Any] = {}
    for name, contest in content["contests"].items():
        at = tree
        for key in name.split("/"):
            at = at.setdefault(key, {})
        at |= contest["ratios"]
    content = {"contests": content["contests"], "rows": rows_of(content["contests"]), **tree}
    checkpoints.write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())
    plot(content["rows"], file.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """The ratios as bars, raw and normalised."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if "times_ratio" in row]
    if not shown:
        return
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(shown):
        spread = row["times_ratio"]
        error = [[spread["score"] - spread["low"]], [spread["high"] - spread["score"]]]
        label = "" if number else "as measured"
        axes.barh(number, spread["score"] - 1, left=1, xerr=error, height=0.6, color="C0", capsize=2, label=label)
    # not of peers in JAX, whose bare products are ours
    of_torch = [n for n, row in enumerate(shown) if "times_normalised" in row and "peft" in row["label"]]
    points = [(shown[n]["times_normalised"]["score"], n) for n in of_torch]
    if points:
        axes.plot(*zip(*points, strict=True), "D", color="C1", label="each over its own matrix products")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(yticks=range(len(shown)), yticklabels=[row["label"] for row in shown], xlabel="the peer's time over ours")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=100)
