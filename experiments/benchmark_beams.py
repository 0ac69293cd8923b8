"""Beam search against transformers': the same model, prompts and rule, in turn on the same machine.

    python -m experiments.benchmark_beams --base=FOLDER --data=FOLDER --out=docs/results/beams.json

The contexts of E2E's test split (all 630 unless --contexts says fewer) are decoded by both sides, each batch by one and
then by the other, so that what else the machine does meets both alike. Both get the same left-padded batches of about
equal length, and how many texts differ is counted. Compilation is not counted, but said. Where the time goes is shown
on one batch: what the prompts alone cost each side, and how transformers' time falls to the model and to reordering its
cache.
"""

import functools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
import transformers
from absl import flags
from tqdm import tqdm

from experiments import cli
from lora_jax.checkpoints import write_atomically
from lora_jax.data import e2e
from lora_jax.data.pairs import contexts, prompts
from lora_jax.generation import generate
from lora_jax.generation.texts import batches_of
from lora_jax.interop import hf

flags.DEFINE_string("base", None, "A Hugging Face folder: both sides load it.")
flags.declare_key_flag("data")
flags.DEFINE_integer("contexts", None, "Only so many contexts.", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "Contexts in a batch.", lower_bound=1)
flags.DEFINE_integer("num_beams", 10, "Beams.")
flags.DEFINE_integer("max_new_tokens", 64, "The most tokens of a text.")
flags.declare_key_flag("out")
flags.mark_flags_as_required(["base", "data"])


def main() -> None:
    values = flags.FLAGS
    model, params, tokenizer = hf.load(values.base)
    if tokenizer is None:
        raise FileNotFoundError(f"{values.base} has no tokenizer.json: put the base's own there")
    eos = model.config.eos_token_id
    groups = contexts(e2e.load(values.data, "test"))
    asked = prompts(list(groups)[: values.contexts], tokenizer, eos=eos)
    limits: dict[str, Any] = {"max_new_tokens": values.max_new_tokens, "num_beams": values.num_beams}
    limits |= {"length_penalty": 0.9, "no_repeat_ngram_size": 4}
    batches = [
        batch[1:] for batch in batches_of(asked, values.batch_size, model.config.n_positions - values.max_new_tokens)
    ]
    sides = {"lora_jax": ours(model, params, eos), "transformers": theirs(values.base, eos)}
    rows, how = compare(sides, batches, limits)
    middle = batches[len(batches) // 2]
    for row in rows:
        side = sides[row["label"]]
        row["batch_seconds"] = min(timed(side, *middle, limits)[0] for _ in range(2))
        row["prompts_seconds"] = min(timed(side, *middle, limits | {"max_new_tokens": 1})[0] for _ in range(3))
    how["transformers_seconds_of_a_batch"] = parts(sides["transformers"], *middle, limits)
    write({"rows": rows, "texts": len(asked)} | how | limits)


def compare(sides: dict[str, Any], batches: list[tuple], limits: dict[str, Any]) -> tuple[list[dict], dict[str, Any]]:
    """A row for each side, with its seconds over all batches, in turn; and how many texts differ."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    compiling, different, shapes = 0.0, 0, set()
    for tokens, mask in tqdm(batches, unit="batch"):
        if tokens.shape not in shapes:
            shapes.add(tokens.shape)
            compiling += timed(sides["lora_jax"], tokens, mask, limits)[0]
        found = {}
        for name in sorted(sides, reverse=len(seconds["lora_jax"]) % 2 == 1):  # by turns each side goes first
            taken, found[name] = timed(sides[name], tokens, mask, limits)
            seconds[name].append(taken)
        length = found["transformers"].shape[1]
        different += int((found["lora_jax"][:, :length] != found["transformers"]).any(1).sum())
    whole = sum(seconds["transformers"])
    rows = [{"label": name, "seconds": sum(own), "ratio": sum(own) / whole} for name, own in seconds.items()]
    return rows, {
        "texts_that_differ": different,
        "ratio_median_of_batches": statistics.median(np.divide(seconds["lora_jax"], seconds["transformers"]).tolist()),
        "first_calls_with_compilation_seconds": compiling,
        "batches": len(batches),
    }


def ours(model: Any, params: Any, eos: int) -> Any:
    def side(tokens: np.ndarray, mask: np.ndarray, limits: dict[str, Any]) -> np.ndarray:
        return np.asarray(generate(model, params, tokens, mask, eos=eos, pad=eos, **limits))

    return side


def theirs(folder: str, eos: int) -> Any:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()

    def side(tokens: np.ndarray, mask: np.ndarray, limits: dict[str, Any]) -> np.ndarray:
        with torch.inference_mode():
            inputs = {"input_ids": torch.from_numpy(tokens).long(), "attention_mask": torch.from_numpy(mask).long()}
            new = model.generate(**inputs, do_sample=False, eos_token_id=eos, pad_token_id=eos, **limits)
        return new[:, tokens.shape[1] :].numpy()

    return side


def timed(side: Any, tokens: np.ndarray, mask: np.ndarray, limits: dict[str, Any]) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    new = side(tokens, mask, limits)
    return time.perf_counter() - begin, new


def parts(side: Any, tokens: np.ndarray, mask: np.ndarray, limits: dict[str, Any]) -> dict[str, float]:
    """Seconds that transformers spends in the model, in reordering the cache, and in all."""
    seconds = {"model": 0.0, "reordering": 0.0}

    def clocked(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[name] += time.perf_counter() - begin
            return result

        return call

    forward, reorder = transformers.GPT2LMHeadModel.forward, transformers.DynamicCache.reorder_cache
    with (
        mock.patch.object(transformers.GPT2LMHeadModel, "forward", functools.wraps(forward)(clocked("model", forward))),
        mock.patch.object(transformers.DynamicCache, "reorder_cache", clocked("reordering", reorder)),
    ):
        whole = timed(side, tokens, mask, limits)[0]
    return {**seconds, "all": whole}


def write(result: dict[str, Any]) -> None:
    """Writes and prints the figures."""
    result |= {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    content = json.dumps(result, indent=2) + "\n"
    if flags.FLAGS.out:
        write_atomically(Path(flags.FLAGS.out), content.encode())
    print(content, end="")


if __name__ == "__main__":
    cli.run(main)
