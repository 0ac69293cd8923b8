"""The README's method of one's own, in a file outside the package: trained, reloaded, counted and timed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_cli import ROOT, environment, make_inputs, run

from lora_jax import checkpoints, training

BLOCK = next(
    block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    if "def method(model)" in block
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    make_inputs(made)
    (made / "mine.py").write_text(BLOCK)
    return made


def command(folder: Path, module: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *flags],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_readmes_method(folder: Path) -> None:
    own = f"--config.method={folder}/mine.py:method"
    done = run(folder, folder / "run", own, "--config.data.buckets=1", "--config.optimizer.learning_rate=0.05")
    assert done.returncode == 0, done.stderr
    losses = [e["validation_loss"] for e in training.read_metrics(folder / "run") if "validation_loss" in e]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="method 'lora_xs' is not known"):
        checkpoints.load(folder / "run")  # nobody told this process
    done = command(folder, "generate", f"--workdir={folder}/run", "--context=name : Alba", "--max_new_tokens=2")
    assert done.returncode == 0 and "name : Alba" in done.stdout, done.stderr

    config = ["--config=configs/e2e.py:small", own, f"--config.base={folder}/base"]
    done = command(folder, "count", *config)
    assert done.returncode == 0, done.stderr
    assert "trained: 64 of" in done.stdout  # R of 4 x 4 in two matrices of two layers
    data = [f"--config.data.path={folder}/data", "--config.data.batch_size=4", "--config.data.buckets=1"]
    done = command(folder, "benchmark", *config, *data, "--rounds=1", "--steps=1", f"--workdir={folder}/speed")
    assert done.returncode == 0, done.stderr
    assert "mine.py:method" in done.stdout


def test_what_is_no_method_is_said(folder: Path) -> None:
    for name, said in [
        (f"{folder}/nothing.py:method", "nothing.py does not exist"),
        (f"{folder}/mine.py:other", "has no function 'other'"),
        ("other", "the config has no options for 'other'"),
    ]:
        failed = run(folder, folder / "no", f"--config.method={name}")
        assert failed.returncode == 1 and said in failed.stderr, failed.stderr
