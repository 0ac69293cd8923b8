"""What stops a run of two processes, or a disk that is full, costs at most the steps since the last checkpoint."""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax import checkpoints
from tests.helpers.cli import ROOT, command, environment, fork, run

EPOCHS, TOTAL, HEARTBEAT = 5, 60, 5  # saved every 3 steps
FLAGS = (f"--config.epochs={EPOCHS}", "--config.mesh.data=2", "--config.mesh.fsdp=2")


class Pair:
    """Two processes of a run of experiments.train, of two devices each."""

    def __init__(self, inputs: Path, workdir: Path, *flags: str) -> None:
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            port = opened.getsockname()[1]
        several = [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--heartbeat={HEARTBEAT}"]
        self.logs = [inputs / f"{workdir.name}_{process}.log" for process in (0, 1)]
        self.processes = []
        for process, log in enumerate(self.logs):
            with log.open("w") as file:
                started = subprocess.Popen(
                    [*command(inputs, workdir, *FLAGS, *several, *flags), f"--process={process}"],
                    cwd=ROOT,
                    env=environment() | {"JAX_NUM_CPU_DEVICES": "2"},
                    stdout=file,
                    stderr=file,
                )
            self.processes.append(started)

    def said(self) -> list[str]:
        return [log.read_text(errors="replace") for log in self.logs]

    def wait(self, timeout: float = 200) -> list[int]:
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)


def wait_for(pair: Pair, workdir: Path, moment: str) -> None:
    """Until "train" (a new entry of metrics.jsonl) or "save" (a checkpoint is being written), or the end."""
    metrics = workdir / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    while pair.running():
        if moment == "save" and any(workdir.glob("checkpoints/*tmp*")):
            return
        if moment == "train" and metrics.exists() and metrics.stat().st_size > before:
            return
        time.sleep(0.001)


def forget_unfinished(workdir: Path) -> None:
    for leftover in workdir.glob("checkpoints/*tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_one_process_saves_in_both(inputs: Path, kind: int) -> None:
    workdir = inputs / f"told_{kind}"
    pair = Pair(inputs, workdir)
    try:
        wait_for(pair, workdir, "train")
        pair.processes[1].send_signal(kind)
        assert pair.wait() == [128 + signal.SIGTERM] * 2, pair.said()
    finally:
        pair.kill()
    step = checkpoints.latest_step(workdir)
    assert step is not None and 0 < step < TOTAL
    first, second = pair.said()
    assert f"saved at step {step} of {TOTAL}" in first and "saved at step" not in second
    assert checkpoints.load(workdir).step == step


@pytest.fixture(scope="module")
def straight(inputs: Path) -> Path:
    """A run of two processes that nobody disturbs."""
    workdir = inputs / "straight"
    pair = Pair(inputs, workdir)
    assert pair.wait() == [0, 0], pair.said()
    return workdir


def same_end(workdir: Path, straight: Path) -> None:
    ours, theirs = (checkpoints.load(folder) for folder in (workdir, straight))
    assert ours.step == theirs.step == TOTAL
    jax.tree.map(np.testing.assert_array_equal, ours.delta, theirs.delta)
    files = [folder / "adapter/adapter.safetensors" for folder in (workdir, straight)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_while_it_saves(inputs: Path, straight: Path, victim: int) -> None:
    workdir = inputs / f"killed_{victim}"
    pair = Pair(inputs, workdir)
    try:
        while pair.running() and checkpoints.latest_step(workdir) is None:
            time.sleep(0.001)
        wait_for(pair, workdir, "save")
        before = checkpoints.latest_step(workdir)
        pair.processes[victim].kill()
        begin = time.monotonic()
        assert pair.processes[1 - victim].wait(60) != 0
        assert time.monotonic() - begin < HEARTBEAT + 10
    finally:
        pair.kill()
    log = pair.said()[1 - victim]
    assert "error: " in log or "JAX distributed service detected fatal errors" in log, log
    step = checkpoints.latest_step(workdir)
    assert step is not None and before is not None and before <= step < TOTAL
    assert checkpoints.load(workdir).step == step
    again = Pair(inputs, workdir)
    assert again.wait() == [0, 0], again.said()
    same_end(workdir, straight)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(inputs: Path, straight: Path) -> None:
    chosen = random.Random(20)
    workdir = inputs / "killed_often"
    killed = 0
    while killed < 20:
        forget_unfinished(workdir)
        moment, victim = chosen.choice(("start", "train", "save", "save")), chosen.randrange(2)
        pair = Pair(inputs, workdir)
        try:
            if moment != "start":
                wait_for(pair, workdir, moment)
            time.sleep(chosen.uniform(0, 10) if moment == "start" else chosen.expovariate(10))
            pair.processes[victim].kill()
            codes = pair.wait(20 if moment == "start" else 60)
        except subprocess.TimeoutExpired:
            assert moment == "start", (moment, victim, pair.said())  # waits for one that has never come
            codes = [-signal.SIGKILL] * 2
        finally:
            pair.kill()
        if codes == [0, 0]:
            same_end(workdir, straight)  # it was done: once more from the start
            shutil.rmtree(workdir)
        else:
            killed += 1
    again = Pair(inputs, workdir)
    assert again.wait() == [0, 0], again.said()
    same_end(workdir, straight)


def test_flags_that_are_given_in_part(inputs: Path) -> None:
    done = run(inputs, inputs / "none", "--processes=2", "--process=0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "error: several processes need --coordinator=HOST:PORT, --processes=N and --process=I: --coordinator is miss"
        in (done.stderr)
    )


def test_a_full_disk_is_one_error_that_names_what_is_whole(inputs: Path, tmp_path: Path) -> None:
    """From the first checkpoint on, no file may grow beyond 1500 bytes: some metrics can be, a checkpoint cannot."""
    workdir, limit = inputs / "full_disk", (1500, resource.RLIM_INFINITY)
    ends = []
    for name in ("out", "err"):  # pipes: files could not grow either
        os.mkfifo(tmp_path / name)
        ends.append(os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK))
    env = environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # the limit would leave cut off entries in it
    process = fork("experiments.train", *command(inputs, workdir)[3:], streams=tmp_path, env=env)
    try:
        while process.is_alive() and checkpoints.latest_step(workdir) is None:
            time.sleep(0.001)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
        process.join(100)
        stderr = os.read(ends[1], 2**16).decode()
    finally:
        process.kill()
        for end in ends:
            os.close(end)
    assert process.exitcode == 1
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, stderr
    error = errors[0]
    step = checkpoints.latest_step(workdir)
    assert "full_disk cannot be written: " in error and "File too large" in error, error
    assert f"the checkpoint of step {step} is complete; the same command resumes it" in error, error
    assert checkpoints.load(workdir).step == step
