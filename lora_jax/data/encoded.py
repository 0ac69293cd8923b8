"""Tokenized examples, which `lora_jax.data.batches` makes into batches."""

from dataclasses import dataclass

import numpy as np

from lora_jax.core.extras import extra

with extra("data"):
    from jaxtyping import Int, Int32, Num


@dataclass(frozen=True)
class Encoded:
    """N examples as tokens, end to end in one array.

    An example's tokens are context, eos, completion, eos (with a prefix before and an infix after the first eos, if a
    method has such). The last one is a target only, so that a model reads `lengths` of them. Targets are the
    completion and its eos; the first of them is predicted at the separator.

    `offsets`, (N + 1,), says where each example begins in `tokens`; `starts` are the tokens before the completion, the
    context's and the separator; `skipped` is how many examples were too long and are not here.
    """

    tokens: Int32[np.ndarray, " total"]
    offsets: Int[np.ndarray, " bounds"]
    starts: Int[np.ndarray, " bounds-1"]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """The tokens of each example that a model reads."""
        return np.diff(self.offsets) - 1

    @property
    def labels(self) -> Int[np.ndarray, " N"]:
        """The labelled tokens of each example."""
        return np.diff(self.offsets) - self.starts


@dataclass(frozen=True)
class Conversations:
    """N conversations as tokens, end to end in one array, with labels anywhere in them.

    `offsets`, (N + 1,), says where each begins in `tokens`; `targets` are the labels' places in `tokens`, those of
    each conversation from `first_targets`, (N + 1,), on. A conversation ends with a label, which is a target only, so
    that a model reads `lengths` of its tokens. `skipped` is how many were too long and are not here.
    """

    tokens: Int32[np.ndarray, " total"]
    offsets: Int[np.ndarray, " bounds"]
    targets: Int[np.ndarray, " targets"]
    first_targets: Int[np.ndarray, " bounds"]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """The tokens of each conversation that a model reads."""
        return np.diff(self.offsets) - 1

    @property
    def labels(self) -> Int[np.ndarray, " N"]:
        """The labelled tokens of each conversation."""
        return np.diff(self.first_targets)


@dataclass(frozen=True)
class Texts:
    """N examples as tokens, special ones included, end to end in one array.

    `token_types` is 1 for the second sentence of a BERT (with its [SEP]), else 0; `offsets`, (N + 1,), says where each
    example begins in `tokens`; `labels` are int32, or float32 of a regression, zeros where none are known; `truncated`
    is how many examples were cut.
    """

    tokens: Int32[np.ndarray, " total"]
    token_types: Int32[np.ndarray, " total"]
    offsets: Int[np.ndarray, " bounds"]
    labels: Num[np.ndarray, " bounds-1"]
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """The tokens of each example."""
        return np.diff(self.offsets)
