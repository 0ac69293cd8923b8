"""SIGINT, SIGTERM and SIGHUP at any moment: what runs is saved and ended, and resumed to the same end, bit for bit."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from lora_jax import checkpoints, runs, training
from lora_jax.runs import evaluation
from lora_jax.runs import run as run_module
from lora_jax.runs import sweeps as sweeps_module
from lora_jax.training import stopping
from lora_jax.training import sweep as training_sweep
from tests.helpers.runs import config_of, with_programs_of, without_times

KINDS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STEPS = 12


@pytest.fixture
def outside() -> Iterator[list[int]]:
    """The signals that came where nothing was running: of those none may end the tests."""
    received: list[int] = []
    before = {kind: signal.signal(kind, lambda number, _: received.append(number)) for kind in KINDS}
    yield received
    for kind, handler in before.items():
        signal.signal(kind, handler)


# Blocks and handlers


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_is_noted_and_the_second_acts_as_before(
    outside: list[int], monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    monkeypatch.setattr(stopping, "_TOGETHER", 0.01)
    with stopping.noted():
        with stopping.noted():
            assert stopping.requested() is None and not stopping.after_step()
            signal.raise_signal(kind)
            signal.raise_signal(kind)  # what comes together is one: `timeout` and dying shells send two
            assert stopping.requested() == kind and stopping.after_step() and outside == []
        with pytest.raises(InterruptedError, match="runs/x was stopped: the same command resumes it"):
            stopping.check("runs/x")
        time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert outside == [signal.SIGTERM, signal.SIGINT] and stopping.requested() == kind
    assert stopping.requested() == kind  # for the status of an entry point
    signal.raise_signal(kind)
    assert outside[2:] == [kind]
    with stopping.noted():
        assert stopping.requested() is None


def test_what_is_ignored_stays_ignored(outside: list[int]) -> None:
    """Under nohup, and of a shell's background jobs."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopping.noted():
        signal.raise_signal(signal.SIGHUP)
        assert stopping.requested() is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.usefixtures("outside")
def test_a_second_ctrl_c_is_a_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_TOGETHER", 0.01)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), stopping.noted():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_nothing_is_taken(outside: list[int]) -> None:
    def inside() -> None:
        with stopping.noted():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert outside == [signal.SIGTERM] and stopping.requested() is None


# Runs, seeds, sweeps, evaluations


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Runs of this module load and compile once for each seed."""
    setups: dict[int, Any] = {}
    jobs: dict[tuple, training.Job] = {}

    def load_setup(config: ConfigDict, mesh: Any = None, **parts: Any) -> Any:
        if config.seed not in setups:
            setups[config.seed] = real_load(config, mesh, **parts)
        return setups[config.seed]

    def sharing(prepare: Callable[..., training.Job]) -> Callable[..., training.Job]:
        def prepared(config: ConfigDict, *args: Any, **parts: Any) -> training.Job:
            job = prepare(config, *args, **parts)
            return with_programs_of(jobs.setdefault((prepare, config.seed), job), job)

        return prepared

    real_load = run_module.load_setup
    with pytest.MonkeyPatch.context() as patch:
        for module in (run_module, sweeps_module):
            patch.setattr(module, "load_setup", load_setup)
        patch.setattr(training, "prepare", sharing(training.prepare))
        patch.setattr(training_sweep, "prepare", sharing(training_sweep.prepare))
        yield


GREEDY = {"max_new_tokens": 8, "num_beams": 1, "no_repeat_ngram_size": 0}


class Case:
    """What is stopped and resumed: runs, seeds, a sweep or an evaluation, of one workdir."""

    def __init__(self, inputs: Path, kind: str) -> None:
        self.kind, self.config, self.loaded = kind, config_of(inputs, steps=STEPS, save_every=4), None
        if kind == "seeds":
            self.config.seeds = (0, 1, 2)
        if kind == "sweep":
            self.config.sweep.learning_rate = (0.01, 0.003)
        if kind == "evaluation":
            runs.train(self.config, inputs / "evaluated")
            self.loaded = runs.load(inputs / "evaluated")

    def start(self, workdir: Path) -> bool:
        """One start; whether all is done."""
        if self.kind == "sweep":
            return runs.sweep(self.config, workdir).finished
        if self.loaded:
            try:
                runs.evaluate(self.loaded._replace(workdir=workdir), decoding=GREEDY, batch_size=1)
            except InterruptedError:
                return False
            return True
        result = runs.train(self.config, workdir)
        last = result.members[-1] if result.members else result
        if not result.finished and last.step:
            assert checkpoints.latest_step(last.workdir) == last.step
        return result.finished


def left_in(workdir: Path) -> dict[str, Any]:
    """What has to be as in a workdir that nobody disturbed."""
    left: dict[Path, Any] = {path: path.read_bytes() for path in workdir.rglob("*.jsonl") if path.stem == "predictions"}
    left |= {path: path.read_bytes() for path in workdir.rglob("adapter.safetensors")}
    for path in workdir.rglob("metrics.jsonl"):
        left[path] = without_times(path.parent)
        left[path.parent] = checkpoints.latest_step(path.parent), (path.parent / "loss.png").read_bytes()
    for path in workdir.rglob("*.json"):
        if path.name in ("summary.json", "evaluate.json", "sweep.json"):
            left[path] = without_speed(json.loads(path.read_text()))
    assert left and not list(workdir.rglob("*.part"))
    return {str(path.relative_to(workdir)): content for path, content in left.items()}


def without_speed(value: Any) -> Any:
    if isinstance(value, list):
        return [without_speed(part) for part in value]
    names = ("seconds", "tokens_per_second")
    return {k: without_speed(x) for k, x in value.items() if k not in names} if isinstance(value, dict) else value


def stop_and_resume(case: Case, folder: Path, seed: int, signals: int, outside: list[int]) -> dict[str, int]:
    """Starts a case again and again, each time with a signal at a random moment of it, until there were so many; what
    is done is compared with one that nobody disturbed, and begun anew. Returns counts."""
    chosen, sent = random.Random(seed), list[int]()
    case.start(folder / "straight")  # compiles
    begin = time.monotonic()
    case.start(folder / "again")
    longest, straight = time.monotonic() - begin, left_in(folder / "straight")
    assert left_in(folder / "again") == straight
    counts = {"starts": 0, "stopped": 0, "done": 0}

    def send(kind: int) -> None:
        sent.append(kind)
        os.kill(os.getpid(), kind)

    while len(sent) - len(outside) < signals or (folder / "run").exists():
        kind = chosen.choice(KINDS)
        timer = threading.Timer(chosen.random() ** 2 * longest, send, [kind])  # its end is writing summaries
        timer.start()
        finished = case.start(folder / "run")
        timer.cancel()
        timer.join()
        counts["starts"] += 1
        counts["done" if finished else "stopped"] += 1
        assert finished or stopping.requested() == kind == sent[-1]
        if finished:
            assert left_in(folder / "run") == straight
            shutil.rmtree(folder / "run")
    assert counts["stopped"] >= signals // 5
    return counts | {"signals": len(sent) - len(outside)}


@pytest.mark.usefixtures("no_java", "compiled_once")
@pytest.mark.parametrize(
    "kind, signals",
    [
        ("run", 4),
        ("evaluation", 4),
        *(pytest.param(*many, marks=pytest.mark.slow) for many in [("run", 400), ("evaluation", 300)]),
        *(pytest.param(*many, marks=pytest.mark.slow) for many in [("seeds", 150), ("sweep", 150)]),
    ],
)
def test_stopped_at_random_times(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: list[int], kind: str, signals: int
) -> None:
    def slower(*args: Any, **options: Any) -> Iterator[dict[int, str]]:
        for batch in completions(*args, **options):
            time.sleep(0.03)
            yield batch

    completions = evaluation.completions
    monkeypatch.setattr(evaluation, "completions", slower)
    print(kind, stop_and_resume(Case(inputs, kind), tmp_path, signals, signals, outside))


@pytest.mark.usefixtures("compiled_once", "outside")
def test_a_signal_in_the_last_step_of_a_seed_stops_before_the_next(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one in the last step of the last seed stops nothing: all is done."""
    prepare = training.prepare

    def signalling(*args: Any, **parts: Any) -> training.Job:
        job = prepare(*args, **parts)
        placed = iter(range(job.start + 1, job.total + 1))

        def put(batch: Any) -> Any:
            if next(placed) == job.total:
                signal.raise_signal(signal.SIGTERM)
            return job.put(batch)

        return job._replace(put=put)

    monkeypatch.setattr(training, "prepare", signalling)
    config = config_of(inputs, steps=3, save_every=4)
    config.seeds = (0, 1)
    result = runs.train(config, tmp_path)
    assert not result.finished and [member.finished for member in result.members] == [True]
    assert not (tmp_path / "seed_1").exists() and (tmp_path / "seed_0/summary.json").is_file()
    result = runs.train(config, tmp_path)
    assert result.finished and [member.workdir.name for member in result.members] == ["seed_1"]
    assert result.summary is not None and result.summary["seed"] == [0, 1]
