"""A tiny base in Hugging Face form, E2E lines and a command line for subprocess tests."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data import text
from lora_jax.interop import hf
from lora_jax.models import gpt2

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("Alba", "Blue Spice", "Cotto", "Giraffe", "Loch Fyne", "Strada", "Vaults", "Zizzi")


def make_inputs(folder: Path, seed: int = 0) -> None:
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
    config = gpt2.GPT2Config(vocab_size=272, n_positions=128, n_embd=16, n_layer=2, n_head=2, eos_token_id=0)
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


def environment(folder: Path) -> dict[str, str]:
    """One CPU device."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def run(folder: Path, workdir: Path, *flags: str, name: str = "small") -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, workdir, *flags, name=name),
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
