"""Our side of real texts: an epoch's slice from text to updated weights, decoding, and a sweep."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np

import lora_jax as lj
from configs import e2e, glue
from experiments.benchmark.ours import Parts, trainer
from lora_jax import training
from lora_jax.data import batches, pairs
from lora_jax.generation import generate
from lora_jax.generation.texts import batches_of
from lora_jax.interop import hf
from lora_jax.models.family import dimensions_of
from lora_jax.runs import bases, methods
from lora_jax.runs.tasks import task_named


def epoch(work: dict[str, Any]) -> Parts:
    """From texts to updated weights, with the config's buckets, or all padded to work["pad"] tokens."""
    config = e2e.get_config("small,lora") if work["task"] == "e2e" else glue.get_config("base,mrpc,lora")
    config.base, config.data.batch_size = work["base"], work["batch"]
    base = bases.load(config)
    spec = methods.spec(config, base.model, base.new)
    is_e2e = work["task"] == "e2e"
    objective = (
        training.language_model(base.model, config.label_smoothing) if is_e2e else training.classifier(base.model)
    )
    step = trainer(objective, lj.from_spec(spec), base.params, config.optimizer)
    examples = datasets.Dataset.from_dict(json.loads(Path(work["file"]).read_text()))

    def read() -> Iterator[dict[str, np.ndarray]]:
        if not is_e2e:
            yield from task_named(config.data.name).batches(examples, config, base, spec)(0)
            return
        encoded = pairs.encode(examples, base.tokenizer, eos=base.model.config.eos_token_id, length=512)
        for batch in batches.bucketed(encoded, work["batch"], buckets=config.data.buckets)(0):
            more = ((0, 0), (0, work["pad"] - batch["tokens"].shape[1] if work.get("pad") else 0))
            yield batch | {name: np.pad(batch[name], more) for name in ("tokens", "mask")}

    def unit() -> None:
        for batch in read():
            state = step(batch)
        jax.block_until_ready(state)

    return {"unit": unit}


def decode(work: dict[str, Any]) -> Parts:
    """Texts for contexts, greedily or with beams."""
    model, params, tokenizer = hf.load(work["base"])
    assert tokenizer is not None
    eos = model.config.eos_token_id
    contexts = json.loads(Path(work["file"]).read_text())["context"]
    written = 0

    def unit() -> None:
        nonlocal written
        written = 0
        rows = pairs.prompts(contexts, tokenizer, eos=eos)
        for _, tokens, mask in batches_of(rows, work["batch"], dimensions_of(model).max_length - 64):
            new = np.asarray(generate(model, params, tokens, mask, eos=eos, pad=eos, **work["how"]))
            written += int((new != eos).sum())

    return {"unit": unit, "tokens": lambda: float(written)}


def sweep(work: dict[str, Any]) -> Parts:
    """K learning rates from text to saved adapters: in one process at once, or in K processes one after the other."""
    tokens: list[float] = []  # seconds for one, in the last hundred steps: nothing compiles any more
    rates = [f"{1e-3 * (1 + number / 10):g}" for number in range(work["members"])]

    def train(folder: str, name: str, *values: str) -> None:
        command = [sys.executable, "-m", "experiments.train", "--config=configs/e2e.py:small", *values]
        command += [f"--workdir={folder}/{name}", f"--config.base={work['base']}", f"--config.data.path={work['data']}"]
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        command += [f"--config.steps={work['steps']}", "--config.optimizer.warmup_steps=20"]
        subprocess.run(command, check=True, env=os.environ | cache)
        metrics = next(Path(folder, name).rglob("metrics.jsonl")).read_text().splitlines()
        tokens.append(1 / [row["tokens_per_second"] for row in map(json.loads, metrics) if "tokens" in row][-1])

    def unit() -> None:
        tokens.clear()
        with tempfile.TemporaryDirectory() as folder:
            if work["at_once"]:
                train(folder, "sweep", f"--config.sweep.learning_rate={','.join(rates)}")
            else:
                for rate in rates:
                    train(folder, rate, f"--config.optimizer.learning_rate={rate}")

    return {"unit": unit, "token": lambda: sum(tokens) / len(tokens)}
