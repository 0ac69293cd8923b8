"""From prompts of any length to cleaned texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from lora_jax.generation.decode import generate

_WIDTH = 16  # prompts are padded to multiples of it: a few shapes, little padding


def complete(
    model: Any,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: int | Sequence[int],
    batch_size: int = 32,
    progress: bool = True,
) -> list[str]:
    """The text that follows each prompt, in the order of the prompts.

    Prompts of about equal length go together, in batches of one fixed shape per length.

    Args:
      model, params: as for `generate`.
      tokenizer: decodes.
      prompts: token ids, for example of `data.pairs.prompts`.
      max_new_tokens: the most tokens of a text.
      eos: the end token, or several (`end_tokens`).
      batch_size: prompts in a batch.
      progress: shows a progress bar.

    Raises:
      ValueError: a prompt is empty or leaves no room for the new tokens.
    """
    room = model.config.n_positions - max_new_tokens
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise ValueError(
                f"prompt {number} (counted from 0) has {len(prompt)} tokens: with max_new_tokens="
                f"{max_new_tokens} the model has room for 1 to {room}"
            )
    widths = np.array([min(-(-len(prompt) // _WIDTH) * _WIDTH, room) for prompt in prompts], int)
    texts = [""] * len(prompts)
    size = min(batch_size, len(prompts))
    with tqdm(total=len(prompts), unit="text", desc="generate", disable=not progress) as bar:
        for width in np.unique(widths):
            rows = np.flatnonzero(widths == width)
            for first in range(0, len(rows), size):
                batch = rows[first : first + size]
                # a short batch repeats its last prompt, so that the shape stays
                filled = np.pad(batch, (0, size - len(batch)), mode="edge")
                tokens, mask = _left_padded([prompts[row] for row in filled], int(width))
                new = np.asarray(generate(model, params, tokens, mask, max_new_tokens=max_new_tokens, eos=eos))
                for row, ids in zip(batch, new, strict=False):
                    texts[row] = clean(ids, tokenizer, eos)
                bar.update(len(batch))
    return texts


def clean(ids: Sequence[int], tokenizer: Tokenizer, eos: int | Sequence[int]) -> str:
    """The text of generated tokens, as the authors clean it (microsoft/LoRA, examples/NLG): up to the first end
    token or blank line, stripped."""
    ends = np.flatnonzero(np.isin(ids, eos))
    kept = ids[: ends[0]] if len(ends) else ids
    text = tokenizer.decode([int(i) for i in kept], skip_special_tokens=False)
    return text.split("<|endoftext|>")[0].split("\n\n")[0].strip()


def end_tokens(tokenizer: Tokenizer, eos: int) -> list[int]:
    """The authors' end tokens: eos, and a blank line where that is one token (GPT-2's 628)."""
    blank = tokenizer.encode("\n\n", add_special_tokens=False).ids
    return [eos, *blank] if len(blank) == 1 else [eos]


def _left_padded(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return tokens, mask
