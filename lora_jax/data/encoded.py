"""Tokenized examples, which `lora_jax.data.batches` makes into batches."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """N examples as tokens, end to end in one array.

    An example's tokens are context, eos, completion, eos (with a prefix before and an infix after the first eos, if a
    method has such). The last one is a target only, so that a model reads `lengths` of them. Targets are the
    completion and its eos; the first of them is predicted at the separator.

    Attributes:
      tokens: (total,) int32.
      offsets: (N + 1,) int64, where each example begins in `tokens`.
      starts: (N,) int64, the tokens before the completion: the context's and the separator.
      skipped: how many examples were too long and are not here.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens that a model reads."""
        return np.diff(self.offsets) - 1

    @property
    def labels(self) -> np.ndarray:
        """(N,) labelled tokens."""
        return np.diff(self.offsets) - self.starts


@dataclass(frozen=True)
class Texts:
    """N examples as tokens, end to end in one array.

    Attributes:
      tokens: (total,) int32, with the special tokens.
      token_types: (total,) int32, 1 for the second sentence of a BERT (with its [SEP]), else 0.
      offsets: (N + 1,) int64, where each example begins in `tokens`.
      labels: (N,) int32, or float32 of a regression; zeros where none are known.
      truncated: how many examples were cut.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens."""
        return np.diff(self.offsets)
