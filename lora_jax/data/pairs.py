"""Pairs of a context and a completion: the form of all the paper's generation tasks.

The data are `datasets.Dataset`s with two string columns, `context` and `completion`. Tokens, separator and loss mask
are those of the authors' GPT-2 code (microsoft/LoRA, examples/NLG).
"""

import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data.encoded import Encoded
from lora_jax.data.tokenizing import column, encodings, plain

with extra("data"):
    import datasets
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)


def prompts(
    contexts: Sequence[str], tokenizer: Tokenizer, *, eos: int, before: Sequence[int] = (), after: Sequence[int] = ()
) -> list[list[int]]:
    """What a model continues to describe each context: the context's tokens and the separator, with the ids of a prefix
    `before` and of an infix `after` them. A context is text: `<|endoftext|>` in it is ordinary characters."""
    return list(_prompts(contexts, tokenizer, eos, before, after))


def _prompts(
    contexts: Iterable[str], tokenizer: Tokenizer, eos: int, before: Sequence[int], after: Sequence[int]
) -> Iterator[list[int]]:
    check_eos(tokenizer, eos)
    for encoding in encodings(contexts, plain(tokenizer)):
        yield [*before, *encoding.ids, eos, *after]


def encode(
    examples: datasets.Dataset,
    tokenizer: Tokenizer,
    *,
    eos: int,
    length: int,
    long: str = "skip",
    before: Sequence[int] = (),
    after: Sequence[int] = (),
) -> Encoded:
    """Tokens of every example: BPE(context), eos, BPE(" " + completion), eos. Both are text: special tokens that they
    spell out are ordinary characters. The tokenizer stays as it is; truncation and padding of its file do not act.

    Args:
      eos: the token that separates and ends (the model config's `eos_token_id`).
      length: the most tokens that a model may read, its context.
      long: examples longer than that are left out and counted (`"skip"`) or a ValueError (`"error"`). The authors cut
        them.
      before, after: ids of a prefix and an infix (`methods.prefix`), as of `prompts`; they count for the length.

    Raises:
      ValueError: an example is too long (`long="error"`), or every one is; no such token as eos.
    """
    if long not in ("skip", "error"):
        raise ValueError(f'long={long!r}: either "skip" or "error"')
    tokenizer = plain(tokenizer)
    heads = _prompts(column(examples, "context"), tokenizer, eos, before, after)
    tails = encodings((f" {completion}" for completion in column(examples, "completion")), tokenizer)
    tokens, offsets, starts = array("i"), array("q", [0]), array("q")
    too_long: dict[int, int] = {}  # the tokens of the examples that are left out, by their numbers
    for number, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        size = len(head) + len(tail)  # the last eos is not read
        if size > length:
            too_long[number] = size
            continue
        tokens.fromlist([*head, *tail.ids, eos])
        offsets.append(len(tokens))
        starts.append(len(head))
    if too_long and (long == "error" or not starts):
        first, size = next(iter(too_long.items()))
        placeholders = f", {len(before) + len(after)} of them the method's own" if before or after else ""
        raise ValueError(
            f"example {first} (counted from 0) has {size} tokens{placeholders}, {size - length} more than the "
            f"context of {length}, as have {len(too_long)} of {len(examples)} examples: "
            f"{examples[first]['context'][:80]!r}"
        )
    if too_long:
        log.warning("skipped %d of %d examples longer than %d tokens", len(too_long), len(examples), length)
    bounds, first_labels = np.array(offsets, np.int64), np.array(starts, np.int64)
    return Encoded(np.asarray(tokens), bounds, first_labels, skipped=len(too_long))


def contexts(examples: datasets.Dataset) -> dict[str, list[str]]:
    """The distinct contexts in order of appearance, each with all its references in file order."""
    groups: dict[str, list[str]] = {}
    for context, reference in zip(column(examples, "context"), column(examples, "completion"), strict=True):
        groups.setdefault(context, []).append(reference)
    return groups


def clean(text: str) -> str:
    r"""What the authors score of a text, generated or reference (microsoft/LoRA, examples/NLG, gpt2_decode.py): up to
    the end-of-text marker, also one that the model spelt out in ordinary characters, or the first blank line, stripped.

    >>> clean(" A pub .<|endoftext|> B"), clean("A pub .\n\nB")
    ('A pub .', 'A pub .')
    """
    return text.split("<|endoftext|>")[0].split("\n\n")[0].strip()


def normalize(text: str) -> str:
    """Lower-cased, every character that is neither a letter, a digit nor "_" a word of its own, single spaces: how the
    authors write WebNLG's and DART's texts and references before scoring (gpt2_decode.py --tokenize --lower).

    >>> normalize("Aarhus_Airport is  25.0m above sea-level.")
    'aarhus_airport is 25 . 0m above sea - level .'
    """
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))


def check_eos(tokenizer: Tokenizer, eos: int) -> None:
    """A ValueError unless the tokenizer has a token of that id."""
    if tokenizer.id_to_token(eos) is None:
        raise ValueError(f"eos={eos} is no token of the tokenizer, which has {tokenizer.get_vocab_size()}")
