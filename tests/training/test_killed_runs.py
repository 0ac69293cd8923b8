"""The command line, killed at any moment: it goes on to the same end, bit for bit."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from lora_jax import checkpoints
from tests.helpers.cli import ROOT, command, environment, run, run_entry
from tests.helpers.runs import without_times

EPOCHS, TOTAL = "--config.epochs=10", 120  # saved every 3


@pytest.fixture(scope="module")
def straight(inputs: Path) -> Path:
    """A run that nobody disturbs."""
    workdir = inputs / "straight"
    done = run(inputs, workdir, EPOCHS)
    assert done.returncode == 0, done.stderr
    assert "trained: 256 of" in done.stdout and "adapter:" in done.stdout
    return workdir


def same_end(workdir: Path, straight: Path) -> None:
    assert without_times(workdir) == without_times(straight)
    ours, theirs = (checkpoints.load(folder) for folder in (workdir, straight))
    assert ours.step == theirs.step == TOTAL
    for path, factors in theirs.delta.items():
        for name, factor in factors.items():
            assert np.array_equal(ours.delta[path][name], factor)
    files = [folder / "adapter/adapter.safetensors" for folder in (workdir, straight)]
    assert files[0].read_bytes() == files[1].read_bytes()


def kill_at(inputs: Path, workdir: Path, moment: str, delay: float, kind: int) -> int | None:
    """Starts the run and ends it `delay` seconds after the moment; None where it was done before.

    Moments: "start", "train" (a new entry of metrics.jsonl) or "save" (a checkpoint is written).
    """
    before = (workdir / "metrics.jsonl").stat().st_size if workdir.exists() else 0

    def reached() -> bool:
        if moment == "start":
            return True
        if moment == "save":
            return any(workdir.glob("checkpoints/*tmp*"))
        metrics = workdir / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_size > before

    for leftover in workdir.glob("checkpoints/*tmp*"):  # of the last kill: not this run's
        shutil.rmtree(leftover, ignore_errors=True)
    process = subprocess.Popen(
        command(inputs, workdir, EPOCHS),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while process.poll() is None and not reached():
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(kind)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode in (0, -kind if kind == signal.SIGKILL else 128 + kind), output
    assert process.returncode in (0, -kind) or f"of {TOTAL}: the same command resumes it" in output
    return None if process.returncode == 0 and kind == signal.SIGKILL else process.returncode


@pytest.mark.slow
def test_killed_and_told_to_end_three_times_each(inputs: Path, straight: Path) -> None:
    workdir = inputs / "killed"
    assert kill_at(inputs, workdir, "train", 0.1, signal.SIGKILL) == -signal.SIGKILL
    assert kill_at(inputs, workdir, "save", 0.0, signal.SIGKILL) == -signal.SIGKILL
    assert kill_at(inputs, workdir, "save", 0.01, signal.SIGKILL) == -signal.SIGKILL
    assert kill_at(inputs, workdir, "train", 0.02, signal.SIGTERM) == 128 + signal.SIGTERM
    assert kill_at(inputs, workdir, "train", 0.02, signal.SIGINT) == 128 + signal.SIGINT
    assert kill_at(inputs, workdir, "save", 0.0, signal.SIGHUP) == 128 + signal.SIGHUP
    step = checkpoints.latest_step(workdir)
    assert step is not None and step < TOTAL
    done = run(inputs, workdir, EPOCHS)
    assert done.returncode == 0, done.stderr
    same_end(workdir, straight)
    again = run(inputs, workdir, EPOCHS)
    assert again.returncode == 0 and f"all {TOTAL} steps are done" in again.stdout
    same_end(workdir, straight)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(inputs: Path, straight: Path) -> None:
    chosen = random.Random(20)
    workdir = inputs / "killed_often"
    killed = 0
    while killed < 20:
        moment = chosen.choice(("start", "train", "save", "save"))
        delay = chosen.uniform(0, 12) if moment == "start" else chosen.expovariate(10)
        if kill_at(inputs, workdir, moment, delay, signal.SIGKILL) is None:
            same_end(workdir, straight)  # it was done: once more from the start
            shutil.rmtree(workdir)
        else:
            killed += 1
    done = run(inputs, workdir, EPOCHS)
    assert done.returncode == 0, done.stderr
    same_end(workdir, straight)


def error(*flags: str) -> str:
    """What a wrong command says: one message, no traceback."""
    done = run_entry("train", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_misspelt_key() -> None:
    message = error("--config=configs/e2e.py:small", "--config.lora.rnk=8", "--workdir=nowhere")
    assert message == 'error: the config has no key \'rnk\'. Did you mean "rank" instead of "rnk"?'


def test_missing_base_names_the_public_one(inputs: Path) -> None:
    message = error(
        "--config=configs/e2e.py:small",
        f"--workdir={inputs}/none",
        f"--config.data.path={inputs}/data",
        f"--config.base={inputs}/no/base",
    )
    assert "no/base" in message and "huggingface.co/gpt2, gpt2-medium" in message


def test_another_config_is_refused(inputs: Path) -> None:
    workdir = inputs / "refused"
    assert run(inputs, workdir, "--config.epochs=1").returncode == 0
    before = (workdir / "metrics.jsonl").read_bytes()
    done = run(inputs, workdir, "--config.epochs=1", "--config.lora.rank=2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "lora.rank is 4 there and 2 here" in done.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("variant", ["frozen", pytest.param("full", marks=pytest.mark.slow)])
def test_other_variants(inputs: Path, variant: str) -> None:
    workdir = inputs / variant
    done = run(inputs, workdir, "--config.epochs=1", name=f"small,{variant}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["trained"] == (summary["total"] if variant == "full" else 0)
    assert summary["validation_loss"] > 0
