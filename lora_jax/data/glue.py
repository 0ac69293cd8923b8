"""GLUE, the benchmark of sentence understanding (paper, Table 2): eight of its tasks, and predictions in the form in
which its server takes them.

Read are the benchmark's own files (the folder glue_data of its download script) or the same data of the Hugging Face
hub. The files are parted by tabs and have no quoting: a quotation mark is a character of its sentence.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lora_jax.core.extras import extra
from lora_jax.data.files import find, is_hub_name, load_from_hub, read_lines

with extra("data"):
    import datasets

log = logging.getLogger(__name__)

SOURCE = (
    "download_glue_data.py of github.com/nyu-mll/GLUE-baselines makes the folder glue_data, and on the hub the data "
    "are nyu-mll/glue"
)


class Split(NamedTuple):
    """A split: its file in glue_data, its name on the hub, and what the name of the file for a submission adds to the
    task's (None where the labels are known)."""

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
        """The number of a model's outputs, one for each label or one for a regression."""
        return max(len(self.labels), 1)


_ONE, _TWO, _QUESTIONS = ("sentence",), ("sentence1", "sentence2"), ("question1", "question2")
_COLA, _COLA_HEADER = ("unacceptable", "acceptable"), ("source", "label", "star", "sentence")
_MNLI, _MNLI_COLUMNS = ("entailment", "neutral", "contradiction"), ("premise", "hypothesis")
_QNLI, _RTE = ("question", "sentence"), ("entailment", "not_entailment")
TASKS = {
    "cola": GlueTask("CoLA", _ONE, _ONE, "label", _COLA, header=_COLA_HEADER),
    "sst2": GlueTask("SST-2", _ONE, _ONE, "label", ("negative", "positive")),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), _TWO, "Quality", ("not_equivalent", "equivalent")),
    "stsb": GlueTask("STS-B", _TWO, _TWO, "score", ()),
    "qqp": GlueTask("QQP", _QUESTIONS, _QUESTIONS, "is_duplicate", ("not_duplicate", "duplicate"), broken=True),
    "mnli": GlueTask("MNLI", _TWO, _MNLI_COLUMNS, "gold_label", _MNLI, by_name=True, splits=_MNLI_SPLITS),
    "qnli": GlueTask("QNLI", _QNLI, _QNLI, "label", _RTE, by_name=True),
    "rte": GlueTask("RTE", _TWO, _TWO, "label", _RTE, by_name=True),
}


def load(name: str, path: str | Path, split: str = "train") -> datasets.Dataset:
    """A split of a task, with the columns::

        first, second  the sentences as they are; no `second` where there is one only
        label          int32, the place in the task's `labels`; of STS-B float32, 0 (unlike) to 5 (the same). Test
                       splits have none, though the hub's MRPC does
        index          int32, the row's number in the benchmark (the file's column `index` or `id`, the hub's `idx`);
                       counted from 0 where the file has none

    Of QQP's official train.tsv and dev.tsv a few lines are parts of rows, cut by line ends within a question. As in
    everyone's loaders, the hub's too, they are left out, with one warning.

    Args:
      path: glue_data, the task's own folder in it, one file, or the name of a dataset on the hub (`nyu-mll/glue`).
        Files may be zipped (.gz).
      split: "train", "valid" or "test", of MNLI also "valid_mismatched" and "test_mismatched"; a single file is taken
        as it is, and the split says whether it has labels.

    Raises:
      FileNotFoundError: there is nothing there; names the public source.
      ValueError: no such task or split, or the content is not of the form, with the path and the line.
    """
    task, chosen = _named(name, split)
    labelled = chosen.submission is None
    if is_hub_name(path):
        data = load_from_hub(path, split, {split: chosen.hub}, SOURCE, name)
        return _from_hub(task, f"{path}, {name}", data, labelled)
    file = find(path, split, {split: (f"{task.folder}/{chosen.file}", chosen.file)}, SOURCE)
    return _from_file(task, file, labelled)


def submission(name: str, split: str, examples: datasets.Dataset, predictions: ArrayLike) -> tuple[str, str]:
    """Predictions in GLUE's form: the name of the file and its text, a header and one line an example.

    Args:
      split: "test", or MNLI's "test_mismatched".
      examples: as `load` gives them.
      predictions: (N,) in their order: ids of labels; of STS-B numbers, which are cut to 0 to 5.

    Raises:
      ValueError: another split, not one prediction an example, or what is no label.
    """
    task, chosen = _named(name, split)
    if chosen.submission is None:
        raise ValueError(f"split {split!r}: only predictions for a test split are submitted")
    values = np.asarray(predictions)
    if values.shape != (len(examples),):
        raise ValueError(f"predictions of shape {values.shape}: one for each of {len(examples)} examples")
    lines = [f"{index}\t{value}\n" for index, value in zip(examples["index"], _written(task, values), strict=True)]
    return f"{task.folder}{chosen.submission}.tsv", "".join(["index\tprediction\n", *lines])


def _named(name: str, split: str) -> tuple[GlueTask, Split]:
    """The task of that name and its split."""
    if name not in TASKS:
        raise ValueError(f"no GLUE task {name!r}: one of {', '.join(TASKS)}")
    if split not in TASKS[name].splits:
        raise ValueError(f"split {split!r} of {name}: one of {', '.join(TASKS[name].splits)}")
    return TASKS[name], TASKS[name].splits[split]


def _written(task: GlueTask, values: np.ndarray) -> list[str]:
    """Predictions as a submission has them."""
    if not task.labels:
        if not np.isfinite(values).all():
            raise ValueError(f"{task.folder}: a prediction is NaN or infinite")
        return [f"{value:.3f}" for value in np.clip(values, 0, 5) + 0.0]  # the sum: no "-0.000"
    if values.dtype.kind not in "iu" or not np.isin(values, np.arange(task.outputs)).all():
        raise ValueError(f"{task.folder}: predictions are ids of labels, integers from 0 to {task.outputs - 1}")
    return [task.labels[i] if task.by_name else str(i) for i in values]


def _from_file(task: GlueTask, file: Path, labelled: bool) -> datasets.Dataset:
    rows = list(enumerate((line.split("\t") for line in read_lines(file)), 1))
    names = list((labelled and task.header) or rows.pop(0)[1])
    readers: dict[str, Callable[[str], Any]] = dict.fromkeys(task.columns, str)
    if labelled:
        readers[task.label] = _reader(task)
    if not set(names) >= set(readers):
        raise ValueError(f"{file}:1: the columns {list(readers)} are wanted, it has {names}; {SOURCE}")
    index = next((name for name in ("index", "id") if name in names), None)
    if index:
        readers[index] = int
    short = [row for row in rows if len(row[1]) < len(names)] if task.broken and labelled else []
    if len(short) == len(rows):
        raise ValueError(f"{file}: no examples")
    if short:
        log.warning("%s: left out %d lines that are parts of rows", file, len(short))
        rows = [row for row in rows if len(row[1]) >= len(names)]
    values: dict[str, list[Any]] = {name: [] for name in readers}
    for number, fields in rows:
        if len(fields) != len(names):
            wanted = f"{len(names)} are wanted ({', '.join(names)})"
            raise ValueError(f"{file}:{number}: {len(fields)} columns where {wanted}")
        for name, text in zip(names, fields, strict=True):
            try:
                if name in readers:
                    values[name].append(readers[name](text))
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {text!r} is no {name}: {error}") from error
    sentences = [values[name] for name in task.columns]
    numbers = values[index] if index else list(range(len(rows)))
    return _dataset(task, sentences, values[task.label] if labelled else None, numbers)


def _reader(task: GlueTask) -> Callable[[str], int | float]:
    """What reads a label of a file."""
    ids = {name if task.by_name else str(i): i for i, name in enumerate(task.labels)}

    def read_id(text: str) -> int:
        if text not in ids:
            raise ValueError(f"one of {', '.join(ids)}")
        return ids[text]

    def read_score(text: str) -> float:
        if not 0 <= float(text) <= 5:  # nor is NaN
            raise ValueError("from 0 to 5")
        return float(text)

    return read_id if task.labels else read_score


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
