"""Pairs of a context and a completion: the form of all the paper's generation tasks.

The data are `datasets.Dataset`s with two string columns, `context` and `completion`. Tokens, separator and loss mask
are those of the authors' GPT-2 code (microsoft/LoRA, examples/NLG).
"""

import logging
import re
from collections.abc import Sequence

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data.encoded import Encoded

with extra("data"):
    import datasets
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)


def prompts(
    contexts: Sequence[str], tokenizer: Tokenizer, *, eos: int, before: Sequence[int] = (), after: Sequence[int] = ()
) -> list[list[int]]:
    """What a model continues to describe each context: the context's tokens and the separator, with the ids of a prefix
    `before` and of an infix `after` them."""
    check_eos(tokenizer, eos)
    encoded = tokenizer.encode_batch(list(contexts), add_special_tokens=False)
    return [[*before, *encoding.ids, eos, *after] for encoding in encoded]


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
    """Tokens of every example: BPE(context), eos, BPE(" " + completion), eos.

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
    heads = prompts(examples["context"], tokenizer, eos=eos, before=before, after=after)
    spaced = [" " + completion for completion in examples["completion"]]
    tails = [[*e.ids, eos] for e in tokenizer.encode_batch(spaced, add_special_tokens=False)]
    sizes = np.array([len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)], np.int64)
    fits = sizes - 1 <= length
    skipped = int(np.count_nonzero(~fits))
    if skipped and (long == "error" or skipped == len(fits)):
        first = int(fits.argmin())
        size = sizes[first] - 1
        placeholders = f", {len(before) + len(after)} of them the method's own" if before or after else ""
        raise ValueError(
            f"example {first} (counted from 0) has {size} tokens{placeholders}, {size - length} more than the "
            f"context of {length}, as have {skipped} of {len(fits)} examples: {examples[first]['context'][:80]!r}"
        )
    if skipped:
        log.warning("skipped %d of %d examples longer than %d tokens", skipped, len(fits), length)
    kept = [(heads[row], tails[row]) for row in np.flatnonzero(fits)]
    return Encoded(
        tokens=np.array([i for head, tail in kept for i in (*head, *tail)], np.int32),
        offsets=np.concatenate([[0], np.cumsum(sizes[fits])]),
        starts=np.array([len(head) for head, _ in kept], np.int64),
        skipped=skipped,
    )


def contexts(examples: datasets.Dataset) -> dict[str, list[str]]:
    """The distinct contexts in order of appearance, each with all its references in file order."""
    groups: dict[str, list[str]] = {}
    for context, reference in zip(examples["context"], examples["completion"], strict=True):
        groups.setdefault(context, []).append(reference)
    return groups


def clean(text: str) -> str:
    r"""What the authors score of a text, generated or reference (microsoft/LoRA, examples/NLG, gpt2_decode.py): up to
    the end-of-text marker or the first blank line, stripped.

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
