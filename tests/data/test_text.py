"""Plain text: documents, the stream of tokens, a tokenizer of one's own."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from lora_jax.data import text

STORY = "Once there was a café — and 3 dogs.\nThe dogs were fed."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text(f"{STORY}\n<|endoftext|>\nSecond.\n\nSame.\n<|endoftext|>\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"One\nline.\r\n \r\nTwo.\n\n\n\nThree."))
    (tmp_path / "notes.md").write_text("not text")
    return tmp_path


def test_files(folder: Path) -> None:
    assert [file.name for file in text.files(folder)] == ["a.txt.gz", "b.txt"]
    assert text.files([folder / "b.txt", folder])[0] == folder / "b.txt"
    for missing in (folder / "c.txt", str(folder / "none"), []):
        with pytest.raises(FileNotFoundError):
            text.files(missing)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no text here"):
        text.files(folder / "empty")


def test_documents(folder: Path) -> None:
    # a blank line parts documents only where no line of <|endoftext|> does
    assert text.documents(folder / "b.txt") == [STORY, "Second.\n\nSame."]
    assert text.documents(folder / "a.txt.gz") == ["One\nline.", "Two.", "Three."]
    (folder / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt: the file is empty"):
        text.documents(folder / "empty.txt")


def test_tokenizer_and_stream(folder: Path, tmp_path: Path) -> None:
    files = text.files(folder)
    tokenizer = text.train_tokenizer(files, 300)
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for string in (STORY, " leading", "\U0001f600 ß\x00", "Zürich\n\n"):
        assert tokenizer.decode(tokenizer.encode(string).ids) == string
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode(STORY).ids == tokenizer.encode(STORY).ids
    assert text.train_tokenizer(files, 300).to_str() == tokenizer.to_str()

    stream = text.encode(files, tokenizer, eos=0)
    assert stream.dtype == np.int32
    parts = [list(part[1:]) for part in np.split(stream, np.flatnonzero(stream == 0)[1:])]
    documents = [document for file in files for document in text.documents(file)]
    assert [tokenizer.decode(part) for part in parts] == documents
    with pytest.raises(ValueError, match="eos=300 is no token"):
        text.encode(files, tokenizer, eos=300)
    with pytest.raises(ValueError, match="vocab_size=100"):
        text.train_tokenizer(files, 100)


def test_the_shared_base_was_made_of_such_text(shared: Path) -> None:
    """Documents as the data's README counts them."""
    counts = {"us_presidents_speeches": 121, "openstax_textbooks": 297, "gutenberg_prose": 12}
    for name, count in counts.items():
        assert len(text.documents(shared / f"data/text/{name}.txt.gz")) == count
