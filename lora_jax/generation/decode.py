"""`generate`: from prompts to new tokens, compiled once for each shape of the prompts."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Int

from lora_jax.generation import beams, single
from lora_jax.models.family import dimensions_of

BEAM_RULES = ("hf", "lora_paper")


def generate(
    model: Any,
    params: Any,
    tokens: Any,
    mask: Any,
    *,
    max_new_tokens: int,
    eos: int | Sequence[int],
    pad: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    early_stopping: bool | str = False,
    beam_rule: str = "hf",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
) -> Int[Array, "batch new"]:
    """New tokens behind each prompt: the most likely next one each time, by beam search, or drawn at random.

    Args:
      model: of a family that generates text (GPT-2).
      params: its parameters: plain, adapted (`method.apply(params, delta)`) or merged.
      tokens: (batch, length) int32, the prompts, padded on the left.
      mask: (batch, length) bool or int, 1 at non-padding tokens.
      max_new_tokens: the most tokens to add, at least 1.
      eos: an end token, or several. The one met is part of the result.
      pad: follows it.
      num_beams: beams of a beam search; 1 is greedy.
      length_penalty: a finished beam scores log p / length^length_penalty, its length being that of
        the new tokens with the end token.
      no_repeat_ngram_size: no n-gram of this size occurs twice; 0 allows all. As in transformers the
        prompt counts, padding included; by the authors' rule the new tokens alone count.
      early_stopping: of the rule "hf" alone. True: a prompt is done as soon as it has `num_beams` finished
        beams; False: when its best running beam, were it to end now, scores below the worst of
        them; "never": when it does so at its best possible length.
      beam_rule: "hf", the search of transformers, token for token; or "lora_paper", that of the LoRA
        authors (microsoft/LoRA, examples/NLG/src/gpt2_beam.py): exactly `num_beams` candidates a
        step, the ended ones among them leave the beam, the best ended one wins unless a beam
        that never ended scores better at the full length; probabilities are normalised after
        the n-gram bans.
      temperature: sampling: divides the logits, above 0.
      top_k: sampling: among the k most likely tokens only.
      top_p: sampling: among the most likely tokens that together reach this probability, in (0, 1].
      key: the key of sampling, which the three before ask for.

    Returns:
      (batch, max_new_tokens) int32, the new tokens only.

    Raises:
      ValueError: prompts and new tokens exceed the model's positions; the padding is not on the
        left; eos or pad is not in the vocabulary; more beams than the vocabulary has tokens;
        options that do not go together or are out of their range; the logits are NaN.
    """
    tokens, mask = _array(tokens, np.int32), _array(mask, bool)
    ends = np.atleast_1d(np.asarray(eos, np.int32))
    _check_prompts(model, tokens, mask, max_new_tokens, ends.tolist(), pad)
    sampled = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    _check_options(model.config.vocab_size, num_beams, no_repeat_ngram_size, key, sampled)
    _check_beams(model.config.vocab_size, num_beams, len(ends), length_penalty, early_stopping, beam_rule)
    common = (model, params, tokens, mask, ends, np.int32(pad))
    if num_beams > 1:
        new, has_nan = beams.search(
            *common,
            np.float32(length_penalty),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            no_repeat=no_repeat_ngram_size,
            early_stopping="never" if early_stopping == "never" else bool(early_stopping),
            rule=beam_rule,
        )
    else:
        heat = None if key is None else np.float32(1.0 if temperature is None else temperature)
        nucleus = None if top_p in (None, 1) else np.float32(top_p)
        new, has_nan = single.extend(
            *common, key, heat, nucleus, max_new_tokens=max_new_tokens, no_repeat=no_repeat_ngram_size, top_k=top_k
        )
    if not isinstance(has_nan, jax.core.Tracer) and np.asarray(has_nan).any():
        rows = np.flatnonzero(has_nan).tolist()
        raise ValueError(f"the model's logits are NaN for prompts {rows} (counted from 0): look at the parameters")
    return new


def _array(x: Any, dtype: Any) -> Any:
    # numpy, not jax.numpy, which would compile a conversion for each shape
    return x if isinstance(x, jax.Array) else np.asarray(x, dtype)


def _check_prompts(model: Any, tokens: Any, mask: Any, max_new_tokens: int, ends: list[int], pad: int) -> None:
    if np.ndim(tokens) != 2 or np.shape(tokens) != np.shape(mask):
        raise ValueError(f"tokens {np.shape(tokens)} and mask {np.shape(mask)}: both must be (batch, length)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: at least 1")
    length, config = np.shape(tokens)[1], model.config
    if length + max_new_tokens > (most := dimensions_of(model).max_length):
        raise ValueError(
            f"prompts of {length} tokens and max_new_tokens={max_new_tokens} need "
            f"{length + max_new_tokens} positions, the model has {most}"
        )
    if outside := [i for i in (*ends, pad) if not 0 <= i < config.vocab_size]:
        raise ValueError(f"eos={ends}, pad={pad}: {outside[0]} is not in the vocabulary of {config.vocab_size}")
    if isinstance(mask, jax.core.Tracer):
        return
    keep = np.asarray(mask, bool)
    if not keep[:, -1].all() or (keep[:, :-1] & ~keep[:, 1:]).any():
        raise ValueError("mask: prompts must be padded on the left and hold a token at least")


def _check_beams(
    vocab_size: int, num_beams: int, ends: int, length_penalty: float, early_stopping: bool | str, beam_rule: str
) -> None:
    if not 1 <= num_beams <= vocab_size:
        raise ValueError(f"num_beams={num_beams}: from 1 to the vocabulary's {vocab_size} tokens")
    if ends >= vocab_size:
        raise ValueError(f"{ends} end tokens leave none of the vocabulary's {vocab_size} to go on with")
    if not np.isfinite(length_penalty):
        raise ValueError(f"length_penalty={length_penalty}: a number")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping={early_stopping!r}: True, False or "never"')
    if beam_rule not in BEAM_RULES:
        raise ValueError(f"beam_rule={beam_rule!r}: one of {', '.join(BEAM_RULES)}")


def _check_options(
    vocab_size: int, num_beams: int, no_repeat: int, key: Array | None, sampled: dict[str, float | None]
) -> None:
    given = {name: value for name, value in sampled.items() if value is not None}
    temperature, top_k, top_p = (given.get(name, 1) for name in ("temperature", "top_k", "top_p"))
    if no_repeat < 0:
        raise ValueError(f"no_repeat_ngram_size={no_repeat}: 1 or more, or 0 to allow repetitions")
    if given and key is None:
        raise ValueError(f"{', '.join(given)} are for sampling, which needs a key: key=jax.random.key(0)")
    if key is not None and num_beams > 1:
        raise ValueError(f"num_beams={num_beams} with a key: beam search does not sample")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: above 0; for the most likely token give no key")
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k}: from 1 to the vocabulary's {vocab_size} tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: above 0, at most 1")
