"""The reader of WebNLG, against a plain reading of the real files and the references of an official scorer."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from lora_jax.data import pairs, triples

ARTISTS = ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")


def entry(number: int, category: str, triples: list[tuple[str, str, str]], *texts: tuple[str, str]) -> dict[str, Any]:
    keys = ("subject", "property", "object")
    fields = {
        "category": category,
        "lexicalisations": [{"comment": comment, "lang": "", "lex": text} for text, comment in texts],
        "modifiedtripleset": [dict(zip(keys, triple, strict=True)) for triple in triples],
        "originaltriplesets": {"originaltripleset": [[{"subject": "not", "property": "to be", "object": "read"}]]},
        "size": str(len(triples)),
    }
    return {str(number): fields}


ENTRIES = [
    entry(
        1, "Airport", [("Aarhus_Airport", "cityServed", '"Aarhus, Denmark"')], ("In Aarhus.", "good"), ("?", "toFix")
    ),
    entry(
        2, "Artist", [("A", "leaderName", "B_(C)"), ("B_(C)", "Birth", "1.5")], (" B leads A. ", "good"), ("B!", "good")
    ),
    entry(3, "City", [("D", "E", "F")], ("None is good.", "toFix")),
]
ROWS = [
    ('Aarhus_Airport : cityServed : "Aarhus, Denmark"', "In Aarhus.", "Airport", True),
    ("A : leaderName : B_(C) | B_(C) : Birth : 1.5", " B leads A. ", "Artist", False),
    ("A : leaderName : B_(C) | B_(C) : Birth : 1.5", "B!", "Artist", False),
]


def rows(data: datasets.Dataset) -> list[tuple]:
    return [(row["context"], row["completion"], row["category"], row["seen"]) for row in data]


@pytest.mark.parametrize("name", ["dev.json", "dev.json.gz"])
def test_a_small_file(tmp_path: Path, name: str) -> None:
    raw = json.dumps({"entries": ENTRIES}).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    for path in (tmp_path, tmp_path / name):
        data = triples.webnlg(path, "valid")
        assert data.column_names == ["context", "completion", "category", "seen"]
        assert rows(data) == ROWS


def plainly(path: Path) -> list[tuple]:
    """The file's pairs: numbered entries, nothing checked."""
    entries = json.loads(gzip.decompress(path.read_bytes()))["entries"]
    examples = []
    for i in range(len(entries)):
        fields = entries[i][str(i + 1)]
        context = ""
        for triple in fields["modifiedtripleset"]:
            context += f" | {triple['subject']} : {triple['property']} : {triple['object']}"
        for text in fields["lexicalisations"]:
            if text["comment"] != "toFix":
                seen = fields["category"] not in ARTISTS
                examples.append((context[3:], text["lex"], fields["category"], seen))
    return examples


@pytest.mark.parametrize(
    ("split", "file", "texts", "contexts", "seen", "seen_contexts"),
    [
        ("train", "train", 18_025, 6_888, 18_025, 6_888),
        ("valid", "dev", 2_258, 870, 2_258, 870),
        ("test", "test", 4_928, 1_862, 2_495, 971),
    ],
)
def test_the_real_files(
    shared: Path, split: str, file: str, texts: int, contexts: int, seen: int, seen_contexts: int
) -> None:
    folder = shared / "data/webnlg_challenge_2017"
    data = triples.webnlg(folder, split)
    assert rows(data) == plainly(folder / f"{file}.json.gz")
    assert (len(data), len(pairs.contexts(data))) == (texts, contexts)
    flags = dict(zip(data["context"], data["seen"], strict=True))
    assert (sum(data["seen"]), sum(flags.values())) == (seen, seen_contexts)
    # no context is both
    assert list(map(flags.get, data["context"])) == list(data["seen"])


def test_references_of_the_test_set(shared: Path) -> None:
    data = triples.webnlg(shared / "data/webnlg_challenge_2017", "test")
    groups = pairs.contexts(data)
    counts = {1: 109, 2: 474, 3: 1_262, 4: 8, 5: 4, 6: 3, 7: 1, 8: 1}
    assert Counter(map(len, groups.values())) == counts
    assert len(set(data["category"])) == 15

    def letters(text: str) -> str:
        return re.sub(r"[\W_]", "", text.lower())

    # the first four of each are those of the official scorer's example, line by line
    for number in range(4):
        file = shared / f"data/webnlg_2020_eval_example/reference{number}"
        lines = file.read_text(encoding="utf-8").split("\n")
        assert len(lines) == len(groups)
        ours = [texts[number] if len(texts) > number else "" for texts in groups.values()]
        assert list(map(letters, ours)) == list(map(letters, lines))


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds none of test\.json, test\.json\.gz; .*webnlg_challenge_2017"):
        triples.webnlg(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"/no/such: no such file or folder; .*microsoft/LoRA"):
        triples.webnlg("/no/such")
    with pytest.raises(ValueError, match="split 'dev': one of train, valid, test"):
        triples.webnlg(tmp_path, "dev")


GOOD = ENTRIES[0]["1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"entries": [', r"not JSON: .* line 1 column 14"),
        ("[]", r'not of the form \{"entries": \[\.\.\.\]\}'),
        ('{"entries": {}}', "not of the form"),
        ('{"entries": []}', 'no entry has a text commented "good"'),
        (json.dumps({"entries": [ENTRIES[2]]}), 'no entry has a text commented "good"'),
        (json.dumps({"entries": [ENTRIES[0], GOOD]}), r"entry 2 is not of the form .*2017 challenge: ValueError"),
        (json.dumps({"entries": [ENTRIES[0], "text"]}), "entry 2 is not of the form .*AttributeError"),
        (json.dumps({"entries": [{"1": GOOD | {"modifiedtripleset": [{"subject": "a"}]}}]}), "entry 1 .*'property'"),
        (json.dumps({"entries": [entry(1, "City", [("a", "b", None)])]}), "entry 1 is not .*TypeError"),  # type: ignore
        (json.dumps({"entries": [entry(1, "City", [("a", "b", "c")], (None, "good"))]}), "entry 1 has no"),  # type: ignore
        (json.dumps({"entries": [entry(1, "City", [], ("A.", "good"))]}), "entry 1 has no triple"),
        (json.dumps({"entries": [{"1": {k: v for k, v in GOOD.items() if k != "category"}}]}), "KeyError.'category'"),
    ],
)
def test_a_file_of_another_form(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "train.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"train\.json: .*{message}" if content else message):
        triples.webnlg(file)


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns, split names and test categories of web_nlg, webnlg_challenge_2017, after its card."""
    lines = [
        (
            "Airport",
            ['Aarhus_Airport | cityServed | "Aarhus, Denmark"'],
            ["In Aarhus.", "?"],
            ["good", "toFix"],
            "with_lex",
        ),
        ("Artist", ["A | leaderName | B_(C)", "B_(C) | Birth | 1.5"], [], [], "no_lex"),
        ("Artist", ["A | leaderName | B_(C)", "B_(C) | Birth | 1.5"], ["B!"], ["good"], "unseen_with_lex"),
        ("Artist", ["A | leaderName | B_(C)", "B_(C) | Birth | 1.5"], [" B leads A. ", "B!"], ["good"] * 2, "with_lex"),
    ]
    copy = datasets.Dataset.from_list(
        [
            {
                "category": category,
                "modified_triple_sets": {"mtriple_set": [triples]},
                "lex": {"comment": comments, "text": texts},
                "test_category": f"testdata_{kind}",
            }
            for category, triples, texts, comments, kind in lines
        ]
    )
    calls = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        if name == "owner/script":
            raise RuntimeError("Dataset scripts are no longer supported, but found web_nlg.py")
        return copy if name == "owner/web_nlg" else copy.remove_columns("lex")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows(triples.webnlg("owner/web_nlg", "test")) == ROWS
    assert rows(triples.webnlg("owner/web_nlg", "valid")) == ROWS
    assert calls == [("owner/web_nlg", "webnlg_challenge_2017", split) for split in ("test", "dev")]
    with pytest.raises(FileNotFoundError, match=r"owner/script: .*scripts are no longer.*microsoft/LoRA"):
        triples.webnlg("owner/script")
    with pytest.raises(ValueError, match=r"owner/other: the columns \['category', 'lex', .*it has"):
        triples.webnlg("owner/other")
    with pytest.raises(ValueError, match="split 'dev': one of"):
        triples.webnlg("owner/web_nlg", "dev")
