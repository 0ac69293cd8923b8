"""Files of one folder that belong together, such as a config and its weights: they are replaced all at once.

The new files are written into a hidden folder beside the old ones. Then a record of the moves appears, by one rename:
until then the old files count, and from then on the new ones. Where the writer is killed after that, the next one that
reads or writes the folder here does the moves that are left. Readers of other libraries find no config in between.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_jax.checkpoints.files import fcntl, write_atomically

RECORD = ".saving.json"
_PREFIX = ".saving-"  # of the hidden folder
_WEIGHTS = (".safetensors", ".safetensors.index.json")  # what a record may delete
_LARGEST = 1 << 20  # bytes of a record


@contextlib.contextmanager
def replaced_together(
    folder: str | os.PathLike, last: str, obsolete: Callable[[str], Any] = lambda name: False
) -> Iterator[Path]:
    """A new folder for a block to write files into; at its end they replace the files of the same names in `folder`,
    all or none. Other files stay.

    Args:
      folder: made where it is missing; one writer at a time. What killed writers left there is finished or removed.
      last: the file, of those that the block writes, without which nothing of the folder is read: it is moved last.
      obsolete: which other names of weights are deleted.

    Raises:
      OSError: something could not be written: the old files are there, or if all new ones were complete, those.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from lora_jax import checkpoints
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with checkpoints.replaced_together(folder, last="config.json") as new:
    ...         for name in ("config.json", "model.safetensors"):
    ...             _ = (new / name).write_text("new")
    ...     checkpoints.finish_replacing(folder)  # before reading: nothing is left to do
    ...     print(sorted(path.name for path in Path(folder).iterdir()))
    ['config.json', 'model.safetensors']
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    finish_replacing(folder)
    for left in folder.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob(f".{RECORD}.*"):  # of `write_atomically`
        left.unlink(missing_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder, prefix=_PREFIX))
    try:
        yield new
        names = sorted((file.name for file in new.iterdir()), key=lambda name: (name == last, name))
        if taken := [name for name in names if (folder / name).is_dir()]:
            raise IsADirectoryError(f"{folder / taken[0]} is a folder")
        for path in [*(new / name for name in names), new]:
            _sync(path)
        others = (file for file in folder.iterdir() if file.name not in names and not file.is_dir())
        deleted = sorted(file.name for file in others if obsolete(file.name))
        record = {"folder": new.name, "new": names, "obsolete": deleted}
        write_atomically(folder / RECORD, json.dumps(record).encode())
    except BaseException as error:
        if not (folder / RECORD).exists():  # else the new files count
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(error, OSError):
                raise OSError(f"{folder} cannot be written: {error}; the files there are as they were") from error
        raise
    finish_replacing(folder)


def finish_replacing(folder: str | os.PathLike) -> None:
    """Does what is left of the moves of a writer of `replaced_together` that was killed; most often nothing.

    Raises:
      ValueError: the record is damaged, or of files that were changed since.
      OSError: the files cannot be moved, as in a folder that is read-only.

    An example is in `replaced_together`.
    """
    record = Path(folder).expanduser() / RECORD
    if not os.path.lexists(record):
        return
    if record.is_symlink() or not record.is_file():
        raise ValueError(f"{record} is no record of a save that was broken off: delete it")
    try:
        with contextlib.ExitStack() as stack:
            if fcntl is not None:
                file = stack.enter_context(record.open("r+b"))
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            if record.exists():  # else another reader has just finished
                _finish(record)
    except FileNotFoundError:
        if record.exists():
            raise
    except OSError as error:
        raise OSError(
            f"{folder} holds a save that was broken off, and that cannot be finished here ({error}): use a copy of the "
            "folder, hidden files included, in a place that can be written to"
        ) from error


def _finish(record: Path) -> None:
    folder = record.parent
    new, names, obsolete = _parsed(record)
    since = record.stat().st_mtime_ns
    for name in names:
        if (new / name).exists() and (folder / name).exists() and (folder / name).stat().st_mtime_ns > since:
            raise ValueError(
                f"{folder / name} was written after a save into {folder} was broken off: delete {RECORD} there to keep "
                f"what is there now, or {name} to get what was saved"
            )
    _sync(folder)
    if (new / names[-1]).exists():  # without it other libraries read nothing while files are moved
        (folder / names[-1]).unlink(missing_ok=True)
    for name in obsolete:
        (folder / name).unlink(missing_ok=True)
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # moved already
            os.replace(new / name, folder / name)
    _sync(folder)
    record.unlink()
    shutil.rmtree(new, ignore_errors=True)


def _parsed(record: Path) -> tuple[Path, list[str], list[str]]:
    """The hidden folder, the names of the new files and those of the obsolete ones; none leads out of the folder."""
    try:
        with record.open("rb") as file:
            fields = json.loads(file.read(_LARGEST))
        hidden, names, obsolete = fields["folder"], fields["new"], fields["obsolete"]
        new = record.parent / hidden
        if not all(map(_plain, [hidden, *names, *obsolete])) or new.is_symlink() or not hidden.startswith(_PREFIX):
            raise ValueError("it names what is outside its folder")
        if not names or {RECORD, hidden} & {*names} or not all(name.endswith(_WEIGHTS) for name in obsolete):
            raise ValueError("it names other files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{record} is no record of a save that was broken off ({error}): delete it") from error
    if not new.is_dir():
        raise ValueError(f"{record}: its folder {hidden} is missing: save again, after deleting {RECORD}")
    return new, list(names), list(obsolete)


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name and os.path.basename(name) == name


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder (where the system can), are on disk."""
    with contextlib.suppress(*[OSError] if path.is_dir() else []):
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
