"""From prompts of any length to cleaned texts."""

from collections.abc import Container, Iterator, Sequence
from typing import Any, SupportsIndex

import jax
import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from tqdm import tqdm

from lora_jax.generation.decode import generate
from lora_jax.models.family import dimensions_of

Prompts = Sequence[Sequence[SupportsIndex]]  # token ids

_WIDTH = 16  # prompts are padded to multiples of it: a few shapes, little padding


def complete(
    model: Any, params: Any, tokenizer: Tokenizer, prompts: Prompts, *, progress: bool = True, **options: Any
) -> list[str]:
    """The text that follows each prompt, in the order of the prompts; with a progress bar.

    `options` are those of `completions`: `max_new_tokens` and `eos` at least.

    >>> import jax, numpy as np
    >>> from lora_jax.generation import complete, completions
    >>> from lora_jax.models import gpt2
    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "pub": 2}, unk_token="<eos>"))
    >>> model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=3, n_positions=24, n_embd=8, n_layer=1, n_head=2))
    >>> params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 4), "int32"))["params"]
    >>> options = {"max_new_tokens": 4, "eos": 0}
    >>> texts = complete(model, params, tokenizer, [[1, 2], [2, 1, 2]], **options)  # the same, a batch at a time:
    >>> list(completions(model, params, tokenizer, [[1, 2], [2, 1, 2]], **options)) == [dict(enumerate(texts))]
    True
    """
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), unit="text", desc="generate", disable=not progress) as bar:
        for batch in completions(model, params, tokenizer, prompts, **options):
            for row, text in batch.items():
                texts[row] = text
            bar.update(len(batch))
    return texts


def completions(
    model: Any,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    eos: int | Sequence[int] | None,
    batch_size: int = 32,
    done: Container[int] = (),
    paragraphs: bool = False,
    **options: Any,
) -> Iterator[dict[int, str]]:
    """The texts that follow the prompts, a batch at a time: `{number of the prompt: text}`.

    Prompts of about equal length go together, in batches of one fixed shape per length. What is in a batch depends on
    the prompts alone, so a run that resumes another one gives the same texts.

    Args:
      model, params, max_new_tokens, eos: as for `generate`; `end_tokens` are the authors'.
      tokenizer: decodes.
      prompts: token ids, for example of `data.pairs.prompts`.
      batch_size: prompts in a batch.
      paragraphs: a text may have blank lines; else it ends at the first one.
      done: numbers of prompts that have a text already: a batch of these alone is left out.
      options: of `generate`: beams, penalties, sampling (`key` is folded with each batch's first prompt).

    Raises:
      ValueError: a prompt is empty or leaves no room for the new tokens; see also `generate`.

    An example is in `complete`.
    """
    room = dimensions_of(model).max_length - max_new_tokens
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} (counted from 0) is empty: it needs a token at least")
        if len(prompt) > room:
            raise ValueError(
                f"prompt {number} (counted from 0) has {len(prompt)} tokens, {len(prompt) - room} too many: "
                f"with max_new_tokens={max_new_tokens} the model has room for 1 to {room}"
            )
    key = options.pop("key", None)
    for rows, tokens, mask in batches_of(prompts, batch_size, room):
        if all(row in done for row in rows):
            continue
        batch_key = None if key is None else jax.random.fold_in(key, rows[0])
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos": eos, "key": batch_key}
        new = np.asarray(generate(model, params, tokens, mask, **limits, **options))
        yield {row: clean(ids, tokenizer, eos, paragraphs) for row, ids in zip(rows, new, strict=False)}


def batches_of(
    prompts: Prompts, batch_size: int, room: int
) -> Iterator[tuple[list[int], Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]]:
    """The prompts by length in batches of few shapes: their numbers, and tokens and mask (batch, length).

    Padded on the left to multiples of 16, at most `room`. A short batch, the first, repeats its last prompt, so that
    the shape stays: it has more rows than numbers.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    widths = np.array([min(-(-len(prompt) // _WIDTH) * _WIDTH, room) for prompt in prompts], int)
    size = min(batch_size, len(prompts))
    order = np.argsort(widths, kind="stable")
    for batch in np.split(order, range(len(order) % size or size, len(order), size)) if size else ():
        filled = np.pad(batch, (0, size - len(batch)), mode="edge")
        tokens = np.zeros((size, widths[batch[-1]]), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, number in enumerate(filled):
            start = tokens.shape[1] - len(prompts[number])
            tokens[row, start:], mask[row, start:] = prompts[number], True
        yield batch.tolist(), tokens, mask


def clean(
    ids: Sequence[int] | Int[np.ndarray, " length"],
    tokenizer: Tokenizer,
    eos: int | Sequence[int] | None,
    paragraphs: bool = False,
) -> str:
    """The text of generated tokens, as the authors clean it (microsoft/LoRA, examples/NLG): up to the first end
    token or blank line, stripped. With `paragraphs` blank lines are part of it.

    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "pub": 2}, unk_token="<eos>"))
    >>> clean([1, 2, 0, 1], tokenizer, eos=0)
    'a pub'
    """
    ends = np.flatnonzero(np.isin(ids, [] if eos is None else eos))
    kept = ids[: ends[0]] if len(ends) else ids
    text = tokenizer.decode([int(i) for i in kept], skip_special_tokens=False)
    return text.strip() if paragraphs else text.split("<|endoftext|>")[0].split("\n\n")[0].strip()


def end_tokens(tokenizer: Tokenizer, eos: int) -> list[int]:
    """The authors' end tokens: eos, and a blank line where that is one token (GPT-2's 628).

    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "\\n\\n": 1}, unk_token="<eos>"))
    >>> end_tokens(tokenizer, eos=0)
    [0, 1]
    """
    encoding = tokenizer.encode("\n\n", add_special_tokens=False)
    # Without the padding, and nothing cut, that the tokenizer's file may ask for.
    blank = [i for i, mask in zip(encoding.ids, encoding.attention_mask, strict=True) if mask]
    return [eos, *blank] if len(blank) == 1 and not encoding.overflowing else [eos]
