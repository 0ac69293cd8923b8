"""Plain text for pretraining: files -> documents -> one stream of tokens."""

import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data.files import read_text
from lora_jax.data.pairs import check_eos
from lora_jax.data.tokenizing import encodings, plain

with extra("data"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"


def files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The text files named: those given, and those of a folder (`*.txt`, `*.txt.gz`) by name.

    Raises:
      FileNotFoundError: one does not exist, or a folder holds no text.
    """
    listed: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        inside = sorted(Path(path).glob("*")) if Path(path).is_dir() else []
        of_path = [p for p in inside if p.name.endswith((".txt", ".txt.gz"))] if inside else [Path(path)]
        if not of_path or not all(p.is_file() for p in of_path):
            raise FileNotFoundError(f"{path}: no text here (a file, or a folder of .txt, .txt.gz)")
        listed += of_path
    if not listed:
        raise FileNotFoundError("no text files were named")
    return listed


def documents(path: str | Path) -> list[str]:
    """The documents of a file: parted by lines of `<|endoftext|>` alone, or by blank lines where there is none."""
    text = read_text(path).replace("\r\n", "\n")
    between = rf"^{re.escape(END)}$" if re.search(rf"^{re.escape(END)}$", text, re.M) else r"\n\s*\n"
    parts = (part.strip() for part in re.split(between, text, flags=re.M))
    return [part for part in parts if part]


def encode(paths: Iterable[str | Path], tokenizer: Tokenizer, *, eos: int) -> np.ndarray:
    """All documents as one stream (total,) int32: eos, document, eos, document, ... Inside a line `<|endoftext|>` is
    text, and so ordinary characters.

    Raises:
      ValueError: a file is empty; eos is no token of the tokenizer.
    """
    check_eos(tokenizer, eos)
    tokens = array("i")
    for document in encodings((document for path in paths for document in documents(path)), plain(tokenizer)):
        tokens.fromlist([eos, *document.ids])
    return np.asarray(tokens)


def train_tokenizer(paths: Iterable[str | Path], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer in GPT-2's manner, learnt from files, with `<|endoftext|>` as token 0.

    `vocab_size`, 257 (the bytes and the end) or more, counts all tokens; fewer come out where the text is too short.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: the 256 bytes and the end of text need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document for path in paths for document in documents(path)), trainer)
    return tokenizer
