"""The README's Python, run as it stands, one block after the other."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import lora_jax as lj
from lora_jax import checkpoints
from lora_jax.models import gpt2

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


class State(NamedTuple):
    step: jax.Array
    delta: lj.Delta


def leave_a_run(workdir: Path) -> None:
    """A checkpoint of a LoRA of the README's model."""
    model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4))
    params = jax.jit(model.init)(jax.random.key(1), jax.numpy.zeros((1, 4), "int32"))["params"]
    method = lj.lora(lj.select("**/attn/{query,value}/kernel"), rank=4)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({}))
    manager = checkpoints.manager(workdir)
    state = State(jax.numpy.ones((), "int32"), method.init(jax.random.key(0), params))
    base = checkpoints.identity(params, "random")
    checkpoints.save(manager, 1, state, spec=method.spec, base=base)
    manager.close()


@pytest.mark.usefixtures("no_java")
def test_every_python_block_runs(tmp_path, monkeypatch):
    pytest.importorskip("equinox")
    monkeypatch.chdir(tmp_path)
    leave_a_run(tmp_path / "runs/e2e")
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) == 14
    assert float(names["value"]) < 4.56  # ln(96): chance
    assert names["run"].step == 1
    assert names["y"].shape == (3, 4)


def test_files_and_modules_that_the_readme_names_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)|`((?:notebooks|docs|configs)/[\w./]+)`", README):
        name = path[0] or path[1]
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m ([\w.]+)", README):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module
