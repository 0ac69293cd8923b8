"""LoRA from end to end in a few minutes on a CPU: no download, no data, no GPU.

    make quickstart        (python -m experiments.quickstart --workdir=runs/quickstart)

A tiny GPT-2 learns to describe restaurants in plain sentences. That is the base. Then it is adapted
to a lively style, by LoRA and by full fine-tuning, and compared with the frozen base. Writes the
runs, the adapters and quickstart.png into the workdir.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tokenizers import Tokenizer

import lora_jax as lj
from experiments import cli
from lora_jax import checkpoints, training
from lora_jax.data import pairs, restaurants, text
from lora_jax.data.batches import Schedule, bucketed
from lora_jax.generation import complete
from lora_jax.metrics import bleu
from lora_jax.models import gpt2

EOS = 0  # of the tokenizers that `data.text` trains
LENGTH = 96  # tokens: longer than any example
# The token embedding is the output head too: the lively style has words that the base never says.
LORA = lj.lora(lj.select("**/{attn,mlp}/*/kernel", "wte/embedding", axes=gpt2.AXES), rank=8, alpha=16)
FULL = lj.tune(lj.select("**"))


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


class Row(NamedTuple):
    """What the table says of one way to adapt."""

    name: str
    trained: int
    bytes: int
    loss: float
    bleu: float
    texts: list[str]


def main() -> None:
    run(Path(flags.FLAGS.workdir or "runs/quickstart"), Size())


def run(workdir: Path, size: Size) -> list[Row]:
    """Everything; returns the rows of the table."""
    workdir.mkdir(parents=True, exist_ok=True)
    for name in ("base", "lora", "full"):
        shutil.rmtree(workdir / name, ignore_errors=True)
    tokenizer = make_tokenizer(workdir, size)
    plain, lively = (make_style(name, tokenizer, size) for name in ("plain", "lively"))
    model = gpt2.GPT2(
        gpt2.GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_positions=2 * LENGTH,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=4,
            eos_token_id=EOS,
            scan_layers=True,  # compiles one layer instead of all
        )
    )
    print(f"\n1. A base: GPT-2 of {size.layers} layers, trained on the plain style")
    params = pretrain(workdir / "base", model, plain, size)
    before = checkpoints.identity(params, "runs/quickstart/base")

    print("\n2. LoRA on the lively style")
    print(lj.check(LORA, params))
    adapted, lora_bytes = adapt(workdir / "lora", LORA, model, params, lively, 1e-2, size)
    print("\n3. Full fine-tuning on the lively style")
    tuned, full_bytes = adapt(workdir / "full", FULL, model, params, lively, 2e-3, size)

    print("\n4. Descriptions of restaurants that none of them has seen")
    rows = [
        score("frozen base", 0, 0, model, params, tokenizer, lively),
        score("LoRA", trained(LORA, params), lora_bytes, model, adapted, tokenizer, lively),
        score("full fine-tuning", trained(FULL, params), full_bytes, model, tuned, tokenizer, lively),
    ]
    report(rows, list(lively.references))
    difference, largest = merged_difference(model, adapted, lively)
    print(f"merged and adapted: logits differ by {difference:.1e} at most, the largest is {largest:.1f}")
    after = checkpoints.identity(params, "runs/quickstart/base")
    print(f"base before: {before['content']}\nbase after:  {after['content']}")
    if before != after:
        raise ValueError("the base changed")
    plot(workdir, rows[0].loss)
    print(f"\nloss curves: {workdir / 'quickstart.png'}\nadapter:     {workdir / 'lora' / 'adapter'}")
    return rows


def make_tokenizer(workdir: Path, size: Size) -> Tokenizer:
    """A small vocabulary learnt from both styles."""
    lines: list[str] = []
    for style in restaurants.STYLES:
        examples = restaurants.pairs(style, "train", size.restaurants)
        lines += [*examples["context"], *(" " + each for each in examples["completion"])]
    file = workdir / "text.txt"
    file.write_text("\n\n".join(lines))
    return text.train_tokenizer([file], 400)


def make_style(name: str, tokenizer: Tokenizer, size: Size) -> Style:
    """Batches and references of one style."""

    def batches(split: str, count: int) -> Schedule:
        examples = restaurants.pairs(name, split, count)
        encoded = pairs.encode(examples, tokenizer, eos=EOS, length=LENGTH)
        return bucketed(encoded, size.batch_size, buckets=1)

    valid = restaurants.pairs(name, "valid", size.contexts)
    return Style(batches("train", size.restaurants), batches("valid", size.contexts), pairs.contexts(valid))


def make_config(steps: int, learning_rate: float) -> ConfigDict:
    """What `training.prepare` needs to know."""
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 1,
            "steps": steps,
            "label_smoothing": 0.0,
            "accumulate": 1,
            "log_every": max(steps // 20, 1),
            "eval_every": max(steps // 5, 1),
            "save_every": steps,
            "keep": 1,
            "optimizer": {
                "learning_rate": learning_rate,
                "schedule": "cosine",
                "warmup_steps": steps // 20,
                "final_share": 0.05,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.01,
                "decay": ("**",),
                "clip_norm": 1.0,
            },
        }
    )


def pretrain(workdir: Path, model: gpt2.GPT2, style: Style, size: Size) -> Any:
    """The base: random weights, all of which are tuned, then merged."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    start = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    return lj.merge(train(workdir, FULL, model, start, style, 3e-3, size.base_steps)[0])


def adapt(
    workdir: Path,
    method: lj.ParamTransform,
    model: gpt2.GPT2,
    params: Any,
    style: Style,
    learning_rate: float,
    size: Size,
) -> tuple[Any, int]:
    """Adapted params, of the adapter as it was saved and loaded again, and the file's bytes."""
    _, delta, base = train(workdir, method, model, params, style, learning_rate, size.steps)
    file = checkpoints.save_adapter(workdir / "adapter", method, delta, base)
    method, delta, _ = checkpoints.load_adapter(file)
    return method.apply(params, delta), file.stat().st_size


def train(
    workdir: Path,
    method: lj.ParamTransform,
    model: gpt2.GPT2,
    params: Any,
    style: Style,
    learning_rate: float,
    steps: int,
) -> tuple[Any, lj.Delta, dict[str, str]]:
    """(adapted params, delta, identity of the base)."""
    base = checkpoints.identity(params, "runs/quickstart/base")
    job = training.prepare(
        make_config(steps, learning_rate),
        workdir,
        method=method,
        model=model,
        params=params,
        base=base,
        batches=style.train,
        validation=style.valid,
    )
    delta = training.train(job).delta
    return method.apply(params, delta), delta, base


def trained(method: lj.ParamTransform, params: Any) -> int:
    return lj.check(method, params).trained


def score(
    name: str,
    trained: int,
    bytes: int,
    model: gpt2.GPT2,
    params: Any,
    tokenizer: Tokenizer,
    style: Style,
) -> Row:
    """Loss and BLEU on the validation restaurants."""
    loss = training.validate(training.language_model(model), params, style.valid)["validation_loss"]
    prompts = pairs.prompts(list(style.references), tokenizer, eos=EOS)
    texts = complete(model, params, tokenizer, prompts, max_new_tokens=64, eos=EOS)
    return Row(name, trained, bytes, loss, bleu(texts, list(style.references.values())), texts)


def report(rows: list[Row], contexts: list[str]) -> None:
    """Prints the table, and what base and LoRA say of three restaurants."""
    print(f"\n{'':18}{'trained':>12}{'adapter':>14}{'validation':>12}{'BLEU':>8}")
    print(f"{'':18}{'parameters':>12}{'bytes':>14}{'loss':>12}")
    for row in rows:
        print(f"{row.name:18}{row.trained:12,}{row.bytes:14,}{row.loss:12.3f}{row.bleu:8.1f}")
    for index in range(3):
        print(f"\n{contexts[index]}")
        for row in rows[:2]:
            print(f"  {row.name:12} {row.texts[index]}")
    print()


def merged_difference(model: gpt2.GPT2, adapted: Any, style: Style) -> tuple[float, float]:
    """The largest difference of logits between adapted and merged, and the largest logit."""
    batch = style.valid(0)[0]
    forward = jax.jit(training.language_model(model).forward)
    ours, merged = (np.asarray(forward(params, batch)) for params in (adapted, lj.merge(adapted)))
    return float(np.abs(ours - merged).max()), float(np.abs(merged).max())


def plot(workdir: Path, frozen: float) -> None:
    """Training and validation loss of both ways to adapt, and the base's."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run, name, color in (("lora", "LoRA", "C0"), ("full", "full fine-tuning", "C1")):
        entries = training.read_metrics(workdir / run)
        for key, style, label in (("loss", "-", name), ("validation_loss", "o", None)):
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            axes.plot(*zip(*points, strict=True), style, color=color, label=label)
    axes.axhline(frozen, color="gray", linestyle="--", label="frozen base")
    axes.set(xlabel="step", ylabel="nats per token (dots: validation)", yscale="log")
    axes.legend()
    figure.savefig(workdir / "quickstart.png", dpi=120)


if __name__ == "__main__":
    cli.run(main)
