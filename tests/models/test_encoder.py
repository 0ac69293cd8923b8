"""The encoder against itself: padding, layouts, dropout, precision, sites, axes."""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.core.selection import flatten, matches
from lora_jax.models import encoder, shapes
from lora_jax.models.encoder import Encoder, EncoderConfig

TINY = EncoderConfig(
    vocab_size=41,
    max_positions=18,
    hidden=12,
    layers=2,
    heads=3,
    inner=20,
    token_types=2,
    head="classification",
    labels=3,
)
BERT = dataclasses.replace(TINY, family="bert", pad_id=0, pooler=True)
LAYOUTS = [{"scan_layers": scan, "remat": remat} for scan in (False, True) for remat in (False, True)]
LENGTH = 9


@functools.cache
def params_of(config: EncoderConfig) -> Any:
    """Parameters that are all far from zero and from each other, also biases and scales."""
    rng = np.random.default_rng(3)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    loop = Encoder(dataclasses.replace(config, scan_layers=False))
    tree = jax.eval_shape(loop.init, jax.random.key(0), tokens)["params"]
    tree = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.25, leaf.shape), jnp.float32), tree)
    return encoder.to_scanned(tree) if config.scan_layers else tree


@functools.cache
def jitted(config: EncoderConfig) -> Any:
    return jax.jit(Encoder(config).apply)


def run(config: EncoderConfig, *args: Any, **kwargs: Any) -> np.ndarray:
    return np.asarray(jitted(config)({"params": params_of(config)}, *args, **kwargs))


def some_tokens(rows: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, LENGTH), dtype=np.int32)


def test_parameters_are_counted_as_published() -> None:
    """Liu et al. 2019 name 125M and 355M: with the pooler, without a head."""

    def count(**changes: Any) -> int:
        size = changes.pop("size")
        model = Encoder(dataclasses.replace(encoder.SIZES[size], **changes))
        return sum(int(np.prod(shape)) for shape in shapes.of_params(model).values())

    assert count(size="roberta-base", pooler=True) == 124_645_632
    assert count(size="roberta-large", pooler=True) == 355_359_744
    assert count(size="bert-base") == 109_482_240
    # the head of three labels, of the file that the authors published for MNLI
    assert count(size="roberta-base", head="classification", labels=3) - count(size="roberta-base") == 592_899


@pytest.mark.parametrize("config", [TINY, BERT], ids=lambda config: config.family)
@given(lengths=st.lists(st.integers(1, LENGTH), min_size=3, max_size=3), seed=st.integers(0, 5))
def test_padding_changes_nothing(config: EncoderConfig, lengths: list[int], seed: int) -> None:
    """1e-5: the same sums, over more slots that weigh nothing."""
    bare = dataclasses.replace(config, head=None)
    tokens, mask = some_tokens(seed=seed), np.arange(LENGTH)[None, :] < np.array(lengths)[:, None]
    other = np.where(mask, tokens, 7)
    np.testing.assert_array_equal(run(config, tokens, mask), run(config, other, mask))
    hidden = run(bare, tokens, mask)
    assert np.isfinite(hidden).all()
    alone = np.zeros((1, LENGTH), np.int32)
    for row, length in enumerate(lengths):
        alone[0, :length] = tokens[row, :length]
        expected = run(bare, tokens[row : row + 1, :length])
        np.testing.assert_allclose(hidden[row : row + 1, :length], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("config", [TINY, BERT], ids=lambda config: config.family)
def test_layouts_are_one_function(config: EncoderConfig, layout: dict) -> None:
    tokens, mask = some_tokens(), np.arange(LENGTH)[None, :] < np.array([9, 4, 1])[:, None]
    types = (some_tokens(seed=1) % 2).astype(np.int32)
    changed = dataclasses.replace(config, **layout)
    np.testing.assert_allclose(
        run(changed, tokens, mask, types), run(config, tokens, mask, types), rtol=1e-5, atol=1e-5
    )
    assert np.abs(run(config, tokens, mask, types) - run(config, tokens, mask)).max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dropout_acts_with_a_key_alone(layout: dict) -> None:
    config = dataclasses.replace(TINY, dropout=0.3, attention_dropout=0.2, **layout)
    tokens = some_tokens()
    plain = run(dataclasses.replace(config, dropout=0.0, attention_dropout=0.0), tokens)
    np.testing.assert_array_equal(run(config, tokens), plain)
    first, again, other = (run(config, tokens, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 and np.abs(first - plain).max() > 1e-3


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_keeps_its_share_and_scales_it_up(scan: bool) -> None:
    """Of the embeddings; within four standard deviations."""
    config = dataclasses.replace(TINY, head=None, dropout=0.25, scan_layers=scan)
    tokens = np.tile(some_tokens(), (200, 1))
    _, state = Encoder(config).apply(
        {"params": params_of(config)},
        tokens,
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda module, _: isinstance(module, encoder.Embeddings),
    )
    (dropped,) = state["intermediates"]["embeddings"]["__call__"]
    kept = np.asarray(dropped != 0)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / kept.size)
    plain_state = Encoder(config).apply({"params": params_of(config)}, tokens, capture_intermediates=True)[1]
    (plain,) = plain_state["intermediates"]["embeddings"]["__call__"]
    np.testing.assert_allclose(dropped[kept], plain[kept] / 0.75, rtol=1e-6)


def test_bfloat16_computes_in_bfloat16() -> None:
    """2%: eight bits of mantissa through two layers of LayerNorms."""
    tokens = some_tokens()
    half = dataclasses.replace(TINY, dtype="bfloat16")
    exact, rounded = run(TINY, tokens), run(half, tokens)
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, exact, atol=0.02 * np.abs(exact).max())
    assert "bf16[3,9,12]" in str(jax.make_jaxpr(Encoder(half).apply)({"params": params_of(half)}, tokens))


@pytest.mark.parametrize("config", [TINY, BERT], ids=lambda config: config.family)
@pytest.mark.parametrize("scan", [False, True])
def test_axes_name_every_parameter(config: EncoderConfig, scan: bool) -> None:
    config = dataclasses.replace(config, scan_layers=scan)
    for path, leaf in flatten(params_of(config))[0]:
        axes = next(axes for glob, axes in encoder.AXES.items() if matches(glob, path))
        assert len(axes) == leaf.ndim, path
        assert ("s" in axes) == path.startswith("h/"), path


@pytest.mark.parametrize("layout", LAYOUTS[::3], ids=str)
def test_sites_are_those_of_the_traced_model(layout: dict) -> None:
    config = dataclasses.replace(TINY, **layout)
    counts: collections.Counter = collections.Counter()
    kinds = {}

    def look(jaxpr: Any, times: int) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "name":
                aval = eqn.invars[0].aval
                counts[eqn.params["name"]] += times
                kinds[eqn.params["name"]] = (aval.shape[2:], str(aval.dtype))
            inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
            for sub in jax.tree.leaves(list(eqn.params.values())):
                if hasattr(sub, "jaxpr") or hasattr(sub, "eqns"):
                    look(getattr(sub, "jaxpr", sub), inner)

    look(jax.make_jaxpr(Encoder(config).apply)({"params": params_of(config)}, some_tokens()).jaxpr, 1)
    assert {name: (counts[name], *kinds[name]) for name in counts} == encoder.sites(config)


def test_lora_lifts_and_merges() -> None:
    """1e-5 of the largest logit: the order of sums."""
    params, tokens = params_of(TINY), some_tokens()
    method = lj.lora(lj.select("**/{attn,mlp}/*/kernel", "**/embedding", "classifier/**/kernel"), rank=2, alpha=3)
    delta = jax.tree.map(lambda x: x + 0.1, method.init(jax.random.key(0), params))
    adapted = method.apply(params, delta)
    lifted = lj.lift(Encoder(TINY).apply, on_dense="error")({"params": adapted}, tokens)
    merged = run_with(lj.merge(adapted), tokens)
    np.testing.assert_allclose(lifted, merged, rtol=0, atol=1e-5 * np.abs(merged).max())
    assert np.abs(merged - run(TINY, tokens)).max() > 1e-2


def run_with(params: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jitted(TINY)({"params": params}, tokens))


def test_what_cannot_be_is_said() -> None:
    too_long = np.zeros((1, 17), np.int32)
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        Encoder(TINY).init(jax.random.key(0), too_long)
    Encoder(BERT).init(jax.random.key(0), np.zeros((1, 18), np.int32))
    for changes, message in [
        ({"family": "xlnet"}, "choose from"),
        ({"hidden": 13}, "13 is not a multiple of heads 3"),
        ({"activation": "swoosh"}, "none of gelu"),
        ({"pooler": True}, "roberta with a head has no pooler"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **changes)
