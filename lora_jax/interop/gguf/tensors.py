"""The tensors of a GGUF file by Hugging Face's names and in Hugging Face's order, dequantized when they are read."""

import re
from pathlib import Path

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.interop.gguf.reader import Entry
from lora_jax.interop.lazy import Index, Lazy
from lora_jax.interop.tensor_files import version_of

with extra("hf"):
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

_BACKBONE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    **{f"attn_{name}_norm": f"self_attn.{name}_norm" for name in "qk"},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
}
_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<which>weight|bias)")
_AT_ONCE = 1 << 22  # entries that are dequantized at a time


def hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name of a tensor; the file's own where there is none, which is then no part of the model."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    layer, module, which = match["layer"], match["module"], match["which"]
    if layer is None:
        return f"{_BACKBONE[module]}.{which}" if module in _BACKBONE else name
    modules = _LAYER | (_GEMMA_NORMS if architecture.startswith("gemma") else _NORMS)
    return f"model.layers.{int(layer)}.{modules[module]}.{which}" if module in modules else name


class Tensor:
    """One tensor of the file.

    Args:
      path, name, entry: where it lies.
      heads: where the rows of each of so many heads are pairs of rotary features, (features / 2, 2), as llama.cpp
        stores them for the architecture llama: they are put back as (2, features / 2). 0: they stay.
      minus: what is subtracted from the file's entries.
    """

    def __init__(self, path: Path, name: str, entry: Entry, heads: int = 0, minus: float = 0.0) -> None:
        self.path, self.name, self.entry, self.minus = path, name, entry, minus
        self.version = version_of(path)
        rows = entry.shape[0]
        pairs = np.arange(rows).reshape(heads, -1, 2) if heads and rows % (2 * heads) == 0 else None
        self.order = None if pairs is None else pairs.swapaxes(1, 2).ravel()  # for each row here, that of the file
        self.kind = GGMLQuantizationType[entry.type]

    def lazy(self) -> Lazy:
        """The numbers, float32."""
        return Lazy(f"{self.path}: {self.name}", self.entry.shape, np.dtype("float32"), self._fetch)

    def blocks(self) -> np.ndarray:
        """The bytes as they are quantized in the file, uint8 (rows, bytes of a row)."""
        stored = self._stored()
        return np.array(stored if self.order is None else stored[self.order])

    def _stored(self) -> np.ndarray:
        if version_of(self.path) != self.version:
            raise ValueError(f"{self.path} was changed while it was read: read all of it again")
        rows = int(np.prod(self.entry.shape[:-1]))
        return np.memmap(self.path, np.uint8, "r", self.entry.start, (rows, self.entry.row_bytes))

    def _fetch(self, index: Index) -> np.ndarray:
        """A part, of which only the rows and blocks that it touches are read."""
        if len(index) == 1:  # a vector is one row, of which nothing is worth leaving out
            values = self._numbers(self._stored())[0]
            return (values if self.order is None else values[self.order])[index[0]]
        (rows, columns), stored = index, self._stored()
        per_block, block_bytes = GGML_QUANT_SIZES[self.kind]
        first, last = columns.start // per_block, -(-columns.stop // per_block)
        stored = stored[:, first * block_bytes : last * block_bytes]
        chosen = np.arange(rows.start, rows.stop) if self.order is None else self.order[rows]
        out = np.empty((len(chosen), columns.stop - columns.start), np.float32)
        step = max(1, _AT_ONCE // max(1, self.entry.shape[-1]))
        within = slice(columns.start - first * per_block, columns.stop - first * per_block)
        for start in range(0, len(chosen), step):
            out[start : start + step] = self._numbers(stored[chosen[start : start + step]])[:, within]
        return out

    def _numbers(self, stored: np.ndarray) -> np.ndarray:
        numbers = dequantize(np.ascontiguousarray(stored), self.kind)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{self.path}: {self.name} has entries that are not finite")
        return numbers - np.float32(self.minus) if self.minus else numbers
