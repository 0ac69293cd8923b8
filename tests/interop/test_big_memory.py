"""What memory big weights take: read onto a mesh, and written, in processes of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tokenizers import Tokenizer, models

from lora_jax import checkpoints
from lora_jax.interop import hf
from lora_jax.models import gpt2

ROOT = Path(__file__).resolve().parents[2]
WIDE = gpt2.GPT2Config(vocab_size=8192, n_positions=512, n_embd=2048, n_layer=5, n_head=16, eos_token_id=0)
TENSOR = 4 * 2048 * 8192  # bytes of the largest tensor
MORE = 32 << 20  # bytes of what Python, JAX and the C library hold besides


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A GPT-2 of 1.08 GB."""
    folder = tmp_path_factory.mktemp("wide")
    model = gpt2.GPT2(WIDE)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    numbers = np.random.default_rng(0).normal(0, 0.02, 1_000_003).astype(np.float32)
    tokenizer = Tokenizer(models.WordLevel({"w": 0}, unk_token="w"))
    hf.save(folder, model, jax.tree.map(lambda x: np.resize(numbers, x.shape), shapes), tokenizer)
    yield folder
    shutil.rmtree(folder)


def ran(folder, out, *arguments) -> list[dict]:
    """What processes with these arguments said, all at once. What they free, the C library gives back at once: else it
    keeps up to three tensors' parts, some of the time."""
    command = [sys.executable, "-m", "tests.helpers.big_process", str(folder), str(out)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    processes = [
        subprocess.Popen(
            [*command, *each], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for each in arguments
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return [json.loads((out / f"{n}.json").read_text()) for n in range(len(processes))]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dtype"), [("loop", "float32"), ("scanned", "float32"), ("scanned", "bfloat16")])
def test_one_process_holds_the_model_and_little_more(wide, tmp_path, layout, dtype):
    """Of four CPU devices one process holds all shards: the model once, where a plain load and a copy hold it twice.

    Loading may take two tensors more (the file's pages of one, which count as resident, and one device's part on its
    way); writing one file, and a tensor twice (on its way from the devices).
    """
    (report,) = ran(wide, tmp_path, [layout, dtype])
    assert 1 <= report["own"] / (269_621_248 * np.dtype(dtype).itemsize) < 1.01  # biases lie on several devices
    assert report["loading"] < report["own"] + 2 * TENSOR + MORE, report
    assert report["saving"] < 150e6 + 2 * TENSOR + MORE, report


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["loop", "scanned"])
def test_two_processes_hold_half_each(wide, tmp_path, layout):
    """Neither ever holds the other's part: half of the model, and two tensors; what they write together is the same."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    reports = ran(wide, tmp_path, *([layout, "float32", str(n), port] for n in range(2)))
    for report in reports:
        assert 5e8 < report["own"] < 6e8
        assert report["loading"] < report["own"] + 2 * TENSOR + MORE, report
    assert [report["identity"] for report in reports] == [checkpoints.identity(hf.unread(wide)[1], str(wide))] * 2
    plain, back = hf.unread(wide)[1], hf.unread(tmp_path / "saved")[1]
    for (path, leaf), other in zip(flatten_dict(plain).items(), flatten_dict(back).values(), strict=True):
        assert np.array_equal(leaf, other), path
