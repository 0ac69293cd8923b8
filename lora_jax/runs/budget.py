"""Comparing methods at one budget: a size for a number of parameters, a learning rate after the first steps."""

import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax import training
from lora_jax.checkpoints import write_atomically
from lora_jax.core.extras import extra
from lora_jax.data import pairs, tasks
from lora_jax.data.json_files import read_json
from lora_jax.data.tasks import references
from lora_jax.metrics import bleu
from lora_jax.models.family import family_of
from lora_jax.runs import bases, methods, run
from lora_jax.runs.config import check
from lora_jax.runs.evaluation import complete, json_lines
from lora_jax.runs.evaluation import scores as scores_of
from lora_jax.runs.reload import load, read_config
from lora_jax.runs.tables import write_json
from lora_jax.runs.tasks import task_named
from lora_jax.training import locks, stopping


def write_pairs(task: str, source: str, folder: Path, counts: Mapping[str, int | None]) -> None:
    """Writes the first pairs of each split of a task, as many as it counts (None: all), into folder/SPLIT.txt, in E2E's
    form."""
    for split, count in counts.items():
        data = tasks.named(task).load(source, split)[:count]
        lines = (f"{context}||{text}\n" for context, text in zip(data["context"], data["completion"], strict=True))
        write_atomically(folder / f"{split}.txt", "".join(lines).encode())


def trained(config: ConfigDict, base: bases.Base) -> int:
    """The number of parameters that a config trains on a base, without those of a new head."""
    if config.method == "none":
        return 0
    report = lj.check(lj.from_spec(methods.spec(config, base.model, base.new)), base.params)
    head = family_of(base.model).head_params
    return sum(row.trained for row in report.rows if row.path.partition("/")[0] not in head)


def resize(config: ConfigDict, option: str, sizes: Sequence[int], *, like: ConfigDict) -> int:
    """Sets the option of a config, such as "lora.rank", to the size, of those given (smallest first), with which it
    trains the number of parameters nearest to that of another config of the same base; returns the size, of several
    with that number the smallest. The method's alpha, where it has one, becomes the size, so that its scale is 1."""
    base = bases.load(config, task=task_named(config.data.name))
    wanted = trained(like, base)

    def count(size: int) -> int:
        config.update_from_flattened_dict({option: size})
        options = config[option.partition(".")[0]]
        if "alpha" in options:
            options.alpha = float(size)
        return trained(config, base)

    above = bisect.bisect_left(sizes, wanted, key=count)
    size = min(sizes[max(above - 1, 0) : above + 1], key=lambda size: abs(count(size) - wanted))
    size = sizes[bisect.bisect_left(sizes, count(size), key=count)]
    count(size)
    return size


@stopping.noted()
def best_rate(config: ConfigDict, folder: Path, rates: Sequence[float], steps: int) -> tuple[ConfigDict, Path]:
    """Trains the first steps of a run with each learning rate, in folder/rate_RATE, where that is not done yet; an
    InterruptedError where it is stopped.

    Returns: the config with the rate whose validation loss is then the lowest, and its workdir, in which `runs.train`
      resumes.
    """
    losses = {}
    for rate in rates:
        member, workdir = config.copy_and_resolve_references(), folder / f"rate_{rate:g}"
        member.optimizer.learning_rate = rate
        check(member)
        with locks.locked(workdir):
            training.claim(workdir, member)  # another config's results are refused
            if steps not in _validated(workdir):
                stopping.check(workdir)
                if not training.train(run.prepare(member, workdir).job._replace(total=steps)).finished:
                    raise InterruptedError(f"{workdir} was stopped: the same command resumes it")
        losses[_validated(workdir)[steps]] = member, workdir
    return losses[min(losses)]


def _validated(workdir: Path) -> dict[int, float]:
    """The validation loss of a run by its step."""
    entries = training.read_metrics(workdir)
    return {entry["step"]: entry["validation_loss"] for entry in entries if "validation_loss" in entry}


@stopping.noted()
@locks.holding()
def finish(
    config: ConfigDict,
    workdir: Path,
    train: Callable[[ConfigDict, Path], None],
    contexts: int = 0,
    scores: Sequence[str] = ("bleu",),
) -> dict[str, Any]:
    """A run's summary with `method_trained`, the number of parameters that train without a head; kept in study.json of
    the workdir.

    Args:
      train: trains the run, or resumes it; an InterruptedError where it was stopped.
      contexts: of a text task, the scores of greedy texts for so many are in the summary too.
      scores: which ones, of the task's style.
    """
    file = workdir / "study.json"
    training.claim(workdir, config)
    if file.is_file():
        return read_json(file, strict=False)
    train(config, workdir)
    stopping.check(workdir)
    summary = read_json(workdir / "summary.json", strict=False)
    summary["method_trained"] = trained(config, bases.load(config, task=task_named(config.data.name)))
    if contexts:
        summary |= greedy_scores(workdir, contexts, scores)
    write_json(file, summary)
    return summary


def greedy_scores(workdir: Path, contexts: int, names: Sequence[str]) -> dict[str, float]:
    """Scores of a run's greedy texts for the first contexts of its test set; a run that trained nothing is the base."""
    loaded = load(workdir, params="base" if read_config(workdir).method == "none" else "adapted")
    loaded.config.decode = {"max_new_tokens": 64}  # and no beams
    task = tasks.named(loaded.config.data.name)
    groups = dict(islice(pairs.contexts(task.load(loaded.config.data.path, "test")).items(), contexts))
    texts = complete(loaded, list(groups), batch_size=50, kept=workdir / "greedy.jsonl.part")
    if tuple(names) == ("bleu",):  # the others start a Java
        return {"bleu": bleu(texts, [references(task, descriptions) for descriptions in groups.values()])}
    rows = [{"context": c, "prediction": text, "references": groups[c]} for c, text in zip(groups, texts, strict=True)]
    write_atomically(workdir / "greedy" / "predictions.jsonl", json_lines(rows))
    return {name: value["score"] for name, value in scores_of(rows, task)["all"].items() if name in names}


def plot(rows: Sequence[dict[str, Any]], titles: Mapping[str, str], file: Path) -> None:
    """Draws figures of rows, such as `experiments.study` writes, as the paper's Figure 2: a diagram for each of the
    titles, {name in a row: what stands below the axis}, with a line for each method, its trained parameters beside its
    name, the best one on top."""
    with extra("train"):
        from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7.5 * len(titles), 1.2 + 0.28 * len(rows)), layout="constrained")
    for axes, (measured, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
        sign = -1 if "loss" in measured else 1  # the best one is drawn last
        ordered = sorted(rows, key=lambda row: sign * row[measured]["score"])
        for number, row in enumerate(ordered):
            score, low, high = (row[measured][part] for part in ("score", "low", "high"))
            axes.errorbar(score, number, xerr=[[score - low], [high - score]], fmt="o", color=_colour(row), capsize=3)
        names = [f"{row['label']}  ({row['trained']:,})" for row in ordered]
        axes.set(yticks=range(len(ordered)), yticklabels=names, xlabel=title)
        axes.grid(alpha=0.3)
    figure.suptitle("method (trained parameters without the head); bars: lowest and highest of the seeds", size=10)
    figure.savefig(file, dpi=100)


# The colour of a kind of method, by how its name begins.
_COLOURS = {"full": "C3", "top2": "C3", "frozen": "gray", "adapter": "C2", "compacter": "C2", "prefix": "C1"}
_COLOURS |= {"bitfit": "C4", "ia3": "C4", "classifier": "C4"}


def _colour(row: dict[str, Any]) -> str:
    return next((colour for start, colour in _COLOURS.items() if row["label"].startswith(start)), "C0")
