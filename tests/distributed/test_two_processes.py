"""One run on one device, on eight, and by two processes: the same losses, and checkpoints that all of them read."""

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from lora_jax import checkpoints, training
from tests.helpers import cli
from tests.helpers.mesh_runs import CASES, QUICK, figures, prepare

MESHES = [(8, 1, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2)]
SAVED = {"save_every": 2}


class Two(NamedTuple):
    """What two processes left."""

    folder: Path
    results: list[dict[str, Any]]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def two(folder: Path, *cases: str) -> Two:
    logs, started, port = [folder / f"streams_{process}" for process in (0, 1)], [], str(free_port())
    for process, streams in enumerate(logs):
        streams.mkdir()
        arguments = (port, str(process), str(folder), *cases)
        env = cli.environment() | {"JAX_NUM_CPU_DEVICES": "4"}
        started.append(cli.fork("tests.helpers.mesh_worker", *arguments, streams=streams, env=env))
    errors = lambda: [(streams / "err").read_text(errors="replace")[-3000:] for streams in logs]  # noqa: E731
    try:
        if not cases:
            while not all((folder / f"ready_{process}").exists() for process in (0, 1)):
                assert all(process.is_alive() for process in started), errors()
                time.sleep(0.05)
            started[1].terminate()
        for process in started:
            process.join(310)
        codes = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()
    assert codes == [0, 0], errors()
    return Two(folder, [json.loads((folder / f"found_{process}.json").read_text()) for process in (0, 1)])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The workdir of a case that ran on one device, trained when it is first asked for."""
    folder, trained = tmp_path_factory.mktemp("one"), {}

    def workdir(case: str) -> Path:
        if case not in trained:
            trained[case] = folder / case.replace("/", "_")
            training.train(prepare(case, trained[case], {}, changes=SAVED))
        return trained[case]

    return workdir


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, one: Any) -> Two:
    folder = tmp_path_factory.mktemp("both")
    shutil.copytree(one(QUICK), folder / "of_one")
    shutil.rmtree(folder / "of_one/checkpoints/4")
    return two(folder)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_have_the_losses_of_one(case: str, sizes: tuple, one: Any, tmp_path: Path) -> None:
    training.train(prepare(case, tmp_path, dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))
    np.testing.assert_allclose(figures(tmp_path), figures(one(case)), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(one: Any, tmp_path: Path) -> None:
    ran = two(tmp_path, *CASES)
    for case in CASES:
        np.testing.assert_allclose(figures(ran.folder / case.replace("/", "_")), figures(one(case)), rtol=1e-5)
    # with `tensor` across the processes both make all rows
    np.testing.assert_allclose(figures(ran.folder / "tensor"), figures(one("gpt2/lora")), rtol=1e-5)
    first, second = (result["rows"] for result in ran.results)
    assert first == second and all(len(rows) == 8 for rows in first)


def test_every_row_is_made_once(both: Two, one: Any) -> None:
    first, second = (result["rows"] for result in both.results)
    for first_rows, other in zip(first, second, strict=True):
        assert len(first_rows) == len(other) == 4 and len({*first_rows, *other}) == 8
    epoch = [row for step in range(2) for rows in (first[step], second[step]) for row in rows]
    assert sorted(epoch) == list(range(16))
    np.testing.assert_allclose(figures(both.folder / "run"), figures(one(QUICK)), rtol=1e-5)


def test_what_is_wrong_is_an_error_in_both(both: Two) -> None:
    for result in both.results:
        assert "step 1: batch 0 of epoch 0 has no labels" in result["no_labels"]
        assert "leaves out the devices of process 1" in result["left_out"]
        assert "another config: seed is 3 there and 4 here" in result["refused"]


def test_one_process_writes_the_files(both: Two) -> None:
    folder = both.folder / "run"
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    assert names == {"", "adapter", "checkpoints", "config", "events", "loss", "metrics"}  # "": .lock
    assert len(list(folder.glob("events*"))) == 1
    assert set(checkpoints.load_adapter(folder / "adapter")[1]) == set(checkpoints.load(folder).delta)


def test_both_stop_after_the_same_step_when_one_is_told_to(both: Two) -> None:
    (step, finished), other = (result["told"] for result in both.results)
    assert [step, finished] == other and not finished and 0 < step < 1000
    assert checkpoints.load(both.folder / "told").step == step


def close(a: Any, b: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_two_processes_is_read_on_any_mesh(both: Two) -> None:
    saved_delta = checkpoints.load(both.folder / "run").delta
    for sizes in ({}, {"fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}):
        state = prepare(QUICK, both.folder / "run", sizes, changes=SAVED).state
        assert int(state.step) == 4
        jax.tree.map(np.testing.assert_array_equal, state.delta, saved_delta)


@pytest.mark.parametrize("sizes", [{}, pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.slow)], ids=len)
def test_a_run_of_two_processes_goes_on_elsewhere(sizes: dict, both: Two, one: Any, tmp_path: Path) -> None:
    shutil.copytree(both.folder / "run", folder := tmp_path / "run")
    shutil.rmtree(folder / "checkpoints/4")
    job = prepare(QUICK, folder, sizes, changes=SAVED)
    assert job.start == 2
    close(training.train(job).delta, checkpoints.load(both.folder / "run").delta)
    np.testing.assert_allclose(figures(folder), figures(one(QUICK)), rtol=1e-5)


def test_a_run_of_one_process_goes_on_with_two(both: Two, one: Any) -> None:
    assert [result["resumed"] for result in both.results] == [2, 2]
    np.testing.assert_allclose(figures(both.folder / "of_one"), figures(one(QUICK)), rtol=1e-5)


def test_both_go_on_from_the_checkpoint_before_a_damaged_one(both: Two) -> None:
    assert [result["after_damage"] for result in both.results] == [2, 2]
    for result in both.results:
        assert any("checkpoints/4 is damaged" in text and "rest" in text for text in result["said"]), result["said"]
