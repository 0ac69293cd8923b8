"""From plain text to a base in Hugging Face form."""

from pathlib import Path

import numpy as np

from lora_jax import training
from lora_jax.interop import hf
from tests.helpers.cli import run_entry


def test_a_base_from_text(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, count in (("one.txt", 300), ("two.txt", 200), ("held_out.txt", 60)):
        lines = [f"{n} and {n + 1} are {2 * n + 1} ." for n in range(count)]
        (texts / name).write_text("\n\n".join(lines) + "\n")
    flags = {
        "data.path": texts, "data.validation": texts / "held_out.txt", "vocab_size": 300,
        "model.n_embd": 16, "model.n_head": 2, "model.n_layer": 2, "model.n_positions": 64,
        "data.length": 32, "data.batch_size": 8, "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 2, "log_every": 5, "model.scan_layers": True,
    }  # fmt: skip
    options = [f"--workdir={tmp_path}/run"] + [f"--config.{k}={v}" for k, v in flags.items()]
    done = run_entry("pretrain", "--config=configs/pretrain.py:tiny", *options)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout

    entries = training.read_metrics(tmp_path / "run")
    losses = [e["loss"] for e in entries if "loss" in e]
    assert losses[-1] < losses[0] - 0.5
    model, params, tokenizer = hf.load(tmp_path / "run/model")
    assert tokenizer is not None
    assert model.config.vocab_size == tokenizer.get_vocab_size() <= 300
    assert model.config.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert "h_1" in params and np.isfinite(params["wte"]["embedding"]).all()
    held_out = len(tokenizer.encode("59 and 60 are 119 .").ids)
    assert entries[-1]["validation_loss"] < losses[0] and held_out < 12
