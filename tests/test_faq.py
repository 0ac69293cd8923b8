"""The messages of docs/faq.md: each mistake is made, and what it raises is the text on the page."""

import itertools
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from tests.helpers.cli import run_entry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faq.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|^<!-- setup\n(.*?)^-->$", re.S | re.M)


class Mistake(NamedTuple):
    """A block that fails, its heading, the message below it, and how much of the page stands before it."""

    heading: str
    language: str
    code: str
    message: str
    start: int


def mistakes(page: str) -> list[Mistake]:
    """Every py or console block that a text block follows."""
    found, blocks = [], list(BLOCK.finditer(page))
    for block, after in itertools.pairwise(blocks):
        if block[1] in ("py", "console") and after[1] == "text":
            heading = page[: block.start()].rpartition("\n### ")[2].partition("\n")[0]
            found.append(Mistake(heading, block[1], block[2], after[2], block.start()))
    return found


MISTAKES = mistakes(PAGE.read_text())


def of_python(code: str, names: Mapping[str, Any]) -> str:
    """Type and message of what a block raises, as a file train.py."""
    copied = dict(names)
    if "config" in copied:
        copied["config"] = copied["config"].copy_and_resolve_references()
    try:
        exec(compile(code, "train.py", "exec"), copied)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def of_command(code: str) -> str:
    """What a command writes to stderr."""
    words = shlex.split(code.removeprefix("$ "))
    assert words[:2] == ["python", "-m"]
    done = run_entry(words[2].removeprefix("experiments."), *words[3:])
    assert done.returncode == 1
    return done.stderr


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Any]]]:
    """The folder in which the page's own Python, setup and ways out, has run, and what it had named by then, by where
    each block stands."""
    folder, made, by_place = tmp_path_factory.mktemp("faq"), dict[str, Any](), dict[int, dict[str, Any]]()
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.chdir(folder)
        for block in BLOCK.finditer(PAGE.read_text()):
            if block[1] == "python" or block[3]:
                exec(compile(block[2] or block[3], "faq.md", "exec"), made)
                by_place[block.start()] = dict(made)
    return folder, by_place


def test_every_message_of_the_page_is_that_of_a_mistake() -> None:
    page = PAGE.read_text()
    assert len(MISTAKES) >= 30
    assert [mistake.heading for mistake in MISTAKES] == re.findall("^### (.*)$", page, re.M)
    assert len(MISTAKES) == sum(block[1] == "text" for block in BLOCK.finditer(page)) == page.count("```text")


@jax.numpy_rank_promotion("allow")  # what users have
@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.heading)
def test_a_mistake_has_the_message_on_the_page(
    mistake: Mistake, names: tuple[Path, dict[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, by_place = names
    if mistake.language == "console":
        message = of_command(mistake.code)
    else:
        monkeypatch.chdir(folder)
        message = of_python(mistake.code, by_place[max(place for place in by_place if place < mistake.start)])
    assert mistake.message.split() == message.split()
