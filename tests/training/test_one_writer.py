"""One process writes a workdir: a second one that is started there is refused, and nothing is lost."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_jax import checkpoints, training
from lora_jax.training import locks
from tests.helpers.cli import command, environment, fork, run
from tests.helpers.locks import held_elsewhere, is_free
from tests.helpers.runs import prepare, run_config, without_times

REFUSED = r"is being written by process \d+ on host .+ since [\d:+ -]+: wait for it, stop it, or give another --workdir"
STEPS = ("--config.epochs=1", "--config.save_every=6", "--config.data.buckets=1")  # 12
OTHER = "--config.optimizer.learning_rate=0.01"


def test_who_writes_is_said_before_anything_is_written(tmp_path: Path) -> None:
    holder = {"pid": 1234, "host": "there", "since": "2026-11-30 03:12:45+00:00"}
    message = "being written by process 1234 on host there since 2026-11-30 03:12:45.00:00: wait for it, stop it, or"
    with held_elsewhere(tmp_path, json.dumps(holder)):
        for start in (training.claim, lambda workdir, config: prepare(workdir, config)):
            with pytest.raises(ValueError, match=message):
                start(tmp_path, run_config())
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        assert json.loads((tmp_path / ".lock").read_text()) == holder
    with held_elsewhere(tmp_path), pytest.raises(ValueError, match="being written by another process: wait"):
        training.claim(tmp_path, run_config())
    training.claim(tmp_path, run_config())


def test_blocks_in_each_other(tmp_path: Path) -> None:
    with locks.locked(tmp_path):
        holder = json.loads((tmp_path / ".lock").read_text())
        assert holder["pid"] == os.getpid()
        with locks.locked(tmp_path, keep=True), locks.locked(tmp_path / "." / "sub" / ".."):
            pass
        assert not is_free(tmp_path) and json.loads((tmp_path / ".lock").read_text()) == holder
    assert is_free(tmp_path) and (tmp_path / ".lock").read_text() == ""


def test_prepared_and_trained(tmp_path: Path) -> None:
    """From `prepare` to the end of `train`; free after every error."""
    config = run_config(epochs=1)
    job = prepare(tmp_path, config, validation=None)
    assert not is_free(tmp_path)
    with pytest.raises(ValueError, match="another config"):
        checkpoints.write_atomically(tmp_path / "metrics.jsonl", b'{"step": 1}\n')
        prepare(tmp_path, run_config(epochs=3))
    assert is_free(tmp_path)
    job = prepare(tmp_path, config, validation=None)
    assert not is_free(tmp_path)
    assert training.train(job._replace(start=job.total)).finished and is_free(tmp_path)


def test_a_dead_holders_lock_is_taken_over(tmp_path: Path) -> None:
    hold = """if True:
        import fcntl, time
        file = open(".lock", "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        print(flush=True)
        time.sleep(100)
    """
    process = subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        with pytest.raises(ValueError, match="is being written by another process"):
            training.claim(tmp_path, run_config())
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with locks.locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    with locks.locked(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's, of threads
        child = os.fork()
        if child == 0:
            time.sleep(100)
    try:
        until = time.monotonic() + 10
        while not is_free(tmp_path):  # the child may not have run yet
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_was_deleted_and_made_again(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    training.claim(workdir, run_config())
    shutil.rmtree(workdir)
    with held_elsewhere(workdir), pytest.raises(ValueError, match="is being written"):
        training.claim(workdir, run_config())
    with locks.locked(workdir):
        assert not is_free(workdir)


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_without_locks_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: int | None
) -> None:
    def flock(*_: object) -> None:
        raise OSError(reason, "no locks here")

    if reason is None:  # Windows
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", flock)
    locks._warn.cache_clear()
    with locks.locked(tmp_path, tmp_path / "seed_0"):
        training.claim(tmp_path, run_config())
    (record,) = caplog.records
    assert "nothing keeps a second process from writing there" in record.getMessage()


def test_a_workdir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match=f"^{tmp_path}/run cannot be written: File exists$"):
        training.claim(tmp_path / "run", run_config())


# Pairs of starts


def start_pairs(inputs: Path, folder: Path, cases: list[tuple[float, tuple[str, ...]]]) -> list[str]:
    """Starts pairs, offset and flags of the second each, and checks them; returns what became of each second start."""
    with ThreadPoolExecutor(3) as pool:
        straight = pool.submit(run, inputs, folder / "straight", *STEPS)
        pairs = [pool.submit(start_twice, inputs, folder / str(n), *case) for n, case in enumerate(cases)]
        ended = [pair.result() for pair in pairs]
        assert straight.result().returncode == 0, straight.result().stderr
    if any(codes[0] and second for (codes, *_), (_, second) in zip(ended, cases, strict=True)):  # it was the first one
        assert run(inputs, folder / "other", *STEPS, OTHER).returncode == 0
    return [check(folder, folder / str(n), cases[n][1], pair) for n, pair in enumerate(ended)]


Ended = tuple[list[int | None], list[str], list[str]]  # statuses, outputs, errors


def start_twice(inputs: Path, folder: Path, offset: float, second: tuple[str, ...]) -> Ended:
    """Starts a run, and after some seconds the same one or one of another config, in one workdir."""
    workdir, started = folder / "run", []
    for number, flags in enumerate(((), second)):
        streams = folder / str(number)
        streams.mkdir(parents=True)
        arguments = command(inputs, workdir, *STEPS, *flags)[3:]
        started.append(fork("experiments.train", *arguments, streams=streams, env=environment()))
        if number == 0:
            time.sleep(offset)
    for process in started:
        process.join(120)
    outputs = [(folder / str(number) / "out").read_text() for number in (0, 1)]
    errors = [(folder / str(number) / "err").read_text() for number in (0, 1)]
    return [process.exitcode for process in started], outputs, errors


def check(straight: Path, folder: Path, second: tuple[str, ...], ended: Ended) -> str:
    """One start ran as undisturbed, the other one was refused; returns what became of the second: "refused", "done
    before", or "first" to begin."""
    workdir, (codes, outputs, errors) = folder / "run", ended
    winner = 0 if codes[0] == 0 else 1
    assert codes[winner] == 0, errors
    undisturbed = straight / ("other" if winner and second else "straight")
    assert without_times(workdir) == without_times(undisturbed)
    for name in ("adapter/adapter.safetensors", "loss.png"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (workdir, undisturbed)]
    assert configs[0] == configs[1]
    assert checkpoints.load(workdir).step == 12 and (workdir / "summary.json").is_file()
    assert len(list(workdir.glob("events*"))) == 1 and not list(workdir.rglob("*tmp*"))
    if codes == [0, 0]:
        assert not second and "is trained already: all 12 steps are done" in outputs[1], (outputs, errors)
        return "done before"
    (line,) = [line for line in errors[1 - winner].splitlines() if line.startswith("error: ")]
    assert codes[1 - winner] == 1 and "Traceback" not in errors[1 - winner]
    assert "is being written by " in line or (second and "holds the run of another config" in line), line
    return "first" if winner else "refused"


def test_pairs_of_starts(inputs: Path, tmp_path: Path) -> None:
    cases: list[tuple[float, tuple[str, ...]]] = [(1.5, ()), (0.1, (OTHER,))]
    assert set(start_pairs(inputs, tmp_path, cases)) <= {"refused", "first"}


@pytest.mark.slow
def test_two_hundred_pairs_of_starts(inputs: Path, tmp_path: Path) -> None:
    chosen = random.Random(5)
    cases = [(chosen.uniform(0, 5), ((), (OTHER,))[number % 2]) for number in range(190)]
    cases += [(0.0, ((), (OTHER,))[number % 2]) for number in range(10)]
    ends = start_pairs(inputs, tmp_path, cases)
    print({end: ends.count(end) for end in set(ends)})
    assert ends.count("refused") >= 50 and ends.count("done before") >= 5
