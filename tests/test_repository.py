"""What holds of the repository's files: layers, imports, sizes, what the texts may not name."""

import ast
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_jax"

# What each layer may import: of the package (what stands below it) and from outside.
CORE_ORDER = [
    "selection",
    "arrays",
    "taps",
    "structure",
    "lifting",
    "products",
    "controlflow",
    "transforms",
    "methods",
    "arithmetic",
    "freezing",
]
CORE = set(CORE_ORDER)
CORE_OUTSIDE = {"jax", "numpy", "optax"}
BELOW = {"dropping"}  # the models' too
HEAVY = {"flax", "orbax", "safetensors", "huggingface_hub", "tokenizers", "datasets"}
LAYERS = {
    "dropping": (set(), {"jax"}),
    "models": (BELOW, {"jax", "flax", "numpy"}),
    "data": (set(), {"numpy", "datasets", "tokenizers", "huggingface_hub"}),
    "metrics": (set(), {"numpy", "sacrebleu", "scipy", "sklearn"}),
    "sharding": (CORE | {"models"}, CORE_OUTSIDE),
    "processes": (set(), {"jax", "numpy"}),
    "checkpoints": (CORE | {"models", "sharding", "processes"}, CORE_OUTSIDE | HEAVY),
    "interop": (CORE | {"models", "processes", "checkpoints"}, CORE_OUTSIDE | HEAVY),
    "generation": (CORE | {"models"}, CORE_OUTSIDE | {"flax", "tokenizers", "tqdm"}),
    "training": (
        CORE | {"models", "data", "metrics", "sharding", "processes", "checkpoints", "interop", "generation"},
        CORE_OUTSIDE | HEAVY | {"tqdm", "tensorboardX", "matplotlib", "ml_collections"},
    ),
}


def texts(*suffixes: str) -> list[Path]:
    """The repository's own files, in git or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    files = [ROOT / name for name in listed]
    return [f for f in files if f.is_file() and (not suffixes or f.suffix in suffixes)]


def imports(file: Path) -> set[str]:
    """The dotted names of all that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(name: str) -> str | None:
    """`lora_jax.models.gpt2` -> `models`; None for the package itself."""
    return (*name.split("."), None)[1]


PYTHON = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", PYTHON, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_layer_imports_only_what_stands_below_it(file):
    layer = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer == "__init__":
        inside, outside = CORE, set()
    elif layer in CORE:
        inside = BELOW | set(CORE_ORDER[: CORE_ORDER.index(layer)])
        outside = CORE_OUTSIDE
    else:
        inside, outside = LAYERS[layer]
    for name in imports(file):
        top = name.split(".")[0]
        if top == "lora_jax":
            assert layer_of(name) in inside | {layer}, name
        else:
            assert top in outside | sys.stdlib_module_names, name


def test_nothing_imports_experiments_or_configs():
    for file in texts(".py"):
        if file.relative_to(ROOT).parts[0] == "lora_jax":
            assert not {n.split(".")[0] for n in imports(file)} & {"experiments", "configs"}, file


def test_no_private_module_is_imported():
    for file in texts(".py"):
        for name in imports(file):
            parts = name.split(".")
            private = [part for part in parts if part.startswith("_") and part != "__future__"]
            assert not private, f"{file}: {name}"


def test_files_are_small():
    for file in texts(".py"):
        length = len(file.read_text().splitlines())
        assert length <= 400, f"{file} has {length} lines"


def code_lines(file: Path) -> int:
    """The lines of a module that are neither blank, nor comments, nor docstrings."""
    source = file.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node, clean=False)
    ]
    said = {n for node in docstrings for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = enumerate(map(str.strip, source.splitlines()), 1)
    return sum(bool(line) and line[0] != "#" and n not in said for n, line in lines)


def test_the_core_is_small():
    """Without the methods, and the arithmetic that knows them."""
    files = [PACKAGE / f"{name}.py" for name in ["__init__", *CORE_ORDER] if name not in ("methods", "arithmetic")]
    assert sum(map(code_lines, files)) < 1400


def test_no_text_names_a_machine():
    own = re.compile("/(work|root|home|tmp/w)/")
    for file in texts(".py", ".md", ".toml", ".ipynb", ".json", ".sh", ""):
        if file.name != "LICENSE":
            assert not own.search(file.read_text()), file


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout


def test_importing_the_core_loads_nothing_else():
    loaded = run_python("import sys, lora_jax; print(*sorted(sys.modules))").split()
    tops = {name.split(".")[0] for name in loaded}
    assert not tops & {"flax", "torch", "datasets", "orbax", "transformers", "matplotlib"}


def test_importing_the_core_takes_little_longer_than_jax_and_optax():
    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    plain, ours = [], []
    for _ in range(3):  # in turns: what else the machine does falls on both
        plain.append(seconds("import jax, optax"))
        ours.append(seconds("import lora_jax"))
    assert statistics.median(ours) < 1.5 * statistics.median(plain)
