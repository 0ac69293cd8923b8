"""Ours against Hugging Face PEFT, qwix and flax's nnx.LoRA, on the same work, by turns, in one run.

    python -m experiments.benchmark
    python -m experiments.benchmark --only='step/gpt2_small/*' --minutes=5
    python -m experiments.benchmark --base=GPT2 --data=E2E --bert=BERT --glue=GLUE --out=docs/results

Each side is a process of its own (experiments.benchmark.worker). After a round that warms up, every round lets each
side do its work once, one after the other, so that what else the machine does meets all alike. A ratio is a peer's time
over ours in the same round: above 1 we are faster; its figure is the median over the rounds. Training steps have a
second one, `normalised`: each side's time is first divided by that of its own library's bare matrix products of the
same shapes, measured in the same rounds. What a side's process held at most stands beside it (host memory on a CPU,
else the accelerator's). Peers run as they come; our entry points set huge pages for themselves
(experiments/__init__.py).

The contests (`--only` takes globs): step/MODEL/TARGETS, epoch/TASK, decode/HOW, mixed, switch, start, sweep. Those of
real data need --base, --data, --bert, --glue; sweep runs only when --only names it, for it takes its time. --out gets
benchmark_cpu.json or benchmark_gpu.json, which keeps its other contests, and a plot. A peer that is not installed is
named, and left out: pip install peft qwix.
"""

import fnmatch
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from experiments import cli, results
from experiments.benchmark import contests
from experiments.benchmark.contests import Contest
from experiments.benchmark.side import Missing, Side
from lora_jax import checkpoints

flags.DEFINE_multi_string("only", [], "Contests: globs.")
flags.DEFINE_float("minutes", 30.0, "Of all contests together; each gets its share, and three rounds at least.")
flags.DEFINE_integer("rounds", 15, "The most rounds of a contest.", lower_bound=1)
flags.DEFINE_string("base", None, "A small GPT-2, for epoch/e2e, decode and sweep.")
flags.DEFINE_string("bert", None, "A small BERT or RoBERTa, for epoch/mrpc.")
flags.DEFINE_string("glue", None, "GLUE's data.")
flags.declare_key_flag("data")
flags.declare_key_flag("out")
OURS, LEAST = "ours", 3
PACKAGES = ("jax", "flax", "optax", "qwix", "torch", "transformers", "peft")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder))


def compare(folder: Path) -> None:
    """All contests that are asked for, one after the other; each is written when it is done."""
    values = flags.FLAGS
    sources = {name: values[name].value for name in ("base", "data", "bert", "glue")}
    known = contests.all_of(sources, folder)
    chosen = [each for each in known if wanted(each.name)]
    if not chosen:
        raise ValueError(f"--only={values.only}: none of {', '.join(each.name for each in known)}")
    file = Path(values.out or ".") / f"benchmark_{'cpu' if jax.default_backend() == 'cpu' else 'gpu'}.json"
    found = json.loads(file.read_text()) if file.is_file() else {"contests": {}}
    for number, contest in enumerate(chosen):
        share = values.minutes * 60 / len(chosen)
        print(f"{contest.name} ({number + 1} of {len(chosen)})", flush=True)
        figures = started(contest) if contest.name == "start" else measured(contest, share)
        found["contests"][contest.name] = figures | {"how": how()}
        if values.out:
            write(file, found)
    rows = rows_of({name: found["contests"][name] for name in (each.name for each in chosen)})
    print(results.table([{name: value for name, value in row.items() if name != "command"} for row in rows]))


def wanted(name: str) -> bool:
    globs = flags.FLAGS.only or ["[!s]*", "st*", "switch*"]  # all but the sweep
    return any(fnmatch.fnmatch(name, glob) for glob in globs)


def how() -> dict[str, Any]:
    """Machine, versions and commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "command": cli.command("benchmark"),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": versions,
        "commit": git.stdout.strip(),
        "seed": 0,
    }


def started(contest: Contest) -> dict[str, Any]:
    """Seconds from the start of a process to the end of its first step: with nothing compiled before, and with what the
    run before has kept."""
    seconds: dict[str, dict[str, list[float]]] = {}
    out: dict[str, Any] = {}
    for _ in range(contest.rounds):
        for name, (target, work) in contest.sides.items():
            with tempfile.TemporaryDirectory() as kept:
                env = {"JAX_COMPILATION_CACHE_DIR": f"{kept}/jax"} if name == OURS else {}  # qwix leaves it to its user
                env |= {"TORCHINDUCTOR_CACHE_DIR": f"{kept}/torch"}
                for part in contest.parts:
                    try:
                        side = Side(target, work, env)
                        taken = side.first["ready"] + side.run("unit")
                    except Missing as missing:
                        out[name] = {"left_out": str(missing)}
                        break
                    side.close()
                    seconds.setdefault(name, {}).setdefault(part, []).append(taken)
                    out[name] = {"peak": side.peak}
    for name, own in seconds.items():
        out[name]["seconds"] = {part: cli.spread(each) for part, each in own.items()}
    return {"sides": out, "rounds": contest.rounds, "ratios": ratios(contest, seconds, out)}


def measured(contest: Contest, share: float) -> dict[str, Any]:
    """The figures of a contest: those of each side, and of each peer its ratios."""
    begin = time.perf_counter()
    sides: dict[str, Side] = {}
    out: dict[str, Any] = {}
    try:
        for name, (target, work) in contest.sides.items():
            try:
                sides[name] = Side(target, work)
                for part in contest.parts if contest.warm else ():  # compiles too
                    sides[name].run(part)
            except Missing as missing:
                print(f"  {name} is left out: {missing}", flush=True)
                out[name] = {"left_out": str(missing)}
                sides.pop(name, None)
        seconds: dict[str, dict[str, list[float]]] = {n: {part: [] for part in contest.parts} for n in sides}
        most = min(contest.rounds, flags.FLAGS.rounds)
        for number in tqdm(range(most), unit="round", leave=False):
            if number >= LEAST and time.perf_counter() - begin > share:
                break
            for name in list(sides) if number % 2 else list(sides)[::-1]:
                for part in contest.parts:
                    seconds[name][part].append(sides[name].run(part))
        for name, side in sides.items():
            parts = {part: cli.spread(own) for part, own in seconds[name].items()}
            out[name] = {"seconds": parts, "peak": side.peak, "first": side.first}
        rounds = len(next(iter(seconds.values()))[contest.parts[0]])
        return {"sides": out, "rounds": rounds, "ratios": ratios(contest, seconds, out)}
    finally:
        for side in sides.values():
            side.close()


def ratios(contest: Contest, seconds: dict[str, dict[str, list[float]]], sides: dict[str, Any]) -> dict[str, Any]:
    """Of each peer: its time over ours, part by part, and its memory; the same over their floors."""
    found: dict[str, Any] = {}
    if OURS not in seconds:
        return found
    ours = seconds[OURS]
    for name, own in seconds.items():
        if name == OURS:
            continue
        found[name] = {"peak": sides[name]["peak"] / sides[OURS]["peak"]}
        for part in contest.parts:
            if part != "floor":
                raw = [theirs / mine for theirs, mine in zip(own[part], ours[part], strict=True)]
                label = "ratio" if part == "unit" else part
                found[name] |= {f"{label}_{which}": value for which, value in _named(cli.spread(raw)).items()}
        if "floor" in contest.parts:
            theirs, mine = (cli.spread(times["floor"])["score"] for times in (own, ours))
            found[name]["normalised_median"] = found[name]["ratio_median"] * mine / theirs
    if "floor" in contest.parts:
        floor = [unit / bare for unit, bare in zip(ours["unit"], ours["floor"], strict=True)]
        found[OURS] = {"over_floor": cli.spread(floor)["score"]}
    return found


def _named(spread: dict[str, float]) -> dict[str, float]:
    return {"median": spread["score"], "low": spread["low"], "high": spread["high"]}


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of the table for each peer of each contest."""
    rows = []
    for name, contest in found.items():
        for peer, own in contest["ratios"].items():
            row = {"label": f"{name}/{peer}", "command": contest["how"]["command"], **contest["how"]}
            row |= {f"times_{key}": value for key, value in own.items() if not key.endswith(("_low", "_high"))}
            if "ratio_median" in own:
                spread = {"score": own["ratio_median"], "low": own["ratio_low"], "high": own["ratio_high"]}
                row["times_ratio_median"] = spread
            rows.append(row)
    return rows


def write(file: Path, found: dict[str, Any]) -> None:
    """The file, its rows for the README's table, the ratios by their paths, and the plot."""
    tree: dict[str, Any] = {}
    for name, contest in found["contests"].items():
        at = tree
        for key in name.split("/"):
            at = at.setdefault(key, {})
        at |= contest["ratios"]
    content = {"contests": found["contests"], "rows": rows_of(found["contests"]), **tree}
    checkpoints.write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())
    plot(content["rows"], file.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """The ratios as bars, raw and normalised."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if "times_ratio_median" in row]
    if not shown:
        return
    figure = Figure(figsize=(10, 0.8 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(shown):
        spread = row["times_ratio_median"]
        error = [[spread["score"] - spread["low"]], [spread["high"] - spread["score"]]]
        axes.barh(number, spread["score"], xerr=error, height=0.6, color="C0", capsize=2, label="" if number else "raw")
    points = [(row["times_normalised_median"], n) for n, row in enumerate(shown) if "times_normalised_median" in row]
    if points:
        axes.plot(*zip(*points, strict=True), "D", color="C1", label="each over its own matrix products")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(yticks=range(len(shown)), yticklabels=[row["label"] for row in shown], xlabel="the peer's time over ours")
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    cli.run(main)
