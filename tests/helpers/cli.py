"""A tiny base in Hugging Face form, E2E lines and a command line for subprocess tests."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data import text
from lora_jax.interop import hf
from lora_jax.models import gpt2

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("Alba", "Blue Spice", "Cotto", "Giraffe", "Loch Fyne", "Strada", "Vaults", "Zizzi")


def make_inputs(folder: Path, seed: int = 0, layers: int = 2) -> None:
    """`folder/base` and `folder/data`."""
    random = np.random.default_rng(7)
    lines = []
    for _ in range(60):
        name, area = NAMES[random.integers(8)], ("city centre", "riverside")[random.integers(2)]
        lines.append(f"name : {name} | area : {area}||{name} is in the {area} .")
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", lines[:48]), ("valid", lines[48:]), ("test", lines[:8])):
        (data / f"{split}.txt").write_text("\n".join(part) + "\n")
    tokenizer = text.train_tokenizer([data / "train.txt"], 270)
    config = gpt2.GPT2Config(vocab_size=272, n_positions=128, n_embd=16, n_layer=layers, n_head=2, eos_token_id=0)
    model = gpt2.GPT2(config)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    hf.save(folder / "base", model, params, tokenizer)


def command(folder: Path, workdir: Path, *flags: str, name: str = "small") -> list[str]:
    """A run of 24 steps in one epoch's batches of 4, saved every 3 steps."""
    return [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config=configs/e2e.py:{name}",
        f"--workdir={workdir}",
        f"--config.base={folder}/base",
        f"--config.data.path={folder}/data",
        "--config.data.batch_size=4",
        "--config.data.buckets=2",
        "--config.epochs=2",
        "--config.optimizer.warmup_steps=3",
        "--config.log_every=2",
        "--config.save_every=3",
        *flags,
    ]


def environment() -> dict[str, str]:
    """Of a process with one CPU device."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def run(folder: Path, workdir: Path, *flags: str, name: str = "small") -> subprocess.CompletedProcess:
    return run_entry("train", *command(folder, workdir, *flags, name=name)[3:])


# Most of a short command's time goes into imports: one process has made them, and each command is a fork of it. What
# tensorboardX would take along, torch, is imported by the commands that need it.
_FORKS = multiprocessing.get_context("forkserver")
_IMPORTED = """
    tests.helpers.tensorboard datasets matplotlib.figure orbax.checkpoint sacrebleu.metrics experiments.cli
    lora_jax.generation lora_jax.runs.tasks lora_jax.training.loop tests.helpers.cli
"""
_FORKS.set_forkserver_preload(_IMPORTED.split())


def run_entry(
    module: str,
    *flags: str,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float = 300,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess:
    """`python -m experiments.MODULE *flags` in a folder with one CPU device, and what else `env` says."""
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder)
        (streams / "in").write_text(stdin)
        process = fork(f"experiments.{module}", *flags, streams=streams, env=environment() | dict(env or {}), cwd=cwd)
        process.join(timeout)
        stdout, stderr = ((streams / name).read_text() for name in ("out", "err"))
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(module, timeout, stdout, stderr)
        return subprocess.CompletedProcess([module, *flags], process.exitcode, stdout, stderr)


def fork(
    module: str, *flags: str, streams: Path, env: Mapping[str, str], cwd: Path = ROOT
) -> multiprocessing.process.BaseProcess:
    """Starts `python -m module *flags`, with its output in the files `out` and `err` of a folder, and `in` as input."""
    for name in ("in", "out", "err"):
        (streams / name).touch()
    process = _FORKS.Process(target=_forked, args=(module, flags, dict(env), streams, cwd))
    process.start()
    return process


def _forked(module: str, flags: tuple[str, ...], env: dict[str, str], streams: Path, cwd: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    jax.config.update("jax_num_cpu_devices", int(env["JAX_NUM_CPU_DEVICES"]))
    jax.config.update("jax_platforms", env["JAX_PLATFORMS"])
    jax.config.update("jax_enable_compilation_cache", env.get("JAX_ENABLE_COMPILATION_CACHE") != "false")
    sys.stdin = open(streams / "in")
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = [module, *flags]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
