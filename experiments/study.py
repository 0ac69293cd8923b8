"""Every method of the paper, and its descendants, on one base, one budget of parameters and one budget of steps.

    python -m experiments.study --task=e2e --workdir=runs/study --base=GPT2 --data=E2E \\
      --out=docs/results/study_e2e.json
    python -m experiments.study --task=mrpc --workdir=runs/study --base=BERT --data=GLUE \\
      --out=docs/results/study_mrpc.json

The paper's Figure 2 in the small: quality against trained parameters. A method's run of 300 steps is begun with three
learning rates, and after 100 steps that with the lowest validation loss goes on; LoRA, full fine-tuning, BitFit and
AdapterH have two more seeds at its rate. E2E: batches of 4 of 8,000 training pairs; BLEU of greedy texts for the first
200 contexts of the test set. MRPC: batches of 8; accuracy on the development set after the last step.
A method's size is the one that brings it nearest to LoRA's parameters on query and value (r = 4 for E2E, 8 for MRPC);
full fine-tuning, FT-Top2, BitFit and IA3 have none to choose, and prefixes at most 96 (E2E) and 32 tokens (MRPC). The
same command goes on where it was stopped; --out gets each method's row as it is done, and beside it a plot. The two
commands may run at once, each on a core of its own; JAX_COMPILATION_CACHE_DIR spares them many compilations.
"""

import bisect
import json
import os
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

import lora_jax as lj
from configs import e2e, glue
from experiments import cli, train
from lora_jax import checkpoints, runs, training
from lora_jax.data import pairs, tasks
from lora_jax.generation import complete, end_tokens
from lora_jax.interop import hf
from lora_jax.metrics import bleu
from lora_jax.models.family import dimensions_of
from lora_jax.runs import bases, methods

flags.DEFINE_enum("task", "e2e", ["e2e", "mrpc"], "What is learnt.")
flags.DEFINE_string("base", None, "A folder: a GPT-2 for E2E, a RoBERTa or BERT for MRPC.")
flags.DEFINE_list("methods", [], "Only these.")
flags.DEFINE_integer("steps", 300, "Of a run.", lower_bound=1)
flags.DEFINE_integer("search_steps", 100, "After so many the rate is chosen.", lower_bound=1)
flags.declare_key_flag("workdir")
flags.declare_key_flag("data")
flags.declare_key_flag("out")
flags.mark_flags_as_required(["workdir", "base", "data"])

PAIRS, VALIDATED, CONTEXTS = 8_000, 250, 200
SEEDS = dict.fromkeys(("lora", "full", "bitfit", "adapter_h"), (0, 1, 2))
BATCH = {"e2e": 4, "mrpc": 8}
# The rates that are tried: of low-rank and other matrices that start at zero; of those that do not, or whose B has 16
# times the rate; of vectors; of the base's own weights. MRPC's are lower: at higher ones a method is no better than the
# commoner label after 300 steps, but that cannot be told after 100, when every method is at its loss.
RATES = {"e2e": (2e-3, 8e-3, 2e-2), "mrpc": (1e-3, 2e-3, 4e-3)}
_SLOWER, _FASTER = ("pissa", "lora_plus"), ("bitfit", "vera", "ia3", "prefix_embedding", "prefix_layer", "classifier")
_BASES = ("full", "top2")
OWN_RATES = {
    "e2e": dict.fromkeys(_SLOWER, (5e-4, 2e-3, 8e-3))
    | dict.fromkeys(_FASTER, (5e-3, 2e-2, 6e-2))
    | dict.fromkeys(_BASES, (3e-4, 1e-3, 3e-3)),
    "mrpc": dict.fromkeys(_SLOWER, (2e-4, 5e-4, 1e-3))
    | dict.fromkeys(_FASTER, (2e-3, 5e-3, 1e-2))
    | dict.fromkeys(_BASES, (5e-5, 1e-4, 3e-4)),
}
# The method that is compared, the config's name of it, what else differs, and the option that sets its size.
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "lora": ("lora", {}, ""),
    "lora_all": ("lora_all", {}, "lora.rank"),
    "full": ("full", {}, ""),
    "top2": ("top2", {}, ""),
    "classifier": ("classifier", {}, ""),
    "bitfit": ("bitfit", {}, ""),
    "prefix_embedding": ("prefix_embedding", {}, "prefix_embedding.prefix"),
    "prefix_layer": ("prefix_layer", {}, "prefix_layer.prefix"),
    "adapter_h": ("adapter_h", {}, "adapter.rank"),
    "adapter_l": ("adapter_l", {}, "adapter.rank"),
    "adapter_p": ("adapter_p", {}, "adapter.rank"),
    "adapter_d": ("adapter_p", {}, "adapter.rank"),  # without the first third of the layers
    "compacter": ("compacter", {}, "compacter.rank"),
    "lora_pe": ("lora_pe", {}, "lora.rank"),
    "lora_pl": ("lora_pl", {"prefix_layer.prefix": 4}, "lora.rank"),
    "lora_bitfit": ("lora_bitfit", {}, "lora.rank"),
    "rslora": ("rslora", {}, ""),
    "lora_plus": ("lora_plus", {}, ""),
    "dora": ("dora", {}, "dora.rank"),
    "pissa": ("pissa", {}, ""),
    "vera": ("vera", {}, "vera.rank"),
    "ia3": ("ia3", {}, ""),
    "lokr": ("lokr", {}, "lokr.rank"),
}
ONLY = {"top2": "e2e", "classifier": "mrpc"}
SIZES = (*range(1, 16), *range(16, 64, 4), *range(64, 160, 16), *range(192, 2049, 64))
RANK = {"e2e": 4, "mrpc": 8}
MOST = {"e2e": 96, "mrpc": 32}  # tokens of a prefix: they cost time as any


def main() -> None:
    values = flags.FLAGS
    known = [name for name in METHODS if ONLY.get(name, values.task) == values.task]
    if unknown := sorted(set(values.methods) - set(known)):
        raise ValueError(f"--methods={unknown[0]}: it is one of {', '.join(known)}")
    workdir = Path(values.workdir) / values.task
    if values.task == "e2e":
        few(workdir / "data")
    out = Path(values.out or workdir / "study.json")
    rows = {each["label"]: each for each in json.loads(out.read_text())["rows"]} if out.is_file() else {}
    for name in values.methods or known:
        rows[name] = row(name, workdir)
        ordered = [rows[label] for label in known if label in rows]
        checkpoints.write_atomically(out, (json.dumps({"rows": ordered}, indent=2) + "\n").encode())
    plot(ordered, out.with_suffix(".png"))
    print(f"written: {out}")


def few(folder: Path) -> None:
    """The pairs of E2E that are used, in its own form."""
    counts = {"train": PAIRS, "valid": VALIDATED, "test": None}
    for split, count in counts.items():
        data = tasks.named("e2e").load(flags.FLAGS.data, split)[:count]
        lines = (f"{context}||{text}\n" for context, text in zip(data["context"], data["completion"], strict=True))
        checkpoints.write_atomically(folder / f"{split}.txt", "".join(lines).encode())


def row(name: str, workdir: Path) -> dict[str, Any]:
    """A method's row of the table."""
    config, size = sized(name, workdir)
    task = flags.FLAGS.task
    rates = OWN_RATES[task].get(name, RATES[task])
    runs = {rate: workdir / name / f"rate_{rate:g}" for rate in rates}
    configs = {rate: config.copy_and_resolve_references() for rate in rates}
    for rate, own in configs.items():
        own.optimizer.learning_rate = rate
    losses = {rate: begun(configs[rate], runs[rate]) for rate in rates}
    rate = min(losses, key=losses.__getitem__)
    found = [run(configs[rate], runs[rate])]
    seeds = SEEDS.get(name, (0,))
    for seed in seeds[1:]:
        own = configs[rate].copy_and_resolve_references()
        own.seed = seed
        found.append(run(own, workdir / name / f"seed_{seed}"))
    quality = "bleu" if task == "e2e" else "accuracy"
    return {
        "label": name,
        "size": size,
        "trained": found[0]["method_trained"],
        "rate": rate,
        **{key: cli.spread([each[key] for each in found]) for key in ("validation_loss", quality)},
        "seed": list(seeds),
        "device": f"{found[0]['device']}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
    }


def config_of(name: str, workdir: Path) -> ConfigDict:
    """The config of a method, but for its size, steps and rate."""
    values = flags.FLAGS
    variant, changes, _ = METHODS[name]
    config = e2e.get_config(f"small,{variant}") if values.task == "e2e" else glue.get_config(f"base,mrpc,{variant}")
    for kind in ("lora", "dora", "pissa"):
        config[kind].rank = RANK[values.task]
        config[kind].alpha = float(RANK[values.task])
    layers = depth(values.base)
    if name == "top2":
        config.tune.select = (f"h_{{{layers - 2},{layers - 1}}}/**",)
    if name == "adapter_d":
        config.adapter.layers = tuple(range(layers // 3, layers))
    config.update_from_flattened_dict(changes)
    config.base, config.seed = values.base, 0
    config.data.path = str(workdir / "data") if values.task == "e2e" else values.data
    config.data.batch_size, config.data.buckets = BATCH[values.task], 2
    config.optimizer.warmup_steps = 20
    config.log_every, config.steps = 20, flags.FLAGS.steps
    if values.task == "mrpc":
        config.seeds, config.best, config.data.length = (), "", 128
    return config


def sized(name: str, workdir: Path) -> tuple[ConfigDict, int | None]:
    """The config of a method, of the size that brings it nearest to LoRA's parameters, and that size."""
    config, option = config_of(name, workdir), METHODS[name][2]
    if not option:
        return config, None
    base = bases.load(config)
    wanted = trained(config_of("lora", workdir), base)

    def count(size: int) -> int:
        config.update_from_flattened_dict({option: size})
        kind = config[option.split(".")[0]]
        if "alpha" in kind:
            kind.alpha = float(size)  # a scale of 1, as LoRA's
        return trained(config, base)

    multiple = config.compacter.n if name == "compacter" else 1
    most = MOST[flags.FLAGS.task] if name.startswith("prefix") else SIZES[-1]
    sizes = [size for size in SIZES if size % multiple == 0 and size <= most]
    at = bisect.bisect_left(sizes, wanted, key=count)
    size = min(sizes[max(at - 1, 0) : at + 1], key=lambda size: abs(count(size) - wanted))
    size = sizes[bisect.bisect_left(sizes, count(size), key=count)]  # the smallest that comes to the same
    count(size)
    return config, size


def depth(base: str) -> int:
    """The layers of a base."""
    return dimensions_of(hf.without_weights(base)).depth


def trained(config: ConfigDict, base: bases.Base) -> int:
    """How many parameters train, a head apart."""
    report = lj.check(lj.from_spec(methods.spec(config, base.model, base.new)), base.params)
    return sum(each.trained for each in report.rows if not each.path.startswith("classifier/"))


def begun(config: ConfigDict, folder: Path) -> float:
    """The validation loss of a run after its first steps, which are made where they are not there yet."""
    at = flags.FLAGS.search_steps
    training.claim(folder, config)  # another config's results are refused
    if at not in _validated(folder):
        job = runs.prepare(config, folder).job
        if not training.train(job._replace(total=at)).finished:
            raise InterruptedError(f"{folder} was stopped: the same command goes on")
    return _validated(folder)[at]


def _validated(folder: Path) -> dict[int, float]:
    """The validation loss of a run by its step."""
    entries = training.read_metrics(folder)
    return {entry["step"]: entry["validation_loss"] for entry in entries if "validation_loss" in entry}


def run(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """The summary of a run, made where it is not there yet."""
    file = folder / "study.json"
    training.claim(folder, config)
    if file.is_file():
        return json.loads(file.read_text())
    if not train.train(config, folder):
        raise InterruptedError(f"{folder} was stopped: the same command goes on")
    base = bases.load(config)
    found = json.loads((folder / "summary.json").read_text()) | {"method_trained": trained(config, base)}
    if flags.FLAGS.task == "e2e":
        found["bleu"] = texts_score(config, folder, base)
    checkpoints.write_atomically(file, (json.dumps(found, indent=2) + "\n").encode())
    return found


def texts_score(config: ConfigDict, folder: Path, base: bases.Base) -> float:
    """BLEU of greedy texts for the first contexts of the test set."""
    method, delta = bases.adapter(folder / "adapter", base)
    groups = pairs.contexts(tasks.named("e2e").load(config.data.path, "test"))
    asked, references = list(groups)[:CONTEXTS], list(groups.values())[:CONTEXTS]
    eos = base.model.config.eos_token_id
    inserted = methods.placeholders(method.spec, base.model)
    texts = complete(
        base.model,
        method.apply(lj.without_tuned(base.params, delta), delta),
        base.tokenizer,
        pairs.prompts(asked, base.tokenizer, eos=eos, **inserted),
        max_new_tokens=64,
        eos=end_tokens(base.tokenizer, eos),
        batch_size=50,
    )
    return bleu(texts, [[pairs.clean(text) for text in own] for own in references])


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Quality, and the validation loss, against trained parameters, as the paper's Figure 2."""
    from matplotlib.figure import Figure

    quality = "bleu" if flags.FLAGS.task == "e2e" else "accuracy"
    titles = {"bleu": "BLEU", "accuracy": "accuracy", "validation_loss": "validation loss, nats per label"}
    figure = Figure(figsize=(15, 7), layout="constrained")
    for axes, measured in zip(figure.subplots(1, 2), (quality, "validation_loss"), strict=True):
        ordered = sorted(rows, key=lambda row: row[measured]["score"])
        for number, each in enumerate(ordered):
            score = each[measured]
            at = (each["trained"], score["score"])
            ends = [[score["score"] - score["low"]], [score["high"] - score["score"]]]
            color = axes.errorbar(*at, yerr=ends, fmt="o", capsize=3)[0].get_color()
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.5}
            beside = (1.04, (number + 0.5) / len(rows))  # in their order, so that no name hides another
            place = {"xytext": beside, "textcoords": "axes fraction", "verticalalignment": "center"}
            axes.annotate(each["label"], at, color=color, arrowprops=line, **place)
        axes.set(xscale="log", xlabel="trained parameters (a head apart)", ylabel=titles[measured])
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    cli.run(main)
