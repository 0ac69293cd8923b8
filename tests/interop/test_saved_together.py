"""Every saving path, broken off at every one of its operations: the old files, the new ones, or an error."""

import contextlib
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_jax.models import shapes
from tests.helpers.cli import ROOT, environment
from tests.helpers.faults import every_failure
from tests.helpers.saving_paths import NEW, OLD, PATHS, SavingPath, paths_of_runs


@pytest.fixture(autouse=True, scope="module")
def shapes_are_traced_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "of_params", functools.cache(shapes.of_params))
        yield


def of_others(path: SavingPath, folder: Path) -> float | None:
    """What readers find that know nothing of saves that were broken off; None where they find no config."""
    visible = folder.with_name(f"{folder.name}-visible")
    shutil.copytree(folder, visible, ignore=shutil.ignore_patterns(".saving*"))
    with contextlib.suppress(FileNotFoundError):
        return path.load(visible)
    assert path.together
    return None


SLOW = {False: ("hf", "peft"), True: ("hf, ",)}  # what the names of slow cases begin with, by `killed`


@pytest.mark.parametrize(
    ("name", "killed"),
    [
        pytest.param(name, killed, marks=[pytest.mark.slow] if name.startswith(SLOW[killed]) else [])
        for killed in (True, False)
        for name in PATHS
    ],
)
def test_broken_off_at_every_operation(name: str, killed: bool, tmp_path: Path) -> None:
    path, seen = PATHS[name], []
    (tmp_path / "old").mkdir()
    path.old(tmp_path / "old")
    for n, folder, error in every_failure(tmp_path / "old", path.new, killed=killed):
        assert of_others(path, folder) in (OLD, NEW, None), (n, error)
        value = path.load(folder)
        assert value in (OLD, NEW), (n, error)
        if error is None:
            assert value == NEW
        else:
            seen.append(value)
            path.new(folder)  # goes well after any failure
            assert path.load(folder) == NEW and not list(folder.glob("*.saving*")), n
    assert len(seen) > 3 and seen == sorted(seen) and OLD in seen
    assert NEW in seen or not path.together


@pytest.mark.slow
def test_killed_at_every_operation(tmp_path: Path) -> None:
    """By SIGKILL; every path, exports of runs and checkpoints among them."""
    for name in [*PATHS, *paths_of_runs(tmp_path)]:
        command = [sys.executable, "-m", "tests.helpers.killed_saves", str(tmp_path), name]
        run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        print(run.stdout.strip())
