"""The pages: their Python runs, and the commands, files and anchors that they name exist."""

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from experiments.ending import with_new_names
from lora_jax.runs import tables
from tests.helpers.public import PUBLIC

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).parts[0] not in ("_build", "notebooks")]
READ_ALONE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
OF_CORE = {"jax", "numpy", "optax", "lora_jax"}


class Block(NamedTuple):
    """A block of a page: the line it begins on, from 1, the language, "" for none, and what is in it."""

    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, and the comments of the form `<!-- setup`, whose language is python."""
    text = page.read_text()
    blocks = []
    for match in re.finditer(r"^([ ]*)```([^\n`]*)\n(.*?)^\1```$|^<!-- setup\n(.*?)^-->$", text, re.S | re.M):
        language, inside = (match[2].strip(), match[3]) if match[4] is None else ("python", match[4])
        blocks.append(Block(text[: match.start()].count("\n") + 1, language, inside))
    return blocks


def prose_of(page: Path) -> str:
    """A page without its blocks and spans of code."""
    without_blocks = re.sub(r"^([ ]*)```.*?^\1```$", "", page.read_text(), flags=re.S | re.M)
    return re.sub(r"`[^`\n]+`", "", without_blocks)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# The pages take minutes together: all but the first ones are for `make test-docs`.
QUICK = (ROOT / "README.md", DOCS / "index.md", DOCS / "concepts.md")
WITH_PYTHON = [
    pytest.param(page, id=named(page), marks=() if page in QUICK else pytest.mark.slow)
    for page in (ROOT / "README.md", *PAGES)
    if any(block.language == "python" for block in blocks_of(page))
]


def imported(source: str) -> set[str]:
    """The packages that are imported."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.usefixtures("registries", "no_java")
@jax.numpy_rank_promotion("allow")  # what users have
@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty folder, one block after the other in one namespace."""
    blocks = [block for block in blocks_of(page) if block.language == "python"]
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # read by its import
    for package in sorted(set().union(*(imported(block.text) for block in blocks)) - OF_CORE):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile("\n" * block.line + block.text, named(page), "exec"), names)


def test_the_readme_is_short():
    text = READ_ALONE[0].read_bytes()
    assert text.count(b"\n") <= 150 and len(text) <= 8000


# Commands


class Command(NamedTuple):
    """A line of a page's shell blocks, as words."""

    line: int
    words: list[str]


def commands_of(page: Path) -> Iterator[Command]:
    for block in blocks_of(page):
        if block.language in ("sh", "bash"):
            for number, line in enumerate(block.text.replace("\\\n", "  ").splitlines(), 1):
                if words := shlex.split(line, comments=True):
                    yield Command(block.line + number, words)


COMMANDS = [page for page in (*READ_ALONE, *PAGES) if list(commands_of(page))]


def flags_of(module: str) -> set[str]:
    """The flags that an entry point defines, its modules of experiments with it; they are read, not run."""
    file = module_file(module)
    assert file, f"there is no module {module}"
    tree = ast.parse(file.read_text())
    flags = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("DEFINE_"):
            flags.add(ast.literal_eval(node.args[0]))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "experiments":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                flags |= flags_of(inner if module_file(inner) else str(node.module))
    return flags


def module_file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__main__.py", path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def check_module_command(words: list[str], where: str) -> None:
    """`python -m experiments.X --flag=value ...`"""
    module, *arguments = words[words.index("-m") + 1 :]
    if not module.startswith(("experiments.", "tests.")):
        return
    allowed = flags_of(module) | {"help", "verbosity", "v"}
    config = config_of(arguments)
    for argument in with_new_names(arguments):
        assert argument.startswith("-"), f"{where}: {argument!r} is no --flag=value"
        name = argument.lstrip("-").partition("=")[0]
        flag, _, key = name.partition(".")
        assert flag in allowed or flag.removeprefix("no") in allowed, f"{where}: {module} has no --{name}"
        assert not key or config is None or has_key(config, key), f"{where}: the config has no {key}"


def config_of(arguments: list[str]) -> Any:
    """The config that the arguments name, or None where it is none of configs/; an unknown row is a ValueError."""
    for argument in arguments:
        file, _, row = argument.removeprefix("--config=").partition(":")
        if file != argument and (ROOT / file).is_file():
            get_config = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config
            return get_config(row) if row else get_config()
    return None


def has_key(config: Any, key: str) -> bool:
    for part in key.split("."):
        if part not in config:
            return False
        config = config[part]
    return True


@pytest.mark.parametrize("page", COMMANDS, ids=named)
def test_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line, words in commands_of(page):
        where = f"{named(page)}:{line}"
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # VARIABLE=value command
            words = words[1:]
        if "-m" in words and words[0] in ("python", "experiments/launch/local.sh"):
            check_module_command(words, where)
        elif words and words[0] == "make":
            assert words[1] in targets, f"{where}: no target {words[1]}"
        elif words and "/" in words[0]:
            assert (ROOT / words[0]).is_file(), f"{where}: no file {words[0]}"


def test_a_wrong_command_is_found() -> None:
    """The test above sees a flag, a key or a row of a config that does not exist."""
    train = ["python", "-m", "experiments.train", "--config=configs/e2e.py:medium"]
    check_module_command([*train, "--config.lora.rank=8", "--config.optimizer.b_ratio=16", "--workdir=x"], "page:1")
    for wrong in ("--config.lora.rnak=8", "--workdri=x", "workdir"):
        with pytest.raises(AssertionError, match="page:1"):
            check_module_command([*train, wrong], "page:1")
    with pytest.raises(AssertionError, match="no module"):
        check_module_command(["python", "-m", "experiments.trian"], "page:1")
    with pytest.raises(ValueError, match="huge"):
        check_module_command(["python", "-m", "experiments.train", "--config=configs/e2e.py:huge"], "page:1")


@pytest.mark.parametrize("page", [*READ_ALONE, *PAGES], ids=named)
def test_extras_exist(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"(?:lora_jax|\.)\[([a-z0-9-]+(?:,[a-z0-9-]+)*)\]", page.read_text()):
        assert set(names.split(",")) <= set(extras), names


# Links


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them, and its own `(name)=`."""
    text = re.sub(r"^([ ]*)```.*?^\1```$", "", page.read_text(), flags=re.S | re.M)
    anchors: set[str] = set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = sum(anchor == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", anchor) is not None for anchor in anchors)
        anchors.add(f"{slug}-{count}" if count else slug)
    return anchors


def links_of(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if not re.match(r"[a-z]+:", target):  # https:, mailto:
            yield target


@pytest.mark.parametrize("page", [*READ_ALONE, *PAGES], ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.is_relative_to(DOCS / "notebooks"):  # made from notebooks/ when the pages are built
            target = ROOT / target.relative_to(DOCS)
        if target.is_relative_to(ROOT / "lora_jax") and not (ROOT / "lora_jax").is_dir():
            continue  # the tests run against the wheel, away from the package's sources
        assert target.exists(), f"{named(page)} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), f"{named(page)} links to {link}; {named(target)} has no such heading"


def test_every_page_is_in_a_table_of_contents() -> None:
    """`make docs` checks it too; here the page is named without a build."""
    listed = set()
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "{toctree}":
                for entry in (line for line in block.text.splitlines() if line and not line.startswith(":")):
                    entries = page.parent.glob(f"{entry}.md") if "*" in entry else [page.parent / f"{entry}.md"]
                    listed |= {path.resolve() for path in entries}
    notebooks = {DOCS / "notebooks" / f"{file.stem}.md" for file in (ROOT / "notebooks").glob("*.ipynb")}
    assert listed == {*PAGES, *notebooks} - {DOCS / "index.md"}


# Tables


@pytest.mark.parametrize(
    "page", [p for p in (ROOT / "README.md", *PAGES) if "<!-- results: " in p.read_text()], ids=named
)
def test_the_tables_are_those_of_the_results(page: Path) -> None:
    assert tables.fill(page.read_text(), DOCS / "results") == page.read_text(), "`make results` writes them anew"


# The reference


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_and_in_the_reference(name: str) -> None:
    module = importlib.import_module(name)
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    short = {"lora_jax": "lj"}.get(name, name.rpartition(".")[2])
    has_all_members = f".. automodule:: {name}\n   :members:" in pages
    for public in module.__all__:
        documented = hasattr(getattr(module, public), "__module__") and getattr(module, public).__doc__
        directive = rf"^\.\. (?:auto|py:)\w+:: (?:{re.escape(name)}\.)?{public}$"
        listed = re.search(rf"{directive}|`{short}\.{public}`", pages, re.M)
        assert (has_all_members and documented) or listed, f"{name}.{public}"


def test_pages_have_one_title() -> None:
    for page in PAGES:
        text = re.sub(r"^([ ]*)```.*?^\1```$", "", page.read_text(), flags=re.S | re.M)
        assert len(re.findall(r"^# ", text, re.M)) == (page.name != "changelog.md"), named(page)
