"""The reader of GLUE, against a plain reading of the real files by column number; and GLUE's submissions."""

import csv
import gzip
import io
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data import glue

ENTAILMENT = {"entailment": 0, "not_entailment": 1}
MNLI = {"entailment": 0, "neutral": 1, "contradiction": 2}
BINARY = {"0": 0, "1": 1}

# name, split: file, examples, columns of (first, second, label, index), labels
REAL: list[tuple[str, str, str, int, tuple, Any]] = [
    ("cola", "train", "CoLA/train.tsv", 8_551, (3, None, 1, None), BINARY),
    ("cola", "valid", "CoLA/dev.tsv", 1_043, (3, None, 1, None), BINARY),
    ("cola", "test", "CoLA/test.tsv", 1_063, (1, None, None, 0), None),
    ("sst2", "train", "SST-2/train.tsv", 67_349, (0, None, 1, None), BINARY),
    ("sst2", "valid", "SST-2/dev.tsv", 872, (0, None, 1, None), BINARY),
    ("sst2", "test", "SST-2/test.tsv", 1_821, (1, None, None, 0), None),
    ("mrpc", "train", "MRPC/train.tsv", 3_668, (3, 4, 0, None), BINARY),
    ("mrpc", "valid", "MRPC/dev.tsv", 408, (3, 4, 0, None), BINARY),
    ("mrpc", "test", "MRPC/test.tsv", 1_725, (3, 4, None, 0), None),
    ("stsb", "train", "STS-B/train.tsv", 5_749, (7, 8, 9, 0), float),
    ("stsb", "valid", "STS-B/dev.tsv", 1_500, (7, 8, 9, 0), float),
    ("stsb", "test", "STS-B/test.tsv", 1_379, (7, 8, None, 0), None),
    # slices of these
    ("qqp", "train", "QQP/train.tsv", 2_000, (3, 4, 5, 0), BINARY),
    ("qqp", "valid", "QQP/dev.tsv", 1_000, (3, 4, 5, 0), BINARY),
    ("mnli", "train", "MNLI/train.tsv", 6, (8, 9, 11, 0), MNLI),
    ("mnli", "valid", "MNLI/dev_matched.tsv", 5, (8, 9, 15, 0), MNLI),
    ("mnli", "valid_mismatched", "MNLI/dev_mismatched.tsv", 5, (8, 9, 15, 0), MNLI),
    ("mnli", "test", "MNLI/test_matched.tsv", 5, (8, 9, None, 0), None),
    ("mnli", "test_mismatched", "MNLI/test_mismatched.tsv", 5, (8, 9, None, 0), None),
    ("qnli", "train", "QNLI/train.tsv", 5, (1, 2, 3, 0), ENTAILMENT),
    ("qnli", "valid", "QNLI/dev.tsv", 5_463, (1, 2, 3, 0), ENTAILMENT),
    ("qnli", "test", "QNLI/test.tsv", 5_463, (1, 2, None, 0), None),
    ("rte", "train", "RTE/train.tsv", 2_490, (1, 2, 3, 0), ENTAILMENT),
    ("rte", "valid", "RTE/dev.tsv", 277, (1, 2, 3, 0), ENTAILMENT),
    ("rte", "test", "RTE/test.tsv", 3_000, (1, 2, None, 0), None),
]


@pytest.mark.parametrize(("name", "split", "file", "count", "places", "labels"), REAL, ids=[row[2] for row in REAL])
def test_the_real_files(
    shared: Path, name: str, split: str, file: str, count: int, places: tuple, labels: dict | type | None
) -> None:
    folder = shared / "data/glue"
    with open(folder / file, encoding="utf-8-sig", newline="\n") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if (name, labels) != ("cola", BINARY):
        del rows[0]
    first, second, label, index = places
    expected: dict[str, list] = {"first": [row[first] for row in rows]}
    if second is not None:
        expected["second"] = [row[second] for row in rows]
    if labels is float:
        expected["label"] = np.array([row[label] for row in rows], np.float32).tolist()
    elif isinstance(labels, dict):
        expected["label"] = [labels[row[label]] for row in rows]
    expected["index"] = list(range(len(rows))) if index is None else [int(row[index]) for row in rows]
    data = glue.load(name, folder, split)
    assert len(data) == count
    assert {column: list(data[column]) for column in data.column_names} == expected
    if labels is not None:
        assert data.features["label"].dtype == ("float32" if labels is float else "int32")


def test_the_corpus_behind_mrpc(shared: Path) -> None:
    """A file of another name, and labels that a test split does not show."""
    file = shared / "data/glue/MRPC/msr_paraphrase_test.txt"
    assert len(glue.load("mrpc", file, "valid")) == 1_725
    hidden, test = glue.load("mrpc", file, "test"), glue.load("mrpc", shared / "data/glue", "test")
    assert hidden.column_names == test.column_names == ["first", "second", "index"]
    assert hidden.to_dict() == test.to_dict()


ODD = 'a " lone quote, \x85 \u2028 é and a blank '
SMALL: list[tuple[str, str, str, str, list[dict]]] = [
    ("cola", "train", "CoLA/train.tsv", f'gj04\t1\t\t"Odd\nb\t0\t*\t{ODD}', [
        {"first": '"Odd', "label": 1, "index": 0},
        {"first": ODD, "label": 0, "index": 1},
    ]),
    ("cola", "test", "CoLA/test.tsv", f"index\tsentence\n0\t{ODD}\n7\tb\n", [
        {"first": ODD, "index": 0},
        {"first": "b", "index": 7},
    ]),
    ("sst2", "valid", "SST-2/dev.tsv", f'sentence\tlabel\n{ODD}\t1\n"b \t0\n', [
        {"first": ODD, "label": 1, "index": 0},
        {"first": '"b ', "label": 0, "index": 1},
    ]),
    ("mrpc", "train", "MRPC/train.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
     f'1\t5\t6\t"A\t{ODD}\n0\t7\t8\tB\t', [
        {"first": '"A', "second": ODD, "label": 1, "index": 0},
        {"first": "B", "second": "", "label": 0, "index": 1},
    ]),
    ("stsb", "train", "STS-B/train.tsv", f'index\tsentence1\tsentence2\tscore\n4\t"A\t{ODD}\t3.250\n5\tB\tC\t0\n', [
        {"first": '"A', "second": ODD, "label": 3.25, "index": 4},
        {"first": "B", "second": "C", "label": 0.0, "index": 5},
    ]),
    ("qqp", "test", "QQP/test.tsv", f'id\tquestion1\tquestion2\n0\t"A\t{ODD}\n1\tB\tC\n', [
        {"first": '"A', "second": ODD, "index": 0},
        {"first": "B", "second": "C", "index": 1},
    ]),
    ("mnli", "valid_mismatched", "MNLI/dev_mismatched.tsv", "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
     f'0\t"A\t{ODD}\tneutral\tcontradiction\n', [{"first": '"A', "second": ODD, "label": 2, "index": 0}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "split", "file", "content", "rows"), SMALL, ids=[row[2] for row in SMALL])
def test_small_files(tmp_path: Path, name: str, split: str, file: str, content: str, rows: list[dict]) -> None:
    for number, raw in enumerate(
        [
            content.encode(),
            b"\xef\xbb\xbf" + content.encode(),
            content.replace("\n", "\r\n").encode(),
            content.removesuffix("\n").encode(),
        ]
    ):
        for ending in ("", ".gz"):
            path = tmp_path / f"{number}{ending}" / f"{file}{ending}"
            path.parent.mkdir(parents=True)
            path.write_bytes(gzip.compress(raw) if ending else raw)
            for place in (path.parent.parent, path.parent, path):
                data = glue.load(name, place, split)
                assert data.to_list() == rows
                assert data.column_names == list(rows[0])


def test_broken_rows_of_qqp(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Line 97,931 of the official train.tsv (nyu-mll/GLUE-baselines, issue 5): the end of a row that the line before
    begins."""
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    end = '"\tWas Muhammad a real historical figure? What is the evidence for his existence?\t0\n'
    (tmp_path / "train.tsv").write_text(f'{header}8\t1\t2\tA?\tB?\t1\n9\t3\t4\t"What\n{end}10\t5\t6\tC?\tD?\t0\n')
    with caplog.at_level(logging.WARNING):
        data = glue.load("qqp", tmp_path, "train")
    assert list(data["first"]) == ["A?", "C?"] and list(data["index"]) == [8, 10]
    assert "left out 2 lines that are parts of rows" in caplog.text
    # a test set must be complete, and a line too long is no part of a row
    (tmp_path / "test.tsv").write_text("id\tquestion1\tquestion2\n0\tA?\tB?\n1\tC?\n")
    with pytest.raises(ValueError, match=r"test\.tsv:3: 2 columns where 3 are wanted \(id, question1, question2\)"):
        glue.load("qqp", tmp_path, "test")
    (tmp_path / "train.tsv").write_text(f"{header}8\t1\t2\tA?\tB?\t1\t2\n")
    with pytest.raises(ValueError, match=r"train\.tsv:2: 7 columns"):
        glue.load("qqp", tmp_path, "train")
    (tmp_path / "train.tsv").write_text(f"{header}8\t1\n")
    with pytest.raises(ValueError, match=r"train\.tsv: no examples"):
        glue.load("qqp", tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rte", "", ": the file is empty"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n", ": no examples"),
        (
            "rte",
            "index\tsentence1\tlabel\n0\ta\tentailment\n",
            r":1: the columns \['sentence1', 'sentence2', 'label'\]",
        ),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tentailment\n", ":3: 3 columns where 4"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n", ":2: 'neutral' is no label: one of entail"),
        ("rte", "index\tsentence1\tsentence2\tlabel\nx\ta\tb\tentailment\n", ":2: 'x' is no index"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n\n", ":3: 1 columns where 4"),
        ("mrpc", "Quality\t#1 String\t#2 String\n1\ta\tb\n2\ta\tb\n", ":3: '2' is no Quality: one of 0, 1"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.1\n", ":2: '5.1' is no score: from 0 to 5"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", ":2: 'nan' is no score: from 0 to 5"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tmuch\n", ":2: 'much' is no score: could not"),
        ("cola", "s\t1\t\ta\ns\t1\ta\n", r":2: 3 columns where 4 are wanted \(source, label, star, sentence\)"),
        ("cola", "source\tlabel\tstar\tsentence\n", ":1: 'label' is no label: one of 0, 1"),
        ("mnli", "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\t-\n", ":2: '-' is no gold_label: one of entail"),
        ("mnli", "index\tsentence1\tsentence2\n0\ta\tb\n", ":1: the columns .*'gold_label'"),
    ],
)
def test_a_file_of_another_form(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "train.tsv").write_text(content)
    with pytest.raises(ValueError, match=r"train\.tsv" + message):
        glue.load(name, tmp_path, "train")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds none of RTE/dev\.tsv, RTE/dev\.tsv\.gz, dev\.tsv, .*GLUE-baselines"
    ):
        glue.load("rte", tmp_path, "valid")
    with pytest.raises(FileNotFoundError, match=r"/no/such: no such file or folder; .*nyu-mll/glue"):
        glue.load("rte", "/no/such", "valid")
    with pytest.raises(ValueError, match="no GLUE task 'wnli': one of cola, sst2"):
        glue.load("wnli", tmp_path, "valid")
    with pytest.raises(ValueError, match="split 'valid_mismatched' of rte: one of train, valid, test"):
        glue.load("rte", tmp_path, "valid_mismatched")


def hub_copy(labels: list, names: list[str] | None, **columns: list) -> datasets.Dataset:
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
    features = {name: datasets.Value("int32" if name == "idx" else "string") for name in columns}
    return datasets.Dataset.from_dict(
        {**columns, "label": labels}, features=datasets.Features({**features, "label": kind})
    )


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations, splits and columns of nyu-mll/glue, after its card. Its test splits are labelled -1, but MRPC's
    truly."""
    two = {"sentence1": ["A", "B"], "sentence2": ["C", "D"], "idx": [3, 5]}
    names = ["not_equivalent", "equivalent"]
    nli = ["entailment", "neutral", "contradiction"]
    copies = {
        ("owner/glue", "mrpc", "test"): hub_copy([1, 0], names, **two),
        ("owner/glue", "mrpc", "train"): hub_copy([1, 0], names, **two),
        ("owner/glue", "mrpc", "validation"): hub_copy([1, -1], names, **two),
        ("owner/glue", "stsb", "validation"): hub_copy([0.5, 5.0], None, **two),
        ("owner/glue", "stsb", "train"): hub_copy([0.5, -1.0], None, **two),
        ("owner/glue", "mnli", "validation_mismatched"): hub_copy([2], nli, premise=["A"], hypothesis=["B"], idx=[0]),
        ("owner/glue", "mnli", "test_matched"): hub_copy([-1], nli, premise=["A"], hypothesis=["B"], idx=[9]),
        ("owner/glue", "rte", "train"): hub_copy([0, 1], ["not_entailment", "entailment"], **two),
        ("owner/glue", "qnli", "train"): hub_copy([0, 1], ["entailment", "not_entailment"], **two),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: copies[name, config, split])
    rows = [
        {"first": "A", "second": "C", "label": 1, "index": 3},
        {"first": "B", "second": "D", "label": 0, "index": 5},
    ]
    data = glue.load("mrpc", "owner/glue", "train")
    assert data.to_list() == rows and data.features["label"] == datasets.Value("int32")
    data = glue.load("mrpc", "owner/glue", "test")
    assert data.to_list() == [{k: v for k, v in row.items() if k != "label"} for row in rows]
    data = glue.load("stsb", "owner/glue", "valid")
    assert list(data["label"]) == [0.5, 5.0] and data.features["label"] == datasets.Value("float32")
    assert glue.load("mnli", "owner/glue", "valid_mismatched").to_list() == [
        {"first": "A", "second": "B", "label": 2, "index": 0}
    ]
    assert glue.load("mnli", "owner/glue", "test").to_list() == [{"first": "A", "second": "B", "index": 9}]
    for name, split in (("mrpc", "valid"), ("stsb", "train")):
        with pytest.raises(ValueError, match=rf"owner/glue, {name}: -1\S* is no label"):
            glue.load(name, "owner/glue", split)
    with pytest.raises(ValueError, match=r"rte: its labels are \['not_entailment', 'entailment'\], not \['entailment'"):
        glue.load("rte", "owner/glue")
    with pytest.raises(ValueError, match=r"qnli: the columns \['question', 'sentence', 'label', 'idx'\] are wanted"):
        glue.load("qnli", "owner/glue")


SUBMISSIONS = [
    ("cola", "test", "CoLA.tsv", ["0", "1"]),
    ("sst2", "test", "SST-2.tsv", ["0", "1"]),
    ("mrpc", "test", "MRPC.tsv", ["0", "1"]),
    ("qqp", "test", "QQP.tsv", ["0", "1"]),
    ("mnli", "test", "MNLI-m.tsv", ["entailment", "neutral", "contradiction"]),
    ("mnli", "test_mismatched", "MNLI-mm.tsv", ["entailment", "neutral", "contradiction"]),
    ("qnli", "test", "QNLI.tsv", ["entailment", "not_entailment"]),
    ("rte", "test", "RTE.tsv", ["entailment", "not_entailment"]),
]


def numbered(index: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"first": ["A"] * len(index), "index": index})


@pytest.mark.parametrize(("name", "split", "file", "values"), SUBMISSIONS, ids=[row[2] for row in SUBMISSIONS])
@given(data=st.data())
def test_submissions_of_labels(name: str, split: str, file: str, values: list[str], data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=5))
    index = data.draw(st.permutations(range(len(labels))))
    predictions = np.array(labels, data.draw(st.sampled_from([np.int32, np.int64, np.uint8])))
    title, text = glue.submission(name, split, numbered(index), predictions)
    assert title == file
    rows = list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows == [["index", "prediction"], *([str(i), values[label]] for i, label in zip(index, labels, strict=True))]
    assert text.endswith("\n") and "\r" not in text


def test_submission_of_scores() -> None:
    scores = np.array([-0.7, -0.0, 1.23449, 5.0, 7.5], np.float32)
    assert glue.submission("stsb", "test", numbered([0, 1, 2, 3, 4]), scores) == (
        "STS-B.tsv",
        "index\tprediction\n0\t0.000\n1\t0.000\n2\t1.234\n3\t5.000\n4\t5.000\n",
    )


def test_what_cannot_be_submitted() -> None:
    with pytest.raises(ValueError, match="split 'valid': only predictions for a test split"):
        glue.submission("rte", "valid", numbered([0]), [0])
    with pytest.raises(ValueError, match="split 'test_mismatched' of rte: one of train"):
        glue.submission("rte", "test_mismatched", numbered([0]), [0])
    for wrong in ([0, 1], [[0]], 0):
        with pytest.raises(ValueError, match="one for each of 1 examples"):
            glue.submission("rte", "test", numbered([0]), wrong)
    for label in ([2], [-1], [1.0], [True], ["entailment"]):
        with pytest.raises(ValueError, match="RTE: predictions are ids of labels, integers from 0 to 1"):
            glue.submission("rte", "test", numbered([0]), label)
    with pytest.raises(ValueError, match="STS-B: a prediction is NaN or infinite"):
        glue.submission("stsb", "test", numbered([0]), [np.nan])


def test_outputs() -> None:
    assert {name: task.outputs for name, task in glue.TASKS.items()} == {
        "cola": 2, "sst2": 2, "mrpc": 2, "stsb": 1, "qqp": 2, "mnli": 3, "qnli": 2, "rte": 2,
    }  # fmt: skip
