"""SAMSum and WikiSQL from invented lines."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lora_jax.data import jsonl
from lora_jax.metrics import logical_form_accuracy

DIALOGUES = [
    {"id": "1", "dialogue": "Ann: Tea?\r\nBob: Yes!\u2028Please.", "summary": "Bob wants tea. "},
    {"id": "2", "dialogue": "Cy: Hi\nDi: Bye", "summary": "They met."},
]
TABLES = [
    {"id": "t-1", "header": ["City", "Club", "Wins"], "types": ["text", "text", "real"], "rows": [["Oslo", "Lyn", 2]]},
    {"id": "t-2", "header": ["Year"], "types": ["real"], "rows": []},
]
QUESTIONS: list[dict[str, Any]] = [
    {"phase": 1, "table_id": "t-1", "question": "How many clubs? ", "sql": {"sel": 1, "agg": 3, "conds": []}},
    {
        "phase": 1,
        "table_id": "t-1",
        "question": "Which city of Lyn won more than 1?",
        "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, "Lyn"], [2, 1, 1.5]]},
    },
    {"phase": 2, "table_id": "t-2", "question": "First?", "sql": {"sel": 0, "agg": 2, "conds": [[0, 2, 1990]]}},
]


def write(file: Path, rows: list[Any]) -> None:
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)


@pytest.mark.parametrize("name", ["valid.jsonl", "val.jsonl", "val.jsonl.gz"])
def test_dialogues(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, DIALOGUES)
    for path in (tmp_path, tmp_path / name):
        data = jsonl.samsum(path, "valid")
        assert list(data["context"]) == ["Ann: Tea?\nBob: Yes!\u2028Please.\n\n", "Cy: Hi\nDi: Bye\n\n"]
        assert list(data["completion"]) == ["Bob wants tea.", "They met."]


@pytest.mark.parametrize("end", ["", ".gz"])
def test_questions(tmp_path: Path, end: str) -> None:
    write(tmp_path / f"dev.jsonl{end}", QUESTIONS)
    write(tmp_path / "dev.tables.jsonl", TABLES)
    for path in (tmp_path, tmp_path / f"dev.jsonl{end}"):
        data = jsonl.wikisql(path, "valid")
        assert list(data["context"]) == [
            "City | Club | Wins\nHow many clubs?",
            "City | Club | Wins\nWhich city of Lyn won more than 1?",
            "Year\nFirst?",
        ]
        queries = list(data["completion"])
        assert queries == [
            "SELECT COUNT Club FROM table",
            'SELECT City FROM table WHERE Club = "Lyn" AND Wins > 1.5',
            "SELECT MIN Year FROM table WHERE Year < 1990",
        ]
    # of the form that the metric compares
    others = [*queries[:1], "select City from table where Wins > 1.5 and Club = 'lyn';", queries[2].replace("<", ">")]
    assert logical_form_accuracy(others, [[query] for query in queries]) == pytest.approx(2 / 3)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds none of train\.jsonl, .*1911\.12237"):
        jsonl.samsum(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds none of dev\.jsonl, .*salesforce/WikiSQL"):
        jsonl.wikisql(tmp_path, "valid")
    write(tmp_path / "dev.jsonl", QUESTIONS)
    with pytest.raises(FileNotFoundError, match=r"holds none of dev\.tables\.jsonl, .*salesforce/WikiSQL"):
        jsonl.wikisql(tmp_path, "valid")
    with pytest.raises(ValueError, match="split 'dev': one of train, valid, test"):
        jsonl.samsum(tmp_path, "dev")


@pytest.mark.parametrize("line", ["", "[]", "{", '{"dialogue": "a"}', '{"dialogue": "a", "summary": null}'])
def test_a_dialogue_of_another_form(tmp_path: Path, line: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(f"{json.dumps(DIALOGUES[0])}\n{line}\n{json.dumps(DIALOGUES[1])}\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:2: not a line of the form wanted; .*arXiv"):
        jsonl.samsum(file)


@pytest.mark.parametrize(
    "change",
    [{"table_id": "t-3"}, {"sql": {"sel": 3, "agg": 0, "conds": []}}, {"sql": {"sel": 0, "agg": 0, "conds": [[0, 0]]}}],
)
def test_a_question_of_another_form(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path / "test.jsonl", [QUESTIONS[0], QUESTIONS[1] | change])
    write(tmp_path / "test.tables.jsonl", TABLES)
    with pytest.raises(ValueError, match=r"test\.jsonl:2: not a line of the form wanted; .*WikiSQL"):
        jsonl.wikisql(tmp_path, "test")
    write(tmp_path / "test.tables.jsonl", [{"id": "t-1"}])
    with pytest.raises(ValueError, match=r"test\.tables\.jsonl:1: not a line"):
        jsonl.wikisql(tmp_path, "test")
