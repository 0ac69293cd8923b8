"""Plain text for pretraining: files -> documents -> one stream of tokens."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data.files import read_text

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
        here = [Path(path)]
        if Path(path).is_dir():
            here = sorted(p for p in Path(path).iterdir() if p.name.endswith((".txt", ".txt.gz")))
        if not here or not all(p.is_file() for p in here):
            raise FileNotFoundError(f"{path}: no text here (a file, or a folder of .txt, .txt.gz)")
        listed += here
    if not listed:
        raise FileNotFoundError("no text files were named")
    return listed


def documents(path: str | Path) -> list[str]:
    """The documents of a file: parted by lines of `<|endoftext|>` alone, or by blank lines where
    there is no such line."""
    text = read_text(path).replace("\r\n", "\n")
    between = rf"^{re.escape(END)}$" if re.search(rf"^{re.escape(END)}$", text, re.M) else r"\n\s*\n"
    parts = (part.strip() for part in re.split(between, text, flags=re.M))
    return [part for part in parts if part]


def encode(paths: Iterable[str | Path], tokenizer: Tokenizer, *, eos: int) -> np.ndarray:
    """All documents as one stream (total,) int32: eos, document, eos, document, ...

    Raises:
      ValueError: a file is empty; eos is no token of the tokenizer.
    """
    if tokenizer.id_to_token(eos) is None:
        raise ValueError(f"eos={eos} is no token of the tokenizer, which has {tokenizer.get_vocab_size()}")
    parts: list[np.ndarray] = []
    for path in paths:
        for encoding in tokenizer.encode_batch_fast(documents(path), add_special_tokens=False):
            parts.append(np.array([eos, *encoding.ids], np.int32))
    return np.concatenate(parts)


def train_tokenizer(paths: Iterable[str | Path], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer in GPT-2's manner, learnt from files, with `<|endoftext|>` as
    token 0.

    Args:
      vocab_size: the tokens in all: 257 (the bytes and the end) or more; fewer come out where
          the text is too short for so many.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: the 256 bytes and the end of text need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_all_documents(paths), trainer)
    return tokenizer


def _all_documents(paths: Iterable[str | Path]) -> Iterator[str]:
    for path in paths:
        yield from documents(path)
