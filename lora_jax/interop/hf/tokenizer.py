"""tokenizer.json of a Hugging Face folder."""

import os
from pathlib import Path

from tokenizers import Tokenizer


def read_tokenizer(path: str | os.PathLike, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a file, without the truncation and the padding that the file may ask for: they are of one use of
    it, and would cut texts in another without a word (transformers sets them anew at each call).

    Args:
      vocab_size: the rows of the model's token embedding.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no tokenizer, has no tokens or two of one id, or a token's id is not below `vocab_size`.

    >>> import os, tempfile
    >>> from lora_jax.interop import hf
    >>> from tokenizers import Tokenizer, models
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "tokenizer.json")
    ...     Tokenizer(models.WordLevel({"?": 0, "a": 1, "pub": 2}, unk_token="?")).save(file)
    ...     hf.read_tokenizer(file, vocab_size=3).token_to_id("pub")
    2
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        tokenizer = Tokenizer.from_file(os.fspath(path))
        tokenizer.encode("a \N{SNOWMAN}")  # what lacks its token for unknown characters fails only then
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer ({error})") from error
    return checked(tokenizer, os.fspath(path), vocab_size)


def checked(tokenizer: Tokenizer, source: str, vocab_size: int | None = None, config: str = "config.json") -> Tokenizer:
    """`read_tokenizer`'s checks of what is a tokenizer, and without truncation and padding. `config`: what says how
    many rows the embedding has."""
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise ValueError(f"{source} is a tokenizer without tokens")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{source}: two tokens have one id")
    last = max(vocabulary, key=vocabulary.__getitem__)
    if vocab_size is not None and vocabulary[last] >= vocab_size:
        problem = f"{last!r} is token {vocabulary[last]}, but {config} says vocab_size {vocab_size}"
        raise ValueError(f"{source}: {problem}, which is for ids below it")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
