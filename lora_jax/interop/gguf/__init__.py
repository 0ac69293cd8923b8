"""GGUF files, llama.cpp's form of a model in one file: config, tensors, tokenizer and chat template.

`interop.hf.load("model.gguf")` loads one as it loads a folder. `open_file` shows what is in it.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lora_jax.interop.gguf import config
from lora_jax.interop.gguf import tokenizer as tokenizers
from lora_jax.interop.gguf.reader import TYPES, Contents, read_contents
from lora_jax.interop.gguf.tensors import Tensor, hf_name
from lora_jax.interop.lazy import Lazy

PRE = tokenizers.PRE

__all__ = ["GGUF", "PRE", "TYPES", "open_file"]


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An open file: its header is read, its tensors are not.

    Attributes:
      path: of the file.
      metadata: as it stands in the file; arrays of numbers are numpy arrays.
      fields: what the config.json of the same model says.

    An example is in `open_file`.
    """

    path: Path
    metadata: dict[str, Any]
    fields: dict[str, Any]
    _tensors: dict[str, Tensor]  # by Hugging Face's names

    @property
    def tensors(self) -> dict[str, Lazy]:
        """The tensors by Hugging Face's names and in Hugging Face's order; they are read as float32."""
        return {name: tensor.lazy() for name, tensor in self._tensors.items()}

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """The type of a tensor, one of TYPES, and its bytes as in the file: uint8 (rows, bytes of a row), the rows in
        Hugging Face's order. The last axis is in blocks, of `gguf.GGML_QUANT_SIZES`. Norms of Gemma are 1 + w."""
        tensor = self._tensors[name]
        return tensor.entry.type, tensor.blocks()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the metadata describes; None where there is none. A ValueError where it is of a kind that
        is not supported, or damaged."""
        return tokenizers.tokenizer_of(self.metadata, self.path)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokens named bos_token, eos_token, unk_token and pad_token, of those that the file names."""
        return tokenizers.special_tokens(self.metadata, self.path)

    @property
    def chat_template(self) -> str | None:
        """The jinja template of a conversation, which is not executed here; None where there is none."""
        template = self.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{self.path}: tokenizer.chat_template is {repr(template)[:80]}, not a text")
        return template


def open_file(path: str | os.PathLike) -> GGUF:
    """A file of architecture llama, qwen2, qwen3, gemma2 or gemma3.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no GGUF file, cut off or damaged, of another architecture, has a tensor of another type than
        TYPES, or says something of the model that is not supported.

    >>> import gguf as writing, numpy as np, tempfile
    >>> from pathlib import Path
    >>> from lora_jax.interop import gguf, hf
    >>> sizes = {"context_length": 16, "embedding_length": 8, "feed_forward_length": 8, "block_count": 1}
    >>> sizes |= {"attention.head_count": 2, "vocab_size": 8}
    >>> names = ["token_embd", "output_norm", *(f"blk.0.{n}" for n in ("attn_norm", "ffn_norm", "attn_q", "attn_k"))]
    >>> names += [f"blk.0.{name}" for name in ("attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "tiny.gguf")
    ...     writer = writing.GGUFWriter(file, "llama")
    ...     for name, size in sizes.items():
    ...         writer.add_uint32(f"llama.{name}", size)
    ...     writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    ...     for name in names:
    ...         writer.add_tensor(f"{name}.weight", np.ones((8,) if "norm" in name else (8, 8), np.float32))
    ...     writer.write_header_to_file()
    ...     writer.write_kv_data_to_file()
    ...     writer.write_tensors_to_file()
    ...     writer.close()
    ...     opened, (model, params, tokenizer) = gguf.open_file(file), hf.load(file)
    ...     blocks = hf.blocks(file, model)
    >>> opened.fields["model_type"], len(opened.tensors), model.config.hidden
    ('llama', 11, 8)
    >>> blocks["h_0/mlp/up/kernel"][0]
    'F32'
    """
    path = Path(path)
    contents = read_contents(path)
    fields = config.fields_of(contents, path, lambda name: _tensor(path, contents, name).lazy().read())
    tensors: dict[str, Tensor] = {}
    for name in contents.tensors:
        theirs = hf_name(name, contents.metadata["general.architecture"])
        if theirs in tensors:
            raise ValueError(f"{path}: {name} and {tensors[theirs].name} are both {theirs}")
        if name != config.ROPE_FACTORS:
            tensors[theirs] = _tensor(path, contents, name, fields)
    return GGUF(path, contents.metadata, fields, tensors)


def _tensor(path: Path, contents: Contents, name: str, fields: dict[str, Any] | None = None) -> Tensor:
    """A tensor, with what llama.cpp's converter did to it taken back: in the architecture llama it paired the rows of
    queries and keys, in Gemma it added 1 to the norms."""
    entry = contents.tensors[name]
    architecture = contents.metadata["general.architecture"]
    if fields is not None and architecture == "llama" and ".attn_q." in name:
        return Tensor(path, name, entry, heads=fields["num_attention_heads"])
    if fields is not None and architecture == "llama" and ".attn_k." in name:
        return Tensor(path, name, entry, heads=fields["num_key_value_heads"])
    return Tensor(path, name, entry, minus=float(architecture.startswith("gemma") and name.endswith("norm.weight")))
