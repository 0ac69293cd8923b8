"""Beam search: against transformers token for token, the authors' rule written as a slow loop, and greedy."""

import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.generation import beams, generate
from lora_jax.generation.beam_rules import top_k
from lora_jax.interop import hf
from lora_jax.models import gpt2

VOCABULARY, POSITIONS = 53, 64
RULES = ("hf", "lora_paper")


class Pair(tuple):
    """Hypothesis prints it where a test fails; all weights would be a warning instead of what is wrong."""

    def __repr__(self) -> str:
        return "pair"


def random_models(folder: Path, layers: int) -> tuple[Any, Any, Any]:
    """A random model of transformers', and the same loaded here."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 16, "n_layer": layers, "n_head": 2}
    config = transformers.GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(folder)
    model, params, _ = hf.load(folder)
    return Pair((theirs, model, params))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """One layer: the search does not depend on the depth, and each setting is compiled."""
    return random_models(tmp_path_factory.mktemp("gpt2"), 1)


def prompts(rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of uneven length, padded on the left with a token that is also a word."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, width + 1, rows)
    mask = np.arange(width) >= width - lengths[:, None]
    return np.where(mask, random.integers(0, VOCABULARY, (rows, width)), 7), mask


def check_against_transformers(pair: tuple[Any, Any, Any], shape: tuple, seed: int, eos: list[int], **how: Any) -> Any:
    theirs, model, params = pair
    rows, width, new = shape
    tokens, mask = prompts(rows, width, seed)
    pad = next(i for i in range(1, VOCABULARY) if i not in eos)
    ours = np.asarray(generate(model, params, tokens, mask, max_new_tokens=new, eos=eos, pad=pad, **how))
    expected = theirs.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=pad,
        **how,
    )[:, width:].numpy()
    assert ours.shape == (rows, new) and ours.dtype == np.int32
    np.testing.assert_array_equal(ours[:, : expected.shape[1]], expected)
    assert (ours[:, expected.shape[1] :] == pad).all()
    return ours


# What is compiled once is drawn from lists, the rest at will.
COMMON = (7, 12, 13, 15, 16, 25, 26, 31)  # this model's favourite tokens: as end tokens they are met
EOS = st.lists(st.sampled_from(COMMON), min_size=2, max_size=2, unique=True)
PENALTIES = st.sampled_from([0.0, 0.8, 1.0, 2.0])


# Each of the 27 is compiled, which takes seconds: three, in which every value occurs, are enough for `make test`.
BEAMS, NGRAMS, STOPS = (2, 4, 10), (0, 2, 4), (True, False, "never")
QUICK = {(2, 2, "never"), (4, 4, True), (10, 0, False)}


@pytest.mark.parametrize(
    ("num_beams", "no_repeat_ngram_size", "early_stopping"),
    [
        pytest.param(*setting, marks=() if setting in QUICK else pytest.mark.slow)
        for setting in itertools.product(BEAMS, NGRAMS, STOPS)
    ],
)
@given(seed=st.integers(0, 999), eos=EOS, length_penalty=PENALTIES)
@settings(max_examples=8)
def test_as_transformers(
    pair: tuple[Any, Any, Any],
    seed: int,
    eos: list[int],
    length_penalty: float,
    num_beams: int,
    no_repeat_ngram_size: int,
    early_stopping: bool | str,
) -> None:
    how: dict[str, Any] = {"num_beams": num_beams, "no_repeat_ngram_size": no_repeat_ngram_size}
    how |= {"early_stopping": early_stopping, "length_penalty": length_penalty}
    check_against_transformers(pair, (3, 6, 9), seed, eos, **how)


@pytest.mark.slow
@given(seed=st.integers(0, 999), eos=EOS, length_penalty=PENALTIES)
@settings(max_examples=12)
def test_a_cache_that_grows(pair: tuple[Any, Any, Any], seed: int, eos: list[int], length_penalty: float) -> None:
    """It begins with room for one step, and is full again and again."""
    grown = []

    def note(state: tuple, length: int) -> tuple:
        grown.append(length)
        return grow(state, length)

    grow = beams._grown
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beams, "_ROOM", 1)  # of this test's shape alone: what is compiled is kept
        patch.setattr(beams, "_grown", note)
        how = {"num_beams": 3, "length_penalty": length_penalty, "no_repeat_ngram_size": 2}
        check_against_transformers(pair, (2, 5, 8), seed, eos, **how)
    assert grown in ([5 + 3, 5 + 6, 5 + 12, 5 + 24], [])  # [] where it was compiled before


@pytest.mark.slow
@given(shape=st.sampled_from([(1, 1, 1), (4, 2, 13), (2, 11, 3)]), seed=st.integers(0, 999), eos=EOS)
@settings(max_examples=9)
def test_other_shapes(pair: tuple[Any, Any, Any], shape: tuple, seed: int, eos: list[int]) -> None:
    check_against_transformers(pair, shape, seed, eos, num_beams=3)


def test_beams_that_finish_early(pair: tuple[Any, Any, Any]) -> None:
    """Of the prompts of one batch some end after a few tokens, others never."""
    lengths = []
    for seed in range(6):
        ends = [COMMON[seed], COMMON[seed + 2]]
        new = check_against_transformers(pair, (3, 6, 9), seed, ends, num_beams=4)
        lengths += [int(np.isin(row, ends).argmax()) for row in new if np.isin(row, ends).any()]
    assert 3 <= len(lengths) < 18 and min(lengths) < 3 < max(lengths)


def authors_search(
    forward: Any, prompt: list[int], new: int, eos: list[int], beam: int, penalty: float, ngram: int
) -> list[int]:
    """The rule of the LoRA authors for one prompt, step by step and without a cache, all `new` steps."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    best: tuple[float, list[int]] = (-math.inf, [])
    for _ in range(new):
        candidates = []
        for score, history in live:
            logits = forward([*prompt, *history]).astype(np.float64)
            start = history[len(history) - ngram + 1 :]
            for i in range(len(history) - ngram + 1) if ngram else ():
                if history[i : i + ngram - 1] == start:
                    logits[history[i + ngram - 1]] = -np.inf
            log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            candidates += [(score + log_p[token], [*history, token]) for token in range(VOCABULARY)]
        candidates.sort(key=lambda pair: -pair[0])
        live = []
        for score, history in candidates[:beam]:
            if history[-1] in eos:
                best = max(best, (score / len(history) ** penalty, history), key=lambda pair: pair[0])
            elif score > -math.inf:
                live.append((score, history))
    for score, history in live:
        best = max(best, (score / len(history) ** penalty, history), key=lambda pair: pair[0])
    return best[1]


@pytest.mark.parametrize("ngram", [0, 1, 2, 4])
@given(seed=st.integers(0, 999), eos=EOS, penalty=st.sampled_from([0.0, 0.8, 0.9, 2.0, -0.5]))
@settings(max_examples=5)
def test_the_authors_rule(pair: tuple[Any, Any, Any], ngram: int, seed: int, eos: list[int], penalty: float) -> None:
    _, model, params = pair
    apply = jax.jit(model.apply)

    def forward(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(apply({"params": params}, padded))[0, len(tokens) - 1]

    tokens, mask = prompts(3, 6, seed)
    how: dict[str, Any] = {"num_beams": 4, "beam_rule": "lora_paper", "no_repeat_ngram_size": ngram}
    generated = generate(model, params, tokens, mask, max_new_tokens=10, eos=eos, pad=0, length_penalty=penalty, **how)
    for row, kept, new in zip(tokens, mask, np.asarray(generated), strict=True):
        expected = authors_search(forward, row[kept].tolist(), 10, eos, 4, penalty, ngram)
        assert new.tolist() == expected + [0] * (10 - len(expected))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ngram", [0, 2])
def test_a_beam_of_one_is_greedy(pair: tuple[Any, Any, Any], rule: str, ngram: int) -> None:
    _, model, params = pair
    ends = []
    for seed in range(8):
        tokens, mask = prompts(3, 6, seed)
        ngrams = ngram if rule == "hf" else 0  # greedy decoding counts the prompt's n-grams too
        new, _ = beams.search(
            *(model, params, tokens, mask, np.array([20, 31, 39]), np.int32(0), np.float32(1)),
            **{"max_new_tokens": 20, "num_beams": 1, "no_repeat": ngrams, "early_stopping": True, "rule": rule},
        )
        options: dict[str, Any] = {"max_new_tokens": 20, "eos": [20, 31, 39], "no_repeat_ngram_size": ngrams}
        np.testing.assert_array_equal(new, generate(model, params, tokens, mask, **options))
        ends += np.isin(new, [20, 31, 39]).any(1).tolist()
    assert len(set(ends)) == 2, "some texts should end and others not"


@pytest.mark.parametrize("rule", RULES)
def test_adapted_merged_scanned_and_a_row_alone(tmp_path: Path, rule: str) -> None:
    _, model, params = random_models(tmp_path, 2)
    method = lj.lora(lj.select("**/attn/{query,value}/kernel", axes=dict(gpt2.AXES)), rank=2, alpha=8)
    delta = jax.tree.map(lambda x: x + 0.3, method.init(jax.random.key(1), params))
    adapted = method.apply(params, delta)
    tokens, mask = prompts(3, 6, 1)
    options: dict[str, Any] = {"max_new_tokens": 9, "eos": [3, 11], "num_beams": 4, "beam_rule": rule}
    generated = np.asarray(generate(model, adapted, tokens, mask, **options))
    assert (generated != np.asarray(generate(model, params, tokens, mask, **options))).any()
    np.testing.assert_array_equal(generated, generate(model, lj.merge(adapted), tokens, mask, **options))
    scanned = gpt2.GPT2(gpt2.GPT2Config(**{**vars(model.config), "scan_layers": True}))
    again = generate(scanned, gpt2.to_scanned(lj.merge(adapted)), tokens, mask, **options)
    np.testing.assert_array_equal(generated, again)
    for row in range(3):
        one = slice(row, row + 1)
        np.testing.assert_array_equal(generate(model, adapted, tokens[one], mask[one], **options)[0], generated[row])


@pytest.mark.parametrize("rule", RULES)
def test_one_compilation_for_each_shape(pair: tuple[Any, Any, Any], rule: str) -> None:
    _, model, params = pair
    compiled: list[str] = []

    def listen(name: str, _: float, **__: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed in range(4):  # other lengths, end tokens and penalties
            tokens, mask = prompts(3, 7, seed)
            how: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "beam_rule": rule, "length_penalty": seed / 2}
            jax.block_until_ready(generate(model, params, tokens, mask, eos=seed, pad=seed + 1, **how))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1


def test_no_step_moves_keys_and_values(pair: tuple[Any, Any, Any]) -> None:
    """In the loops the new tokens' places in the caches are written, and nothing else makes such an array."""
    _, model, params = pair
    tokens, mask = prompts(3, 6, 0)

    def run(params: Any) -> Any:
        options: dict[str, Any] = {"max_new_tokens": 9, "num_beams": 4, "no_repeat": 0, "early_stopping": False}
        ends, penalty = np.array([1], np.int32), np.float32(1)
        return beams.search(model, params, tokens, mask, ends, np.int32(0), penalty, **options, rule="hf")

    (loop,) = [e for e in _equations(jax.make_jaxpr(run)(params).jaxpr) if e.primitive.name == "while"]
    cache = (3, 2, 6 + 9 * 4, 8)
    body = list(_equations(loop.params["body_jaxpr"].jaxpr))
    made = [e.primitive.name for e in body for out in e.outvars if getattr(out.aval, "shape", ()) == cache]
    assert made and set(made) == {"scatter"}


def _equations(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if equation.primitive.name != "while" and hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


def test_bad_input(pair: tuple[Any, Any, Any]) -> None:
    _, model, params = pair
    tokens, mask = prompts(2, 4, 0)

    def check(match: str, params: Any = params, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            generate(model, params, tokens, mask, max_new_tokens=5, eos=0, **options)

    check("num_beams=54: from 1 to the vocabulary's 53", num_beams=54)
    check("num_beams=0", num_beams=0)
    check("beam_rule='fairseq': one of hf, lora_paper", num_beams=2, beam_rule="fairseq")
    check("early_stopping='always'", num_beams=2, early_stopping="always")
    check("no_repeat_ngram_size=-1", no_repeat_ngram_size=-1)
    check("temperature, top_p are for sampling, which needs a key", temperature=0.5, top_p=0.5)
    check("beam search does not sample", num_beams=2, key=jax.random.key(0))
    check("temperature=0", temperature=0.0, key=jax.random.key(0))
    check("top_k=0", top_k=0, key=jax.random.key(0))
    check("top_p=1.5", top_p=1.5, key=jax.random.key(0))
    check("length_penalty=nan", num_beams=2, length_penalty=np.nan)
    with pytest.raises(ValueError, match="53 end tokens leave none"):
        generate(model, params, tokens, mask, max_new_tokens=5, eos=range(53), num_beams=2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 2, "beam_rule": "lora_paper"}], ids=str)
def test_broken_logits_are_said_of_their_prompt(pair: tuple[Any, Any, Any], options: dict[str, Any]) -> None:
    """NaN at a position that the second prompt alone reaches, after two tokens."""
    _, model, params = pair
    broken = jax.tree.map(lambda x: x, params)
    broken["wpe"]["embedding"] = broken["wpe"]["embedding"].at[5].set(jnp.nan)
    tokens, mask = np.full((2, 4), 7), np.array([[0, 0, 0, 1], [1, 1, 1, 1]])
    generate(model, broken, tokens, mask, max_new_tokens=2, eos=52, **options)
    with pytest.raises(ValueError, match=r"logits are NaN for prompts \[1\]"):
        generate(model, broken, tokens, mask, max_new_tokens=4, eos=52, **options)


def test_more_bans_than_tokens(pair: tuple[Any, Any, Any]) -> None:
    """Every token may come once: when all are used up the search ends without NaN, whatever it gives."""
    _, model, params = pair
    options: dict[str, Any] = {"max_new_tokens": 60, "eos": 0, "no_repeat_ngram_size": 1, "num_beams": 2}
    for rule in RULES:
        new = np.asarray(generate(model, params, [[5]], [[1]], **options, beam_rule=rule))[0].tolist()
        words = new[: new.index(0)]
        assert len(set(words)) == len(words) > 3


def test_from_the_shared_base(shared: Path) -> None:
    """Real weights and a real prompt, against transformers."""
    folder = shared / "base"
    model, params, tokenizer = hf.load(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.encode("The house stood at the end of the street, and").ids
    tokens, mask = np.array([ids]), np.ones((1, len(ids)), bool)
    how: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 4, "no_repeat_ngram_size": 2, "length_penalty": 0.8}
    ours = np.asarray(generate(model, params, tokens, mask, eos=0, **how))
    expected = theirs.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), do_sample=False, pad_token_id=0, **how
    )[:, len(ids) :]
    np.testing.assert_array_equal(ours[:, : expected.shape[1]], expected.numpy())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (100, 3), (512, 4), (611, 9)])
def test_top_k_is_that_of_jax_and_ties_too(n: int, k: int) -> None:
    x = jnp.round(3 * jax.random.normal(jax.random.key(n), (5, n)))
    x = x.at[1].set(-jnp.inf).at[2, n // 2 :].set(-jnp.inf)
    for ours, expected in zip(top_k(x, k), jax.lax.top_k(x, k), strict=True):
        np.testing.assert_array_equal(ours, expected)
