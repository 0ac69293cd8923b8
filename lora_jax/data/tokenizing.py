"""Texts to token ids, a piece of them at a time.

A text is text, whatever it holds: `<|endoftext|>`, `<s>` or `[SEP]` in it are encoded as ordinary characters (as by
transformers with `split_special_tokens=True`), and only this library puts special tokens where they belong. What a
tokenizer's file says of truncation and padding does not act.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from lora_jax.core.extras import extra

with extra("data"):
    import datasets
    from tokenizers import Encoding, Tokenizer

# Texts in the tokenizer's own form at a time, which takes a hundred times the memory of the tokens.
_MOST_TEXTS, _MOST_CHARACTERS = 8192, 1 << 20


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that takes special tokens in texts as ordinary characters, and neither cuts nor pads: the given one
    where it is such, else a copy."""
    is_text = tokenizer.encode_special_tokens
    is_text = is_text or not any(token.special for token in tokenizer.get_added_tokens_decoder().values())
    if is_text and tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encodings(texts: Iterable[Any], tokenizer: Tokenizer, *, add_special_tokens: bool = False) -> Iterator[Encoding]:
    """The encoding of each text, or pair of texts; few of them are in memory at once."""
    piece: list[Any] = []
    characters = 0
    for text in texts:
        piece.append(text)
        characters += len(text) if isinstance(text, str) else sum(map(len, text))
        if len(piece) >= _MOST_TEXTS or characters >= _MOST_CHARACTERS:
            yield from tokenizer.encode_batch_fast(piece, add_special_tokens=add_special_tokens)
            piece, characters = [], 0
    yield from tokenizer.encode_batch_fast(piece, add_special_tokens=add_special_tokens)


def column(examples: datasets.Dataset, name: str) -> Iterator[str]:
    """The texts of a column, one after the other."""
    for rows in examples.select_columns(name).iter(_MOST_TEXTS):
        yield from rows[name]
