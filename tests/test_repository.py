"""What holds of the repository's files: layers, imports, sizes, what the texts may not name."""

import ast
import functools
import itertools
import json
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lora_jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_jax"

# The modules of the core and what is built on it: each imports only what stands before it, jax, numpy and optax.
CORE_ORDER = [
    "core.extras",
    "core.dropout",
    "core.globs",
    "core.selection",
    "core.arrays",
    "core.lifting.taps",
    "core.lifting.axis_ops",
    "core.lifting.interpreter",
    "core.lifting.rules",
    "core.lifting.control_flow",
    "core.transforms.transform",
    "core.transforms.registry",
    "core.transforms.merging",
    "core.transforms.report",
    "core.transforms",
    "quantized.kinds",
    "quantized",
    "methods",
    "core.freezing",
]
CORE_OUTSIDE = {"jax", "numpy", "optax"}
HEAVY = {"flax", "orbax", "safetensors", "huggingface_hub", "tokenizers", "datasets"}
# What each other layer may import: of the package and from outside.
CORE = {"core", "methods", "quantized"}
LAYERS = {
    "models": ({"core.dropout", "core.extras"}, {"jax", "flax", "jaxtyping", "numpy"}),
    "data": ({"core.extras"}, {"numpy", "datasets", "jaxtyping", "jinja2", "tokenizers", "huggingface_hub"}),
    "metrics": ({"core.extras"}, {"numpy", "sacrebleu", "scipy", "sklearn"}),
    "distributed": (CORE | {"models"}, CORE_OUTSIDE),
    "checkpoints": (CORE | {"models", "distributed", "data.json_files"}, CORE_OUTSIDE | HEAVY),
    "interop": (
        CORE | {"models", "distributed", "checkpoints", "data.json_files"},
        CORE_OUTSIDE | HEAVY | {"torch", "gguf"},
    ),
    "generation": (CORE | {"models"}, CORE_OUTSIDE | {"flax", "jaxtyping", "tokenizers", "tqdm"}),
    "training": (
        CORE | {"models", "data", "metrics", "distributed", "checkpoints", "interop", "generation"},
        CORE_OUTSIDE | HEAVY | {"tqdm", "tensorboardX", "matplotlib", "ml_collections", "jaxtyping"},
    ),
}
LAYERS["analysis"] = (CORE, CORE_OUTSIDE)
LAYERS["planning"] = (CORE | {"models", "distributed", "checkpoints", "training", "data.json_files"}, CORE_OUTSIDE)
LAYERS["runs"] = (LAYERS["training"][0] | {"training", "planning"}, LAYERS["training"][1])
SHORT = {"sharding": "distributed.sharding", "arithmetic": "methods.arithmetic"}  # names that stay importable


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


@functools.cache
def imports(file: Path) -> set[str]:
    """The dotted names of all that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(file: Path) -> str:
    """`lora_jax/core/lifting/taps.py` -> `core.lifting.taps`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


PYTHON = sorted(PACKAGE.rglob("*.py"))


def stands_before(module: str) -> set[str]:
    """What a module of the core, or of the methods, may import of the package."""
    place = next(n for n, name in enumerate(CORE_ORDER) if f"{module}.".startswith(f"{name}."))
    return {*CORE_ORDER[: place + 1]}


@pytest.mark.parametrize("file", PYTHON, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_layer_imports_only_what_stands_below_it(file):
    module = module_of(file)
    layer = module.split(".")[0]
    if module in ("__init__", "core", "core.lifting") or module in SHORT:
        inside, outside = CORE | {"models", "distributed"}, {"jax"}
    elif layer in CORE:
        inside, outside = stands_before(module), CORE_OUTSIDE
    else:
        inside, outside = LAYERS[layer]
        inside = inside | {layer}
    for name in imports(file):
        top, _, rest = name.partition(".")
        if top == "lora_jax":
            public = rest in lora_jax.__all__ and inside >= CORE
            assert not rest or public or any(f"{rest}.".startswith(f"{allowed}.") for allowed in inside), name
        else:
            assert top in outside | sys.stdlib_module_names, name


def test_nothing_imports_experiments_or_configs():
    for file in texts(".py"):
        if file.relative_to(ROOT).parts[0] == "lora_jax":
            assert not {n.split(".")[0] for n in imports(file)} & {"experiments", "configs"}, file


def test_no_test_imports_another():
    """What two of them need stands in tests/helpers."""
    tests = {file.stem for file in texts(".py") if file.name.startswith("test_")}
    for file in texts(".py"):
        if file.name == "make.py":  # of the fixtures: it writes what test_old_files reads
            continue
        assert not {part for name in imports(file) for part in name.split(".")} & tests, file


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


def test_the_mutants_stand_in_their_files():
    """Each wrong line of tests/mutants.json has its place in today's code, and its tests are there."""
    mutants = json.loads((ROOT / "tests/mutants.json").read_text())
    assert len(mutants) >= 120
    assert {mutant["area"] for mutant in mutants} >= {
        *("core", "methods", "training", "checkpoints", "distributed", "interop", "generation")
    }
    lines = [(mutant["file"], mutant["old"], mutant["new"]) for mutant in mutants]
    assert len(set(lines)) == len(lines)
    for file, old, new in lines:
        assert (ROOT / file).read_text().count(old) == 1, f"{file}: {old!r}"
        assert new != old, f"{file}: {old!r}"
    for name in (name for mutant in mutants for name in mutant["tests"]):
        file, _, test = name.partition("::")
        function = re.compile(rf"^def {re.escape(test.partition('[')[0])}\(", re.MULTILINE)
        assert function.search((ROOT / file).read_text()), name


def code_lines(file: Path) -> int:
    """The lines of a module that are neither blank, nor comments, nor docstrings."""
    source = file.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node, clean=False)
    ]
    docstring_lines = {n for node in docstrings for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = enumerate(map(str.strip, source.splitlines()), 1)
    return sum(bool(line) and line[0] != "#" and n not in docstring_lines for n, line in lines)


def test_the_core_is_small():
    """Without the methods, and without the lists of names in __init__.py."""
    files = [file for file in (PACKAGE / "core").rglob("*.py") if file.name != "__init__.py"]
    assert sum(map(code_lines, files)) < 1600


def test_no_text_names_a_machine():
    machine_path = re.compile("/(work|root|home|tmp/w)/")
    for file in texts(".py", ".md", ".toml", ".ipynb", ".json", ".sh", ""):
        if file.name != "LICENSE":
            assert not machine_path.search(file.read_text()), file


def test_the_locked_versions_are_those_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (extra for name, extra in project["optional-dependencies"].items() if name not in ("cuda", "tpu"))
    asked = [Requirement(line) for line in itertools.chain(project["dependencies"], *extras)]
    locked = (Requirement(line) for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines())
    versions = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in locked}
    apart = ("jax", "lora-jax")  # the Makefile names the one, and installs the other from here
    wanted = {canonicalize_name(r.name): r.specifier for r in asked if canonicalize_name(r.name) not in apart}
    missing = {name for name, bounds in wanted.items() if not bounds.contains(versions.get(name, "0"))}
    assert not missing, f"{missing}: `make lock` writes tests/constraints.txt anew"


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
    for _ in range(2):  # in turns: what else the machine does falls on both
        plain.append(seconds("import jax, optax"))
        ours.append(seconds("import lora_jax"))
    assert min(ours) < 1.5 * min(plain)
