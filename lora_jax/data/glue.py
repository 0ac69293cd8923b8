"""GLUE, the benchmark of sentence understanding (paper, Table 2): eight of its tasks, and predictions in the form in
which its server takes them.

Read are the benchmark's own files (the folder glue_data of its download script) or the same data of the Hugging Face
hub. The files are parted by tabs and have no quoting: a quotation mark is a character of its sentence.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lora_jax.core.extras import extra
from lora_jax.data import hub
from lora_jax.data.files import find, read_text
from lora_jax.data.sentences import Texts, encode

with extra("data"):
    import datasets

__all__ = ["SOURCE", "TASKS", "GlueTask", "Split", "Texts", "encode", "load", "named", "submission"]

log = logging.getLogger(__name__)

SOURCE = (
    "download_glue_data.py of github.com/nyu-mll/GLUE-baselines makes the folder glue_data, and on the hub the data "
    "are nyu-mll/glue"
)


class Split(NamedTuple):
    """A split.

    Attributes:
      file: its file in glue_data.
      hub: its name on the hub.
      submission: what the name of the submitted file adds to the task's; None where the labels are known.
    """

    file: str
    hub: str
    submission: str | None = None


_SPLITS = {
    "train": Split("train.tsv", "train"),
    "valid": Split("dev.tsv", "validation"),
    "test": Split("test.tsv", "test", ""),
}
# matched: of the genres of the training data; mismatched: of others
_MNLI_SPLITS = {
    "train": Split("train.tsv", "train"),
    "valid": Split("dev_matched.tsv", "validation_matched"),
    "valid_mismatched": Split("dev_mismatched.tsv", "validation_mismatched"),
    "test": Split("test_matched.tsv", "test_matched", "-m"),
    "test_mismatched": Split("test_mismatched.tsv", "test_mismatched", "-mm"),
}


class GlueTask(NamedTuple):
    """A task.

    Attributes:
      folder: its folder in glue_data, and its name in submissions.
      columns: of the one or two sentences, in the files.
      hub_columns: the same on the hub, where the task's key in `TASKS` is the configuration.
      label: the column of the label, in the files.
      labels: their names, in the order of their ids, which is GLUE's and the hub's; none for a regression.
      by_name: files and submissions have a label's name; else its id.
      splits: "train", "valid", "test", and what else there is.
      header: of the labelled files, where they have none.
      broken: the official labelled files hold lines that are parts of a row; they do not count.
    """

    folder: str
    columns: tuple[str, ...]
    hub_columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    by_name: bool = False
    splits: Mapping[str, Split] = _SPLITS
    header: tuple[str, ...] | None = None
    broken: bool = False

    @property
    def outputs(self) -> int:
        """Of a model: one for each label, or the one of a regression."""
        return max(len(self.labels), 1)


_ONE, _TWO = ("sentence",), ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": GlueTask(
        "CoLA", _ONE, _ONE, "label", ("unacceptable", "acceptable"), header=("source", "label", "star", "sentence")
    ),
    "sst2": GlueTask("SST-2", _ONE, _ONE, "label", ("negative", "positive")),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), _TWO, "Quality", ("not_equivalent", "equivalent")),
    "stsb": GlueTask("STS-B", _TWO, _TWO, "score", ()),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        broken=True,
    ),
    "mnli": GlueTask(
        "MNLI",
        _TWO,
        ("premise", "hypothesis"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        by_name=True,
        splits=_MNLI_SPLITS,
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), ("question", "sentence"), "label", _ENTAILMENT, by_name=True),
    "rte": GlueTask("RTE", _TWO, _TWO, "label", _ENTAILMENT, by_name=True),
}


def named(name: str) -> GlueTask:
    """The task of that name.

    Raises:
      ValueError: there is none; shows those there are.
    """
    if name not in TASKS:
        raise ValueError(f"no GLUE task {name!r}: one of {', '.join(TASKS)}")
    return TASKS[name]


def load(name: str, path: str | Path, split: str = "train") -> datasets.Dataset:
    """A split of a task, with the columns

        first, second  the sentences as they are; no `second` where there is one only
        label          int32, the place in the task's `labels`; of STS-B float32, 0 (unlike) to 5 (the same). Test
                       splits have none, though the hub's MRPC does
        index          int32, the row's number in the benchmark (the file's column `index` or `id`, the hub's `idx`);
                       counted from 0 where the file has none

    Of QQP's official train.tsv and dev.tsv a few lines are parts of rows, cut by line ends within a question. As in
    everyone's loaders, the hub's too, they are left out, with one warning.

    Args:
      name: a key of `TASKS`.
      path: glue_data, the task's own folder in it, one file, or the name of a dataset on the hub (`nyu-mll/glue`).
        Files may be zipped (.gz).
      split: "train", "valid" or "test", of MNLI also "valid_mismatched" and "test_mismatched"; a single file is taken
        as it is, and the split says whether it has labels.

    Raises:
      FileNotFoundError: there is nothing there; names the public source.
      ValueError: no such task or split, or the content is not of the form, with the path and the line.
    """
    task = named(name)
    _check_split(name, split)
    if hub.is_name(path):
        data = hub.load(str(path), split, {key: each.hub for key, each in task.splits.items()}, SOURCE, config=name)
        return _from_hub(task, f"{path}, {name}", data, task.splits[split].submission is None)
    files = {key: (f"{task.folder}/{each.file}", each.file) for key, each in task.splits.items()}
    return _from_file(task, find(path, split, files, SOURCE), task.splits[split].submission is None)


def submission(name: str, split: str, examples: datasets.Dataset, predictions: ArrayLike) -> tuple[str, str]:
    """Predictions in GLUE's form: the name of the file and its text, a header and one line an example.

    Args:
      split: "test", or MNLI's "test_mismatched".
      examples: as `load` gives them.
      predictions: (N,) in their order: ids of labels; of STS-B numbers, which are cut to 0 to 5.

    Raises:
      ValueError: another split, not one prediction an example, or what is no label.
    """
    task = named(name)
    _check_split(name, split)
    ending = task.splits[split].submission
    if ending is None:
        raise ValueError(f"split {split!r}: only predictions for a test split are submitted")
    values = np.asarray(predictions)
    if values.shape != (len(examples),):
        raise ValueError(f"predictions of shape {values.shape}: one for each of {len(examples)} examples")
    lines = [f"{index}\t{value}\n" for index, value in zip(examples["index"], _written(task, values), strict=True)]
    return f"{task.folder}{ending}.tsv", "".join(["index\tprediction\n", *lines])


def _written(task: GlueTask, values: np.ndarray) -> list[str]:
    if not task.labels:
        if not np.isfinite(values).all():
            raise ValueError(f"{task.folder}: a prediction is NaN or infinite")
        return [f"{value:.3f}" for value in np.clip(values, 0, 5) + 0.0]  # the sum: no "-0.000"
    if values.dtype.kind not in "iu" or not np.isin(values, np.arange(task.outputs)).all():
        raise ValueError(f"{task.folder}: predictions are ids of labels, integers from 0 to {task.outputs - 1}")
    return [task.labels[i] if task.by_name else str(i) for i in values]


def _check_split(name: str, split: str) -> None:
    if split not in TASKS[name].splits:
        raise ValueError(f"split {split!r} of {name}: one of {', '.join(TASKS[name].splits)}")


def _from_file(task: GlueTask, file: Path, labelled: bool) -> datasets.Dataset:
    # only a line feed ends a line: sentences hold other characters that `splitlines` takes for ends
    lines = read_text(file).replace("\r\n", "\n").removesuffix("\n").split("\n")
    header = task.header if labelled else None
    names = list(header or lines[0].split("\t"))
    readers: dict[str, Callable[[str], Any]] = dict.fromkeys(task.columns, str)
    if labelled:
        readers[task.label] = _reader(task)
    if not set(names) >= set(readers):
        raise ValueError(f"{file}:1: the columns {list(readers)} are wanted, it has {names}; {SOURCE}")
    index = next((name for name in ("index", "id") if name in names), None)
    if index:
        readers[index] = int
    first = 1 if header else 2  # the line of the first example, counted from 1
    values = _columns(file, lines[first - 1 :], first, names, readers, broken=task.broken and labelled)
    numbers = values[index] if index else list(range(len(values[task.columns[0]])))
    sentences = [values[name] for name in task.columns]
    return _dataset(task, sentences, values[task.label] if labelled else None, numbers)


def _columns(
    file: Path,
    lines: Sequence[str],
    first: int,
    names: Sequence[str],
    readers: Mapping[str, Callable[[str], Any]],
    *,
    broken: bool,
) -> dict[str, list[Any]]:
    """The values of the columns that have a reader. `first`: the number of the first line; `broken`: shorter lines are
    left out."""
    columns = [(names.index(name), name, read) for name, read in readers.items()]
    values: dict[str, list[Any]] = {name: [] for name in readers}
    short = 0
    for number, line in enumerate(lines, first):
        fields = line.split("\t")
        if broken and len(fields) < len(names):
            short += 1
            continue
        if len(fields) != len(names):
            raise ValueError(
                f"{file}:{number}: {len(fields)} columns where {len(names)} are wanted ({', '.join(names)})"
            )
        for column, name, read in columns:
            try:
                values[name].append(read(fields[column]))
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {fields[column]!r} is no {name}: {error}") from error
    if short == len(lines):
        raise ValueError(f"{file}: no examples")
    if short:
        log.warning("%s: left out %d lines that are parts of rows", file, short)
    return values


def _reader(task: GlueTask) -> Callable[[str], int | float]:
    """From what a file has for a label."""
    if not task.labels:
        return lambda text: _score(float(text))
    ids = {name if task.by_name else str(i): i for i, name in enumerate(task.labels)}

    def read(text: str) -> int:
        if text not in ids:
            raise ValueError(f"one of {', '.join(ids)}")
        return ids[text]

    return read


def _score(value: float) -> float:
    if not 0 <= value <= 5:  # nor is NaN
        raise ValueError("from 0 to 5")
    return value


def _from_hub(task: GlueTask, name: str, data: datasets.Dataset, labelled: bool) -> datasets.Dataset:
    wanted = [*task.hub_columns, *["label"] * labelled, "idx"]
    if not set(data.column_names) >= set(wanted):
        raise ValueError(f"{name}: the columns {wanted} are wanted; it has {data.column_names}")
    labels = list(data["label"]) if labelled else None
    if labels is not None:
        order = getattr(data.features["label"], "names", list(task.labels))
        if order != list(task.labels):
            raise ValueError(f"{name}: its labels are {order}, not {list(task.labels)}")
        strange = set(labels) - set(range(len(task.labels))) if task.labels else {x for x in labels if not 0 <= x <= 5}
        if strange:
            raise ValueError(f"{name}: {min(strange)} is no label")
    return _dataset(task, [list(data[column]) for column in task.hub_columns], labels, list(data["idx"]))


def _dataset(
    task: GlueTask, sentences: list[list[str]], labels: list[Any] | None, index: list[int]
) -> datasets.Dataset:
    columns: dict[str, list[Any]] = dict(zip(("first", "second"), sentences, strict=False))
    types = dict.fromkeys(columns, "string")
    if labels is not None:
        columns["label"], types["label"] = labels, "int32" if task.labels else "float32"
    columns["index"], types["index"] = index, "int32"
    features = datasets.Features({name: datasets.Value(kind) for name, kind in types.items()})
    return datasets.Dataset.from_dict(columns, features=features)
