"""`generate`: from prompts to new tokens, compiled once for each shape of the prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from lora_jax.core.transforms import Delta
from lora_jax.generation import beam_rules, beams, single
from lora_jax.methods.arguments import brief
from lora_jax.models.family import dimensions_of


@brief
def generate(
    model: Any,
    params: Any,
    tokens: Any,
    mask: Any,
    *,
    max_new_tokens: int,
    eos: int | Sequence[int] | None,
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
      tokens, mask: (batch, length), the prompts, padded on the left, and 1 or True at non-padding tokens. No prompts
        have no new tokens.
      max_new_tokens: the most tokens to add, at least 1.
      eos: an end token, or several; None: every text has all its new tokens. The one met is part of the result; `pad`
        follows it.
      num_beams: beams of a beam search; 1 is greedy.
      length_penalty: a finished beam scores log p / length^length_penalty, its length being that of the new tokens
        with the end token.
      no_repeat_ngram_size: no n-gram of this size occurs twice; 0 allows all. As in transformers the prompt counts,
        padding included; by the authors' rule the new tokens alone count.
      early_stopping: of the rule "hf" alone. True: a prompt is done as soon as it has `num_beams` finished beams;
        False: when its best running beam, were it to end now, scores below the worst of them; "never": when it does
        so at its best possible length.
      beam_rule: "hf", the search of transformers, token for token; or "lora_paper", that of the LoRA authors
        (microsoft/LoRA, examples/NLG/src/gpt2_beam.py): exactly `num_beams` candidates a step, the ended ones among
        them leave the beam, the best ended one wins unless a beam that never ended scores better at the full length;
        probabilities are normalised after the n-gram bans.
      temperature, top_k, top_p: sampling: divides the logits, above 0; among the k most likely tokens only; among the
        most likely tokens that together reach this probability, in (0, 1].
      key: the key of sampling, which the three before ask for.

    Returns:
      (batch, max_new_tokens) int32, the new tokens only.

    Raises:
      ValueError: prompts and new tokens exceed the model's positions; a prompt is empty; the padding is not on the
        left; eos or pad is not in the vocabulary; more beams than the vocabulary has tokens; options that do not go
        together or are out of their range; the logits are NaN.

    >>> from lora_jax.generation import generate
    >>> from lora_jax.models import gpt2
    >>> model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    >>> tokens = jnp.ones((2, 4), jnp.int32)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> generate(model, params, tokens, jnp.ones((2, 4), bool), max_new_tokens=3, eos=0).shape
    (2, 3)
    """
    if isinstance(params, Delta):
        raise TypeError("generate takes params, adapted ones by method.apply(params, delta), not the Delta alone")
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        raise TypeError("generate takes the params alone: of Flax variables give variables['params']")
    # numpy, not jax.numpy, which would compile a conversion for each shape
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens, np.int32)
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask, bool)
    if np.shape(tokens) == np.shape(mask) == (0,):
        tokens, mask = tokens[:, None], mask[:, None]
    ends = np.atleast_1d(np.asarray([] if eos is None else eos, np.int32))
    _check_prompts(model, tokens, mask, max_new_tokens, ends.tolist(), pad)
    sampled = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    _check_options(model.config.vocab_size, num_beams, no_repeat_ngram_size, len(ends), key, sampled)
    _check(
        (np.isfinite(length_penalty), f"length_penalty={length_penalty}: a number"),
        (early_stopping in (True, False, "never"), f'early_stopping={early_stopping!r}: True, False or "never"'),
        (beam_rule in beam_rules.RULES, f"beam_rule={beam_rule!r}: one of {', '.join(beam_rules.RULES)}"),
    )
    if not len(tokens):
        return jnp.zeros((0, max_new_tokens), jnp.int32)
    common = (model, params, tokens, mask, ends, np.int32(pad))
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "no_repeat": no_repeat_ngram_size}
    if num_beams > 1:
        early = "never" if early_stopping == "never" else bool(early_stopping)
        limits |= {"num_beams": num_beams, "early_stopping": early, "rule": beam_rule}
        new, has_nan = beams.search(*common, np.float32(length_penalty), **limits)
    else:
        heat = None if key is None else np.float32(1.0 if temperature is None else temperature)
        nucleus = None if top_p in (None, 1) else np.float32(top_p)
        new, has_nan = single.extend(*common, key, heat, nucleus, top_k=top_k, **limits)
    if not isinstance(has_nan, jax.core.Tracer) and np.asarray(has_nan).any():
        rows = np.flatnonzero(has_nan).tolist()
        raise ValueError(f"the model's logits are NaN for prompts {rows} (counted from 0): look at the parameters")
    return new


def _check(*checks: tuple[Any, str]) -> None:
    """A ValueError with the message of the first check that is false."""
    for passed, message in checks:
        if not passed:
            raise ValueError(message)


def _check_prompts(model: Any, tokens: Any, mask: Any, max_new_tokens: int, ends: list[int], pad: int) -> None:
    shape, of_mask = np.shape(tokens), np.shape(mask)
    _check((len(shape) == 2 and shape == of_mask, f"tokens {shape} and mask {of_mask}: both must be (batch, length)"))
    length, most, vocabulary = shape[1], dimensions_of(model).max_length, model.config.vocab_size
    new = f"max_new_tokens={max_new_tokens}"
    needed = f"prompts of {length} tokens and {new} need {length + max_new_tokens} positions, the model has {most}"
    outside = next((i for i in (*ends, pad) if not 0 <= i < vocabulary), None)
    _check(
        (length or not shape[0], f"tokens {shape}: the prompts are empty, each needs a token at least"),
        (max_new_tokens >= 1, f"{new}: at least 1"),
        (length + max_new_tokens <= most, needed),
        (outside is None, f"eos={ends}, pad={pad}: {outside} is not in the vocabulary of {vocabulary}"),
    )
    if shape[0] and not isinstance(mask, jax.core.Tracer):
        keep = np.asarray(mask, bool)
        padded_left = keep[:, -1].all() and (keep[:, 1:] | ~keep[:, :-1]).all()
        _check((padded_left, "mask: prompts must be padded on the left and hold a token at least"))


def _check_options(
    vocab_size: int, num_beams: int, no_repeat: int, ends: int, key: Array | None, sampled: dict[str, float | None]
) -> None:
    given = {name: value for name, value in sampled.items() if value is not None}
    temperature, top_k, top_p = (given.get(name, 1) for name in ("temperature", "top_k", "top_p"))
    needs_key = f"{', '.join(given)} are for sampling, which needs a key: key=jax.random.key(0)"
    _check(
        (no_repeat >= 0, f"no_repeat_ngram_size={no_repeat}: 1 or more, or 0 to allow repetitions"),
        (key is not None or not given, needs_key),
        (key is None or num_beams <= 1, f"num_beams={num_beams} with a key: beam search does not sample"),
        (temperature > 0, f"temperature={temperature}: above 0; for the most likely token give no key"),
        (1 <= top_k <= vocab_size, f"top_k={top_k}: from 1 to the vocabulary's {vocab_size} tokens"),
        (0 < top_p <= 1, f"top_p={top_p}: above 0, at most 1"),
        (1 <= num_beams <= vocab_size, f"num_beams={num_beams}: from 1 to the vocabulary's {vocab_size} tokens"),
        (ends < vocab_size, f"{ends} end tokens leave none of the vocabulary's {vocab_size} to go on with"),
    )
