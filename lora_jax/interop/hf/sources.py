"""Where a model is read from: a Hugging Face folder, a name on the Hub, or a GGUF file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from lora_jax.checkpoints import finish_replacing
from lora_jax.core.extras import extra
from lora_jax.interop import packages
from lora_jax.interop.folders import INDEX, WEIGHTS, inside, open_tensors, read_json
from lora_jax.interop.hf.families import Format, format_of
from lora_jax.interop.hf.tokenizer import checked, read_tokenizer
from lora_jax.interop.lazy import Lazy

CHAT_FILES = ("chat_template.jinja", "tokenizer_config.json")


class Source(NamedTuple):
    """An open source: its config is read, its tensors and tokenizer are not."""

    name: str
    format: Format
    fields: dict[str, Any]  # as config.json has them
    has_weights: bool  # whether its tensors are there in one file
    tensors: Callable[[], dict[str, Lazy]]  # by Hugging Face's names, without those that are no parameters
    tokenizer: Callable[[int], Tokenizer | None]  # of the rows of the token embedding


def open_source(path: Path) -> Source:
    """A folder or a GGUF file.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: config.json is damaged or of no known family; see also `gguf.open_file`.
    """
    return _gguf(path) if is_gguf(path) else _folder(path)


def is_gguf(source: str | os.PathLike) -> bool:
    """Whether a source is a GGUF file, by its name; such a folder is a folder."""
    path = Path(source).expanduser()
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def _folder(folder: Path) -> Source:
    finish_replacing(folder)
    fields = read_json(folder / "config.json")
    format = format_of(fields.get("model_type"), str(folder))

    def tokenizer(vocab_size: int) -> Tokenizer | None:
        path = inside(folder, "tokenizer.json")
        return read_tokenizer(path, vocab_size) if path.is_file() else None

    has_weights = (folder / WEIGHTS).is_file()
    return Source(str(folder), format, fields, has_weights, lambda: open_tensors(folder, format.ignored), tokenizer)


def _gguf(path: Path) -> Source:
    from lora_jax.interop import gguf  # slow to import, and seldom needed

    file = gguf.open_file(path)

    def tokenizer(vocab_size: int) -> Tokenizer | None:
        return None if file.tokenizer is None else checked(file.tokenizer, str(path), vocab_size, "the metadata")

    format = format_of(file.fields["model_type"], str(path))
    return Source(str(path), format, file.fields, True, lambda: file.tensors, tokenizer)


def local(source: str | os.PathLike) -> Path:
    """The folder or GGUF file itself, or the one in an installed package ("package:NAME"), or the local copy of a model
    on the Hub."""
    path = packages.file_of(source) if packages.is_package(source) else Path(source).expanduser()
    if path.is_dir() or (path.is_file() and is_gguf(path)):
        return path
    if is_gguf(path):
        raise FileNotFoundError(f"there is no file {path}")
    with extra("hf"):
        import huggingface_hub  # slow to import, and seldom needed
    try:
        wanted = ["config.json", WEIGHTS, INDEX, "model-*.safetensors", "tokenizer.json", *CHAT_FILES]
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:  # of the Hub, the network or the disk: the way out is the same
        raise FileNotFoundError(
            f"there is no folder {source}, and https://huggingface.co/{source} could not be fetched "
            f"({type(error).__name__}); download its config.json, {WEIGHTS} and tokenizer.json and name their folder"
        ) from error
