"""Which model of the Hugging Face Hub a base is, so that others can load it by its name."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.core.extras import extra
from lora_jax.interop import packages
from lora_jax.interop.hf.sources import is_gguf

_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Where a GGUF file may name the repository that it was converted from.
_SOURCES = ("general.source.repo_url", "general.source.url", "general.source.huggingface.repository")
_PARENT = "general.base_model.0.repo_url"


class Origin(NamedTuple):
    """What is known of a base besides its weights; "" where it is not known. An example is in `origin_of`."""

    name: str = ""  # on the Hub, "owner/name"
    said_by: str = ""  # where that name stands, if it is not the source itself
    license: str = ""  # as the base's own files name it, in the Hub's words: "apache-2.0"


def origin_of(source: str | os.PathLike) -> Origin:
    """The origin of a source of `load`, which need not be there; nothing is fetched.

    A package's model is of a table in `interop.packages`, a GGUF file's what its metadata name: the model that it was
    converted from, or the one that it is a quantized copy of. A folder of the Hub's cache has its name in its path.

    >>> from lora_jax.interop import hf
    >>> hf.origin_of("openai-community/gpt2").name
    'openai-community/gpt2'
    """
    if packages.is_package(source):
        origin, name = _of_package(source), str(source).removeprefix(packages.PREFIX)
        repository = packages.REPOSITORIES.get(name)
        return origin._replace(name=repository, said_by="the package's description") if repository else origin
    path = Path(source).expanduser()
    if is_gguf(path):
        return _of_gguf(path)
    if path.is_dir():
        snapshots = path.resolve().parent
        cached = re.fullmatch(r"models--(.+?)--(.+)", snapshots.parent.name) if snapshots.name == "snapshots" else None
        return Origin("/".join(cached.groups()) if cached else "", license=_license(path / "README.md"))
    is_name = _NAME.fullmatch(str(source)) and not path.parent.is_dir()
    return Origin(str(source) if is_name else "")


def _of_package(source: str | os.PathLike) -> Origin:
    try:
        return _of_gguf(packages.file_of(source))
    except FileNotFoundError:
        return Origin()


def _of_gguf(path: Path) -> Origin:
    from lora_jax.interop.gguf.reader import read_contents  # slow to import, and seldom needed

    try:
        metadata = read_contents(path).metadata
    except (OSError, ValueError):  # `load` says what is wrong with it
        return Origin()
    keys = [*_SOURCES]
    if metadata.get("general.base_model.count") == 1 and _text(metadata, "general.quantized_by"):
        keys.append(_PARENT)  # else it may be the model that this one was fine-tuned from
    license = _text(metadata, "general.license")
    for key in keys:
        value = _text(metadata, key)
        name = match[1] if (match := _URL.fullmatch(value)) else value
        if _NAME.fullmatch(name):
            return Origin(name, f"{key} of the file", license)
    return Origin(license=license)


def _text(metadata: Mapping[str, Any], key: str) -> str:
    value = metadata.get(key)
    return value if isinstance(value, str) else ""


def _license(card: Path) -> str:
    """The license in the front matter of a base's card; "" where there is none, or it is said elsewhere ("other")."""
    if not card.is_file():
        return ""
    with extra("hf"):
        from huggingface_hub import metadata_load  # slow to import, and seldom needed
    try:
        license = (metadata_load(card) or {}).get("license")
    except Exception:  # of the file or of YAML: a card may be anything
        return ""
    return license if isinstance(license, str) and license != "other" else ""
