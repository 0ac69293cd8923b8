"""The chat template and the special tokens of a Hugging Face folder, as transformers reads them, or of a GGUF file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.checkpoints import finish_replacing, write_atomically
from lora_jax.interop.folders import inside, read_json
from lora_jax.interop.hf.sources import CHAT_FILES, is_gguf, local

TEMPLATE, TOKENIZER_CONFIG = CHAT_FILES


def chat_template(source: str | os.PathLike) -> str | None:
    """The chat template of a source, as `load` takes it: of a folder chat_template.jinja, or else what
    tokenizer_config.json has, of several named ones the one called "default"; None where there is none.

    Raises:
      ValueError: the file is no UTF-8, or holds something else than a template.

    An example is in `save_chat`.
    """
    folder = local(source)
    if is_gguf(folder):
        return _opened(folder).chat_template
    file = inside(folder, TEMPLATE)
    if file.is_file():
        try:
            return file.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8: {error}") from error
    template, file = _fields(folder).get("chat_template"), folder / TOKENIZER_CONFIG
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise ValueError(f"{file}: chat_template names {', '.join(map(str, named))}, and no 'default'")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{file}: chat_template is no text but {template!r:.80}")
    return template


def special_tokens(source: str | os.PathLike) -> dict[str, str]:
    """{"bos_token": ..., "eos_token": ..., ...}, the names that templates use, of a folder's tokenizer_config.json ({}
    without that file) or of a GGUF file.

    An example is in `save_chat`.
    """
    folder = local(source)
    if is_gguf(folder):
        return _opened(folder).special_tokens
    fields = {name: x for name, x in _fields(folder).items() if name.endswith("_token") and not name.startswith("add_")}
    texts = {name: x.get("content") if isinstance(x, dict) else x for name, x in fields.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def save_chat(folder: str | os.PathLike, template: str, tokens: Mapping[str, str]) -> None:
    """Writes a template and special tokens into a folder, where this library and transformers read them.

    >>> import tempfile
    >>> from lora_jax.interop import hf
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     hf.save_chat(folder, "{{ messages[0].content }}{{ eos_token }}", {"eos_token": "</s>"})
    ...     hf.chat_template(folder), hf.special_tokens(folder)
    ('{{ messages[0].content }}{{ eos_token }}', {'eos_token': '</s>'})
    """
    write_atomically(Path(folder) / TEMPLATE, template.encode())
    # tokenizer.json says all; by the model's type alone transformers might make another tokenizer of it
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    write_atomically(Path(folder) / TOKENIZER_CONFIG, (json.dumps(fields, indent=2) + "\n").encode())


def _opened(file: Path) -> Any:
    from lora_jax.interop import gguf  # slow to import, and seldom needed

    return gguf.open_file(file)


def _fields(folder: Path) -> dict[str, Any]:
    finish_replacing(folder)
    file = folder / TOKENIZER_CONFIG
    return read_json(file) if file.is_file() else {}
