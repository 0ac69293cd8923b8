"""LoRA from end to end in a few minutes on a CPU: no download, no data, no GPU.

    make quickstart        (python -m experiments.quickstart --workdir=runs/quickstart)

A tiny GPT-2 learns to describe restaurants in plain sentences. That is the base. Then it is adapted
to a lively style, by LoRA and by full fine-tuning, and compared with the frozen base. Writes the
runs, the adapters and quickstart.png into the workdir. The parts are in lora_jax.runs.example.
"""

import shutil
from pathlib import Path

from absl import flags

import lora_jax as lj
from experiments import cli
from lora_jax import checkpoints
from lora_jax.models import gpt2
from lora_jax.runs import example, tables
from lora_jax.runs.example import Row, Size
from lora_jax.training import locks, stopping

# The token embedding is the output head too: the lively style has words that the base never says.
LORA = lj.lora(lj.select("**/{attn,mlp}/*/kernel", "wte/embedding", axes=gpt2.AXES), rank=8, alpha=16)
FULL = lj.tune(lj.select("**"))


def main() -> None:
    workdir = Path(flags.FLAGS.workdir or "runs/quickstart")
    with stopping.noted(), locks.locked(workdir):
        run(workdir, Size())


def run(workdir: Path, size: Size) -> list[Row]:
    """Everything; returns the rows of the table."""
    workdir.mkdir(parents=True, exist_ok=True)
    for name in ("base", "lora", "full"):
        shutil.rmtree(workdir / name, ignore_errors=True)
    tokenizer = example.make_tokenizer(workdir, size)
    plain, lively = (example.make_style(name, tokenizer, size) for name in ("plain", "lively"))
    model, start = example.make_model(tokenizer, size)
    print(f"\n1. A base: GPT-2 of {size.layers} layers, trained on the plain style")
    delta, _ = example.train(workdir / "base", FULL, model, start, plain, 3e-3, size.base_steps)
    params = lj.merge(FULL.apply(start, delta))
    before = checkpoints.identity(params, "runs/quickstart/base")
    rows = [Row("frozen base", 0, 0, example.score(model, params, tokenizer, lively))]
    ways = (("LoRA", LORA, workdir / "lora", 1e-2), ("full fine-tuning", FULL, workdir / "full", 2e-3))
    for number, (name, method, folder, learning_rate) in enumerate(ways, 2):
        print(f"\n{number}. {name[0].upper()}{name[1:]} on the lively style")
        report = lj.check(method, params)
        if name == "LoRA":
            print(report)
        delta, base = example.train(folder, method, model, params, lively, learning_rate, size.steps)
        file = checkpoints.save_adapter(folder / "adapter", method, delta, base)
        method, delta, _ = checkpoints.load_adapter(file)  # what is scored is the file's
        adapted = method.apply(params, delta)
        rows.append(Row(name, report.trained, file.stat().st_size, example.score(model, adapted, tokenizer, lively)))
        if name == "LoRA":
            difference, largest = example.merged_difference(model, adapted, lively)

    print("\n4. Descriptions of restaurants that none of them has seen")
    show(rows, list(lively.references))
    print(f"merged and adapted: logits differ by {difference:.1e} at most, the largest is {largest:.1f}")
    after = checkpoints.identity(params, "runs/quickstart/base")
    print(f"base before: {before['content']}\nbase after:  {after['content']}")
    if before != after:
        raise ValueError("the base changed")
    runs = {name: folder for name, _, folder, _ in ways}
    tables.plot_losses(workdir / "quickstart.png", runs, frozen=rows[0].score.loss)
    print(f"\nloss curves: {workdir / 'quickstart.png'}\nadapter:     {workdir / 'lora' / 'adapter'}")
    return rows


def show(rows: list[Row], contexts: list[str]) -> None:
    """Prints the table, and what base and LoRA say of three restaurants."""
    print(f"\n{'':18}{'trained':>12}{'adapter':>14}{'validation':>12}{'BLEU':>8}")
    print(f"{'':18}{'parameters':>12}{'bytes':>14}{'loss':>12}")
    for row in rows:
        print(f"{row.name:18}{row.trained:12,}{row.bytes:14,}{row.score.loss:12.3f}{row.score.bleu:8.1f}")
    for index in range(3):
        print(f"\n{contexts[index]}")
        for row in rows[:2]:
            print(f"  {row.name:12} {row.score.texts[index]}")
    print()


if __name__ == "__main__":
    cli.run(main)
