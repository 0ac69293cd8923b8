"""The paper's generation tasks: what differs between their data and scores."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_jax.core.extras import extra
from lora_jax.data import e2e, jsonl, pairs, triples

with extra("data"):
    import datasets


class TextTask(NamedTuple):
    """A task of generation: pairs of a context and a completion, and how completions are scored.

    Attributes:
      load: (path, split) -> a Dataset with columns `context` and `completion`; split is "train", "valid" or "test".
      style: how it is scored: the style of `metrics.score`.
      source: where its data can be had.
      normalize: what texts and references go through before they are scored; None: nothing.
      most_references: how many of a context's references are scored, the first ones; None: all.
      conversations: contexts are messages (`data.chat.dumped`), and texts, their answers, may have blank lines; else a
        text ends at the first one, as the authors' do.

    An example is in `runs.train`.
    """

    load: Callable[[str | Path, str], datasets.Dataset]
    style: str = "e2e"
    source: str = ""
    normalize: Callable[[str], str] | None = None
    most_references: int | None = None
    conversations: bool = False


# Six references and the normalization are the authors' (microsoft/LoRA, examples/NLG/README.md).
TASKS = {
    "e2e": TextTask(e2e.load, "e2e", e2e.SOURCE),
    "webnlg": TextTask(triples.webnlg, "webnlg", triples.WEBNLG, pairs.normalize, 6),
    "dart": TextTask(triples.dart, "dart", triples.DART, pairs.normalize, 6),
    "dart_dev": TextTask(triples.dart_dev, "dart", triples.DART, pairs.normalize, 6),
    "samsum": TextTask(jsonl.samsum, "samsum", jsonl.SAMSUM),
    "wikisql": TextTask(jsonl.wikisql, "wikisql", jsonl.WIKISQL),
}


def named(name: str) -> TextTask:
    """The task of that name; where there is none, a ValueError shows those there are."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r} (data.name): one of {', '.join(TASKS)}")
    return TASKS[name]


def references(task: TextTask, texts: Sequence[str]) -> list[str]:
    """A context's references as the task scores them: cleaned (`pairs.clean`; answers in conversations are stripped),
    the first `most_references` of them, normalized. What stands for missing ones is the score's."""
    write = task.normalize or str
    clean = str.strip if task.conversations else pairs.clean
    return [write(clean(text)) for text in texts[: task.most_references]]
