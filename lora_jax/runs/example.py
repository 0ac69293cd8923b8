"""An example that needs no files and no network: a tiny GPT-2 and two styles of describing made-up restaurants."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import lora_jax as lj
from lora_jax import checkpoints, training
from lora_jax.data import pairs, restaurants, text
from lora_jax.data.batches import Schedule, bucketed
from lora_jax.generation import complete
from lora_jax.metrics import bleu
from lora_jax.models import gpt2
from lora_jax.training.config import OptimizerConfig, TrainConfig

EOS = 0  # of the tokenizers that `data.text` trains
LENGTH = 96  # tokens: longer than any example


class Size(NamedTuple):
    """How much work to do; the defaults take about three minutes on two cores."""

    width: int = 128
    layers: int = 4
    base_steps: int = 300
    steps: int = 160
    batch_size: int = 16
    restaurants: int = 4000
    contexts: int = 64  # that are described and scored


class Style(NamedTuple):
    """The data of one style."""

    train: Schedule
    valid: Schedule
    references: dict[str, list[str]]  # context -> all its descriptions


class Score(NamedTuple):
    """What a model makes of a style's validation restaurants."""

    loss: float
    bleu: float
    texts: list[str]


class Row(NamedTuple):
    """A way to adapt: its name, the number of trained parameters, the bytes of its adapter's file, its score."""

    name: str
    trained: int
    bytes: int
    score: Score


def make_tokenizer(workdir: Path, size: Size) -> Tokenizer:
    """A small vocabulary learnt from both styles."""
    lines: list[str] = []
    for style in restaurants.STYLES:
        examples = restaurants.pairs(style, "train", size.restaurants)
        lines += [*examples["context"], *(" " + completion for completion in examples["completion"])]
    file = workdir / "text.txt"
    file.write_text("\n\n".join(lines))
    return text.train_tokenizer([file], 400)


def make_style(name: str, tokenizer: Tokenizer, size: Size) -> Style:
    """Batches and references of one style, "plain" or "lively"."""
    train, valid = restaurants.pairs(name, "train", size.restaurants), restaurants.pairs(name, "valid", size.contexts)
    encoded = [pairs.encode(examples, tokenizer, eos=EOS, length=LENGTH) for examples in (train, valid)]
    schedules = [bucketed(split, size.batch_size, buckets=1) for split in encoded]
    return Style(schedules[0], schedules[1], pairs.contexts(valid))


def make_model(tokenizer: Tokenizer, size: Size) -> tuple[gpt2.GPT2, Any]:
    """A GPT-2 and its random parameters."""
    sizes: dict[str, Any] = {"n_positions": 2 * LENGTH, "n_embd": size.width, "n_layer": size.layers, "n_head": 4}
    # scan_layers: one layer compiles instead of all
    config = gpt2.GPT2Config(tokenizer.get_vocab_size(), **sizes, eos_token_id=EOS, scan_layers=True)
    model = gpt2.GPT2(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def train(
    workdir: Path, method: lj.ParamTransform, model: gpt2.GPT2, params: Any, style: Style, rate: float, steps: int
) -> tuple[lj.Delta, dict[str, str]]:
    """The method's delta, trained on a style in a workdir at that learning rate, and the identity of its base."""
    options: dict[str, Any] = {"schedule": "cosine", "warmup_steps": steps // 20, "end_lr_ratio": 0.05, "b2": 0.98}
    optimizer = OptimizerConfig(learning_rate=rate, clip_norm=1.0, **options)
    every: dict[str, Any] = {"log_every": max(steps // 20, 1), "eval_every": max(steps // 5, 1), "save_every": steps}
    config = TrainConfig(steps=steps, max_to_keep=1, optimizer=optimizer, **every)
    base = checkpoints.identity(params, "runs/quickstart/base")
    parts: dict[str, Any] = {"method": method, "model": model, "params": params, "base": base}
    job = training.prepare(config, workdir, **parts, batches=style.train, validation=style.valid)
    result = training.train(job)
    if not result.finished:
        raise InterruptedError(f"{workdir} was stopped at step {result.step} of {steps}")
    return result.delta, base


def score(model: gpt2.GPT2, params: Any, tokenizer: Tokenizer, style: Style) -> Score:
    """Loss and BLEU on the validation restaurants."""
    loss = training.validate(training.language_model(model), params, style.valid)["validation_loss"]
    prompts = pairs.prompts(list(style.references), tokenizer, eos=EOS)
    texts = complete(model, params, tokenizer, prompts, max_new_tokens=64, eos=EOS)
    return Score(loss, bleu(texts, list(style.references.values())), texts)


def merged_difference(model: gpt2.GPT2, adapted: Any, style: Style) -> tuple[float, float]:
    """The largest difference of logits between adapted and merged parameters, and the largest logit."""
    batch = style.valid(0)[0]
    forward = jax.jit(training.language_model(model).forward)
    of_adapted, of_merged = (np.asarray(forward(params, batch)) for params in (adapted, lj.merge(adapted)))
    return float(np.abs(of_adapted - of_merged).max()), float(np.abs(of_merged).max())
