"""The reader of DART, against a plain reading of the real files and the official references."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lora_jax.data import pairs, triples

ENTRIES = [
    {
        "tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "LOCATION_Name", "NC | USA"]],
        "subtree_was_extended": True,
        "annotations": [{"source": "WikiSQL", "text": " It joined. "}, {"source": "x", "text": None}],
    },
    {"tripleset": [["[TABLECONTEXT]", "[TITLE]", "X"]], "annotations": [{"source": "y", "text": "X."}]},
]
CONTEXTS = ["Mars Hill : joined : 1973 | Mars Hill : location_name : NC | USA", "[TABLECONTEXT] : [title] : X"]


@pytest.mark.parametrize("name", ["dart-v1.1.1-full-dev.json", "dart-v1.1.1-full-dev.json.gz"])
def test_a_small_file(tmp_path: Path, name: str) -> None:
    raw = json.dumps(ENTRIES).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    for path in (tmp_path, tmp_path / name):
        data = triples.dart(path, "valid")
        assert data.column_names == ["context", "completion"]
        assert list(data["context"]) == [CONTEXTS[0], CONTEXTS[0], CONTEXTS[1]]
        assert list(data["completion"]) == [" It joined. ", "", "X."]


def plainly(path: Path) -> list[list[tuple[str, str]]]:
    """The pairs of each entry."""
    pairs_by_entry = []
    for fields in json.loads(gzip.decompress(path.read_bytes())):
        context = ""
        for subject, relation, tail in fields["tripleset"]:
            context += " | " + subject + " : " + relation.lower() + " : " + tail
        pairs_by_entry.append([(context[3:], annotation["text"] or "") for annotation in fields["annotations"]])
    return pairs_by_entry


@pytest.mark.parametrize(
    ("split", "name", "entries", "texts", "contexts", "many"),
    [("valid", "dev", 2_768, 6_980, 2_721, 117), ("test", "test", 5_097, 12_552, 4_159, 88)],
)
def test_the_real_files(
    shared: Path, split: str, name: str, entries: int, texts: int, contexts: int, many: int
) -> None:
    data = triples.dart(shared / "data/dart", split)
    expected = plainly(shared / f"data/dart/dart-v1.1.1-full-{name}.json.gz")
    assert list(zip(data["context"], data["completion"], strict=True)) == [pair for entry in expected for pair in entry]
    assert (len(expected), len(data)) == (entries, texts)
    groups = pairs.contexts(data)
    assert len(groups) == contexts
    counts = Counter(map(len, groups.values()))
    assert sum(number for size, number in counts.items() if size > 6) == many
    assert max(counts) == {"valid": 33, "test": 35}[split]


def test_the_official_references(shared: Path) -> None:
    """Those of the official scorer's example, up to three an entry, in the order of the file."""
    data = iter(triples.dart(shared / "data/dart", "test")["completion"])
    ours = [[next(data) for _ in entry] for entry in plainly(shared / "data/dart/dart-v1.1.1-full-test.json.gz")]

    def letters(text: str) -> str:
        return re.sub(r"[\W_]", "", text.lower())

    for number in range(3):
        file = shared / f"data/dart_eval_example/all-delex-reference{number}.lex"
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        texts = [entry[number] if len(entry) > number else "" for entry in ours]
        assert list(map(letters, texts)) == list(map(letters, lines))


def test_training_on_a_part_of_dev(shared: Path) -> None:
    folder = shared / "data/dart"
    train, valid = triples.dart_dev(folder, "train"), triples.dart_dev(folder, "valid")
    assert (len(train), len(valid)) == (6_316, 664)
    assert not set(train["context"]) & set(valid["context"])
    assert len(set(valid["context"])) == 272 == round(2_721 / 10)
    dev = triples.dart(folder, "valid")
    both = Counter(zip(train["context"], train["completion"], strict=True))
    both.update(zip(valid["context"], valid["completion"], strict=True))
    assert both == Counter(zip(dev["context"], dev["completion"], strict=True))
    assert list(triples.dart_dev(folder, "valid")["completion"]) == list(valid["completion"])
    assert len(triples.dart_dev(folder, "test")) == 12_552
    with pytest.raises(ValueError, match="split 'dev': one of"):
        triples.dart_dev(folder, "dev")
    with pytest.raises(ValueError, match=r"dev\.json\.gz: a file; the folder"):
        triples.dart_dev(folder / "dart-v1.1.1-full-dev.json.gz")


def test_a_folder_without_the_train_file(tmp_path: Path) -> None:
    (tmp_path / "dart-v1.1.1-full-dev.json").write_text(json.dumps(ENTRIES))
    assert len(triples.dart(tmp_path, "valid")) == 3
    with pytest.raises(FileNotFoundError, match=r"holds none of dart-v1\.1\.1-full-train\.json, .*Yale-LILY/dart"):
        triples.dart(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; .*Yale-LILY/dart"):
        triples.dart_dev(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("[{]", "not JSON"),
        ("{}", 'not a list of {"tripleset", "annotations"}'),
        ("[]", "no entry has an annotation"),
        (json.dumps([ENTRIES[1] | {"annotations": []}]), "no entry has an annotation"),
        (json.dumps([ENTRIES[0], {"annotations": []}]), r"entry 1 \(counted from 0\) is not .*'tripleset'"),
        (json.dumps([ENTRIES[0] | {"tripleset": [["a", "b"]]}]), "entry 0 .* is not of the form .*ValueError"),
        (json.dumps([ENTRIES[0] | {"tripleset": [["a", None, "c"]]}]), "entry 0 .*AttributeError"),
        (json.dumps([ENTRIES[0] | {"tripleset": [["a", "b", 3]]}]), "entry 0 .*TypeError"),
        (json.dumps([ENTRIES[0] | {"annotations": [{"source": "x"}]}]), "entry 0 .*'text'"),
        (json.dumps([ENTRIES[0] | {"annotations": [{"text": 3}]}]), "entry 0 .* something else where a text"),
        (json.dumps([ENTRIES[0] | {"tripleset": []}]), "entry 0 .* has no triple"),
    ],
)
def test_a_file_of_another_form(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}" if content else message):
        triples.dart(file)
