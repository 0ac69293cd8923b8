"""Files that are replaced together: records of saves that were broken off, damaged ones and foreign ones."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_jax.checkpoints import file_sets, finish_replacing, replaced_together
from lora_jax.checkpoints.file_sets import RECORD


def broken_off(folder: Path) -> Path:
    """A folder whose new files are complete and recorded, but not moved; the hidden folder."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_sets, "_finish", lambda *_: None)
        with replaced_together(folder, last="config.json") as new:
            for name in ("config.json", "model.safetensors"):
                (new / name).write_text("new")
    assert contents(folder) == {"config.json": "old", "model.safetensors": "old"}
    return new


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if not file.name.startswith(".saving")}


def test_what_was_recorded_is_finished(tmp_path: Path) -> None:
    new = broken_off(tmp_path / "x")
    finish_replacing(tmp_path / "x")
    assert contents(tmp_path / "x") == {"config.json": "new", "model.safetensors": "new"}
    assert not new.exists() and not (tmp_path / "x" / RECORD).exists()
    finish_replacing(tmp_path / "x")
    finish_replacing(tmp_path / "nowhere")


def test_an_end_right_after_the_record_keeps_the_new_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = file_sets.write_atomically

    def interrupted(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    (tmp_path / "config.json").write_text("old")
    monkeypatch.setattr(file_sets, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_together(tmp_path, last="config.json") as new:
        (new / "config.json").write_text("new")
    finish_replacing(tmp_path)
    assert contents(tmp_path) == {"config.json": "new"}


def test_files_written_since_are_not_replaced(tmp_path: Path) -> None:
    """Another library saved into the folder in the meantime."""
    broken_off(tmp_path / "x")
    later = (tmp_path / "x" / RECORD).stat().st_mtime_ns + 10**9
    (tmp_path / "x" / "model.safetensors").write_text("theirs")
    os.utime(tmp_path / "x" / "model.safetensors", ns=(later, later))
    with pytest.raises(ValueError, match=r"model.safetensors was written after a save .* delete .saving.json"):
        finish_replacing(tmp_path / "x")
    assert contents(tmp_path / "x") == {"config.json": "old", "model.safetensors": "theirs"}
    (tmp_path / "x" / RECORD).unlink()
    with replaced_together(tmp_path / "x", last="config.json") as new:
        (new / "config.json").write_text("newer")
    assert contents(tmp_path / "x") == {"config.json": "newer", "model.safetensors": "theirs"}
    assert not list((tmp_path / "x").glob(".saving*")), "what a broken save left is removed"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(tmp_path / "x")

    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(OSError, match="x holds a save that was broken off, and that cannot be finished here"):
        finish_replacing(tmp_path / "x")


def test_a_full_disk_names_the_folder_and_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")
    with (
        pytest.raises(OSError, match=r"cannot be written: .*full; the files there are as they were"),
        replaced_together(tmp_path, last="config.json") as new,
    ):
        (new / "config.json").write_text("new")
        raise OSError("full")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"] and contents(tmp_path) == {
        "config.json": "old"
    }


def test_folders_in_the_files_places_are_an_error_before_anything_is_moved(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "model.safetensors").mkdir()
    with (
        pytest.raises(OSError, match=r"model\.safetensors is a folder"),
        replaced_together(tmp_path, last="config.json", obsolete=lambda name: True) as new,
    ):
        (new / "config.json").write_text("new")
        (new / "model.safetensors").write_text("new")
    assert (tmp_path / "config.json").read_text() == "old" and (tmp_path / "model.safetensors").is_dir()


def record(**changes: Any) -> bytes:
    return json.dumps({"folder": ".saving-x", "new": ["config.json"], "obsolete": []} | changes).encode()


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "cut off": record()[:20],
    "no UTF-8": b"\xff" + record(),
    "a list": b"[]",
    "deep": b"[" * 10**6,
    "no folder": record(folder=None),
    "another folder": record(folder="../.saving-x"),
    "an absolute folder": record(folder="/.saving-x"),
    "a folder of another name": record(folder="elsewhere"),
    "a missing folder": record(folder=".saving-y"),
    "no files": record(new=[]),
    "no list": record(new=3),
    "a path": record(new=["../config.json"]),
    "a number": record(new=[3]),
    "itself": record(new=[RECORD]),
    "its folder": record(new=[".saving-x"]),
    "a file to delete that is no weights": record(obsolete=["notes.txt"]),
    "a file to delete elsewhere": record(obsolete=["../model.safetensors"]),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_an_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    (folder / ".saving-x").mkdir(parents=True)
    (folder / "elsewhere").mkdir()
    for file in (".saving-x/config.json", "elsewhere/config.json", "notes.txt", "config.json", "../model.safetensors"):
        (folder / file).write_text("stays")
    (folder / RECORD).write_bytes(content)
    with pytest.raises(ValueError, match=r"x/\.saving\.json"):
        finish_replacing(folder)
    assert sum(file.read_bytes() == b"stays" for file in tmp_path.rglob("*") if file.is_file()) == 5


def link_record(folder: Path, other: Path) -> None:
    (folder / ".saving-x").mkdir()
    (other / "record").write_bytes(record())
    (folder / RECORD).symlink_to(other / "record")


def link_folder(folder: Path, other: Path) -> None:
    (folder / ".saving-x").symlink_to(other)
    (folder / RECORD).write_bytes(record())


def pipe(folder: Path, other: Path) -> None:
    os.mkfifo(folder / RECORD)


@pytest.mark.parametrize("make", [link_record, link_folder, pipe])
def test_a_record_of_files_elsewhere_moves_nothing(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    folder, other = tmp_path / "x", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "config.json").write_text("theirs")
    make(folder, other)
    with pytest.raises(ValueError, match="is no record of a save"):
        finish_replacing(folder)
    assert (other / "config.json").read_text() == "theirs"


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replaced_together(tmp_path / "x", last="config.json") as new:
            (new / "config.json").write_text("new")
    finally:
        os.umask(before)
    assert [oct(path.stat().st_mode & 0o777) for path in (tmp_path / "x", tmp_path / "x/config.json")] == [
        "0o750",
        "0o640",
    ]
