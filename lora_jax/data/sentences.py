"""Sentences and pairs of sentences with a label: what an encoder reads.

The data are `datasets.Dataset`s with the columns `first`, for pairs `second`, and where known `label`.
"""

import logging
from array import array
from collections.abc import Sequence

import numpy as np

from lora_jax.core.extras import extra
from lora_jax.data.encoded import Texts
from lora_jax.data.tokenizing import column, encodings

with extra("data"):
    import datasets
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)


def encode(
    examples: datasets.Dataset, tokenizer: Tokenizer, *, length: int, labels: int, before: Sequence[int] = ()
) -> Texts:
    """Tokens of every example, as Hugging Face's GLUE scripts make them: the special tokens of the tokenizer's
    post-processor, and what is too long cut token by token at the end of the longer sentence. Sentences are text:
    `<s>`, `[SEP]` or `<mask>` in them are ordinary characters, which those scripts take for the special tokens.

    Args:
      tokenizer: stays as it is; padding and truncation that its file switches on do not act.
      length: the most tokens of an example, special ones included (128 or 512 in the paper's Table 9).
      labels: how many there are, the outputs of the model; 1 for a regression.
      before: ids of a prefix (`methods.prefix`), which stand behind the first special token (the head reads that one)
        and count for the length.

    Raises:
      ValueError: the tokenizer adds no special tokens, the length holds nothing else, or a label is not one of 0 to
        labels - 1.
    """
    pairs = "second" in examples.column_names
    first = column(examples, "first")
    inputs = zip(first, column(examples, "second"), strict=True) if pairs else first
    tokenizer = _truncating(tokenizer, length, pairs, len(before))
    tokens, token_types, offsets, truncated = array("i"), array("i"), array("q", [0]), 0
    zeros = [0] * len(before)
    for encoding in encodings(inputs, tokenizer, add_special_tokens=True):
        ids = encoding.ids
        tokens.fromlist([*ids[:1], *before, *ids[1:]])
        token_types.fromlist([*zeros, *encoding.type_ids])
        offsets.append(len(tokens))
        truncated += bool(encoding.overflowing)
    if truncated:
        log.warning("cut %d of %d examples to %d tokens", truncated, len(examples), length)
    return Texts(
        tokens=np.asarray(tokens),
        token_types=np.asarray(token_types),
        offsets=np.array(offsets, np.int64),
        labels=_labels(examples, labels),
        truncated=truncated,
    )


def _truncating(tokenizer: Tokenizer, length: int, pairs: bool, inserted: int) -> Tokenizer:
    """A copy that cuts at `length`, less what is inserted, and does not pad."""
    special = tokenizer.num_special_tokens_to_add(pairs)
    if not special:
        raise ValueError(
            f"the tokenizer adds no special tokens to {'pairs' if pairs else 'sentences'}, and an encoder needs [CLS] "
            "or <s>: tokenizer.json lacks the post-processor (RobertaProcessing, BertProcessing or TemplateProcessing)"
        )
    if length <= special + inserted:  # the library would then not cut at all
        prefix = f" and {inserted} of a prefix" if inserted else ""
        raise ValueError(f"length={length}: must be more than the {special} special tokens{prefix}")
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.enable_truncation(length - inserted, strategy="longest_first")
    return tokenizer


def _labels(examples: datasets.Dataset, count: int) -> np.ndarray:
    dtype = np.float32 if count == 1 else np.int32
    if "label" not in examples.column_names:
        return np.zeros(len(examples), dtype)
    labels = np.array(examples["label"])
    if count > 1 and (labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= count):
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} ({labels.dtype}): with labels={count} they must be integers "
            f"from 0 to {count - 1}"
        )
    return labels.astype(dtype)
