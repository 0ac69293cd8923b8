"""Readers of the E2E data, against the real files where they are at hand."""

import gzip
from pathlib import Path

import datasets
import pytest

from lora_jax.data import e2e, pairs

MEANING = "name[Blue Spice], eatType[coffee shop], priceRange[£20-25], familyFriendly[yes]"
CONTEXT = "name : Blue Spice | Type : coffee shop | price : £ 20 - 25 | family friendly : yes"
CSV = f'mr,ref\n"{MEANING}","Blue Spice, a coffee shop\r\n for families."\n"name[X]",It is X.\n'
LINES = f"{CONTEXT}||Blue Spice , a coffee shop . \nname : X||It is X . \n"


@pytest.mark.parametrize("name", ["valid.txt", "valid.txt.gz"])
def test_lines(tmp_path: Path, name: str) -> None:
    raw = LINES.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    for path in (tmp_path, tmp_path / name):
        data = e2e.load(path, "valid")
        assert list(data["context"]) == [CONTEXT, "name : X"]
        assert list(data["completion"]) == ["Blue Spice , a coffee shop .", "It is X ."]


@pytest.mark.parametrize("name", ["testset_w_refs.csv", "test.csv.gz"])
def test_csv(tmp_path: Path, name: str) -> None:
    raw = CSV.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    data = e2e.load(tmp_path, "test")
    assert isinstance(data, datasets.Dataset)
    assert list(data["context"]) == [CONTEXT, "name : X"]
    assert list(data["completion"]) == ["Blue Spice, a coffee shop for families.", "It is X."]


@pytest.mark.parametrize(
    ("split", "official", "lines", "contexts"),
    [
        ("train", 42_061, 42_061, 4_862),
        ("valid", 4_672, 4_672, 547),
        ("test", 4_693, 4_693, 630),
    ],
)
def test_official_contexts_become_the_authors(
    shared: Path, split: str, official: int, lines: int, contexts: int
) -> None:
    ours = e2e.load(shared / "data/e2e/official", split)
    theirs = e2e.load(shared / "data/e2e", split)
    assert (len(ours), len(theirs)) == (official, lines)
    assert list(ours["context"]) == list(theirs["context"])
    groups = pairs.contexts(theirs)
    assert len(groups) == contexts
    assert sum(map(len, groups.values())) == lines


def test_contexts_keep_the_order_of_the_file() -> None:
    data = datasets.Dataset.from_dict({"context": ["b", "a", "b"], "completion": ["first", "second", "third"]})
    groups = pairs.contexts(data)
    assert list(groups.items()) == [("b", ["first", "third"]), ("a", ["second"])]


@pytest.mark.parametrize("path", ["train.csv", "./data/e2e", "/no/such/folder", "tests/data.v2"])
def test_a_missing_path_names_the_public_source(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*tuetschek/e2e-dataset"):
        e2e.load(path)


def test_a_folder_without_the_split(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(LINES)
    with pytest.raises(FileNotFoundError, match=r"holds none of test\.txt.*e2e-dataset"):
        e2e.load(tmp_path, "test")
    with pytest.raises(ValueError, match="split 'dev': one of train, valid, test"):
        e2e.load(tmp_path, "dev")


@pytest.mark.parametrize("content", ["", " \n"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.txt.gz"])
def test_an_empty_file(tmp_path: Path, name: str, content: str) -> None:
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(ValueError, match=rf"{name}: the file is empty"):
        e2e.load(tmp_path / name)


@pytest.mark.parametrize("line", ["no bar here", "a | b", "", "a||b||c", "||b", "a|| "])
def test_a_line_of_another_form(tmp_path: Path, line: str) -> None:
    file = tmp_path / "train.txt"
    file.write_text(f"{LINES}{line}\nname : Y||It is Y . \n")
    with pytest.raises(ValueError, match=r"train\.txt:3: not a line `context\|\|completion`"):
        e2e.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mr,text\na,b\n", r"the columns mr and ref are wanted"),
        ("mr,ref\nname[X],ok\nname X,text\n", r"\.csv:3: not of the form name\[value\]"),
        ('mr,ref\n"name[X], area[",text\n', r"\.csv:2: not of the form"),
        ("mr,ref\nname[X]\n", r"\.csv:2: no text in the column ref"),
        ("mr,ref\n", r"empty but for its header"),
    ],
)
def test_a_csv_of_another_form(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "train.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        e2e.load(file)


def test_a_damaged_file(tmp_path: Path) -> None:
    compressed = gzip.compress(LINES.encode())
    (tmp_path / "cut.txt.gz").write_bytes(compressed[: len(compressed) // 2])
    (tmp_path / "latin.txt").write_bytes("name : Café||x\n".encode("latin-1"))
    for name in ("cut.txt.gz", "latin.txt"):
        with pytest.raises(ValueError, match=rf"{name}: not a readable UTF-8 file"):
            e2e.load(tmp_path / name)


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        calls.append((name, split))
        if name == "nobody/nothing":
            raise ConnectionError("no network")
        columns = ("a", "b") if name == "some/other" else ("meaning_representation", "human_reference")
        return datasets.Dataset.from_dict({columns[0]: [MEANING], columns[1]: ["A  text."]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = e2e.load("tuetschek/e2e_nlg", "valid")
    assert calls == [("tuetschek/e2e_nlg", "validation")]
    assert data[0] == {"context": CONTEXT, "completion": "A text."}
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*no network.*e2e-dataset"):
        e2e.load("nobody/nothing")
    with pytest.raises(ValueError, match=r"some/other: the columns mr and ref.*\['a', 'b'\]"):
        e2e.load("some/other")
    with pytest.raises(FileNotFoundError, match="no such file"):
        e2e.load("tests/misspelt")  # the folder exists: a path, not a name
    assert len(calls) == 3
