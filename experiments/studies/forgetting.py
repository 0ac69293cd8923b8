"""What does the base forget of its own text? ("LoRA Learns Less and Forgets Less", arXiv 2405.09673.)

    python -m experiments.study --config=configs/studies.py:forgetting --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --config.text=HELD_OUT.txt --out=docs/results/study_forgetting.json

The source (Llama 2 on code and maths): LoRA learns less and forgets less than full fine-tuning, on about one curve of
the two, and full's updates have 10 to 100 times LoRA's rank. Here: E2E on a small GPT-2 at each method's best rate; the
loss on the task and on held-out text of the kind the base was made of, with the change at strengths from 0 to 1.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.studies import TARGETS, of_method
from experiments.studies.plots import curves
from experiments.studies.reading import Row, at_best_rate, groups, row
from experiments.studies.running import Run, swept
from lora_jax import checkpoints, training
from lora_jax.data import text
from lora_jax.data.batches import Schedule, packed
from lora_jax.metrics.statistics import spread
from lora_jax.models.family import dimensions_of
from lora_jax.runs import bases
from lora_jax.runs.run import load_setup

LENGTH, BATCH = 256, 8


def members(config: ConfigDict, data: Callable[..., str]) -> dict[str, ConfigDict]:
    """A sweep of rates and seeds for each rank of LoRA on all matrices, and for full fine-tuning."""
    if config.study == "forgetting" and not config.text:
        raise ValueError("config.text is empty: name held-out text files of the base's kind, --config.text=FILE.txt")
    config.run.data.path, made = data(), {}
    config.run.lora.select = TARGETS["all"]
    for rank in config.ranks:
        config.run.lora.rank = rank
        made[f"LoRA, r = {rank}"] = swept(config.run, learning_rate=config.rates, seed=config.seeds)
    full = swept(of_method(config.run, "full"), learning_rate=config.full_rates, seed=config.seeds)
    return made | {"full": full}


def text_batches(config: ConfigDict, base: bases.Base) -> Schedule:
    """The first batches of the base's own text."""
    eos, length = base.model.config.eos_token_id, min(LENGTH, dimensions_of(base.model).max_length)
    tokens = text.encode(text.files(config.text), base.tokenizer, eos=eos)
    return packed(tokens[: config.text_batches * BATCH * length], BATCH, length, eos=eos)


class Losses:
    """The losses of parameters on the task's validation data and on the text."""

    def __init__(self, config: ConfigDict, run: Run) -> None:
        setup = load_setup(run.config)
        self.base, self.objective = setup.base, training.language_model(setup.base.model)
        self.schedules = {"validation_loss": setup.batches["valid"]}
        if config.text:
            self.schedules["text_loss"] = text_batches(config, setup.base)

    def __call__(self, params: Any) -> dict[str, float]:
        validate = training.validate
        return {
            name: validate(self.objective, params, batches)["validation_loss"]
            for name, batches in self.schedules.items()
        }


def rows(config: ConfigDict, runs: Sequence[Run]) -> list[Row]:
    """A row for each method and strength, at its best rate."""
    losses, made = Losses(config, runs[0]), []
    for name, of_name in groups(runs, lambda run: run.name).items():
        best = at_best_rate(of_name)
        trained = [checkpoints.load(run.folder) for run in best]
        for strength in config.strengths:
            adapted = (one.method.apply(losses.base.params, one.delta, strength=strength) for one in trained)
            of_seeds = [losses(params) for params in adapted]
            figures = {key: spread([of[key] for of in of_seeds]) for key in losses.schedules}
            label = f"{name}, strength {strength:g}"
            made.append(row(label, best) | figures | {"method": name, "strength": strength})
    return made


def plot(config: ConfigDict, runs: Sequence[Run], rows: Sequence[Row], file: Path) -> None:
    """The loss on text over that on the task, a line for each method, from the base to the trained adapter."""
    lines = {}
    for name in dict.fromkeys(of["method"] for of in rows):
        of_name = [of for of in rows if of["method"] == name]
        task, text_loss = ([of[key]["score"] for of in of_name] for key in ("validation_loss", "text_loss"))
        lines[name] = task, text_loss
    x, y = "loss on the task, nats per label", "loss on the base's text, nats per token"
    curves(file, {"strength 0 to 1": lines}, x=x, y=y, log=False)
