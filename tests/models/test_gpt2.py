"""GPT-2 against itself: padding, packing, cache, layouts, precision, sites, axes."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Jaxpr

from lora_jax.core.selection import flatten, matches
from lora_jax.models import gpt2

TINY = gpt2.GPT2Config(vocab_size=53, n_positions=24, n_embd=24, n_layer=2, n_head=3)
LAYOUTS = [{"scan_layers": scan, "remat": remat} for scan in (False, True) for remat in (False, True)]
LENGTH = 9


def shapes(config: gpt2.GPT2Config):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(gpt2.GPT2(config).init, jax.random.key(0), tokens)["params"]


@functools.cache
def params_of(config: gpt2.GPT2Config):
    """Parameters that are all far from zero and from each other, also biases and scales."""
    rng = np.random.default_rng(3)
    draw = lambda leaf: jnp.asarray(rng.normal(0.1, 0.25, leaf.shape), jnp.float32)  # noqa: E731
    loop = jax.tree.map(draw, shapes(dataclasses.replace(config, scan_layers=False)))
    return gpt2.to_scanned(loop) if config.scan_layers else loop


@functools.cache
def jitted(config: gpt2.GPT2Config):
    return jax.jit(gpt2.GPT2(config).apply)


def run(config: gpt2.GPT2Config, *args, **kwargs):
    """What the model gives, in numpy."""
    return jax.tree.map(np.asarray, jitted(config)({"params": params_of(config)}, *args, **kwargs))


def some_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape, dtype=np.int32)


def close(x, y, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(np.abs(y).max()))


def test_parameters_are_float32_and_counted_as_published():
    counts = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}
    for name, count in counts.items():
        leaves = jax.tree.leaves(shapes(dataclasses.replace(gpt2.SIZES[name], dtype="bfloat16")))
        assert sum(leaf.size for leaf in leaves) == count
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_initialization_is_gpt2s():
    params = gpt2.GPT2(TINY).init(jax.random.key(0), some_tokens(1, 1))["params"]
    assert np.std(params["wte"]["embedding"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(params["h_0"]["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(params["h_0"]["mlp"]["down"]["kernel"]) == pytest.approx(0.01, rel=0.1)
    assert not np.any(params["h_1"]["attn"]["query"]["bias"])


@given(st.lists(st.integers(1, LENGTH), min_size=2, max_size=2), st.booleans(), st.booleans())
def test_padding_does_not_matter(lengths, left, as_int):
    tokens = some_tokens(2, LENGTH)
    place = np.arange(LENGTH)[None, :]
    n = np.array(lengths)[:, None]
    mask = place >= LENGTH - n if left else place < n
    padded = run(TINY, tokens, mask.astype(np.int32) if as_int else mask)
    assert np.isfinite(padded).all()
    for row in range(2):
        alone = np.zeros((2, LENGTH), np.int32)  # of one shape, so that nothing compiles again
        alone[0, : lengths[row]] = tokens[row][mask[row]]
        close(padded[row][mask[row]], run(TINY, alone)[0, : lengths[row]])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=LENGTH), st.booleans())
def test_packed_is_separate(lengths, padded):
    tokens = some_tokens(1, LENGTH)
    ids = np.repeat(np.arange(len(lengths)), lengths)[: LENGTH - padded]
    segments = np.full((1, LENGTH), -1, np.int32)  # -1: padding behind the last text
    segments[0, : len(ids)] = ids
    logits = run(TINY, tokens, segments >= 0, segments=segments)[0]
    for text in np.unique(ids):
        here = segments[0] == text
        alone = np.zeros((2, LENGTH), np.int32)
        alone[0, : here.sum()] = tokens[0][here]
        close(logits[here], run(TINY, alone)[0, : here.sum()])


def test_packing_with_padding_inside_a_text():
    tokens, segments = some_tokens(1, 6), np.array([[0, 0, 0, 1, 1, 1]], np.int32)
    mask = np.array([[0, 1, 1, 0, 1, 1]], bool)
    logits = run(TINY, tokens, mask, segments=segments)[0]
    for places in ([1, 2], [4, 5]):
        close(logits[places], run(TINY, tokens[:, places])[0])


def test_positions_can_be_given():
    tokens, positions = some_tokens(1, 4), np.array([[0, 1, 2, 3]], np.int32)
    close(run(TINY, tokens, positions=positions), run(TINY, tokens))
    assert not np.allclose(run(TINY, tokens, positions=positions + 1), run(TINY, tokens), atol=1e-2)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 1, 3, 1)], ids=str)
def test_cached_is_full(scan_layers, chunks):
    config = dataclasses.replace(TINY, scan_layers=scan_layers)
    tokens = some_tokens(3, LENGTH)
    mask = np.arange(LENGTH)[None, :] >= np.array([0, 3, 5])[:, None]  # left padded
    full = run(config, tokens, mask)
    cache = gpt2.init_cache(config, 3, LENGTH + 4)
    parts = []
    for end, size in zip(itertools.accumulate(chunks), chunks, strict=True):
        piece = slice(end - size, end)
        structure = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
        logits, cache = run(config, tokens[:, piece], mask[:, piece], cache=cache)
        parts.append(logits)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == structure
    assert int(cache["index"]) == LENGTH
    close(np.concatenate(parts, axis=1)[mask], full[mask])


def test_decoding_behind_right_padding():
    """A right-padded prompt, then new tokens: the padding between them does not matter."""
    tokens = some_tokens(1, 7)
    prompt = np.concatenate([tokens[:, :4], np.zeros((1, 2), np.int32)], axis=1)
    mask = np.array([[1, 1, 1, 1, 0, 0]], bool)
    cache = gpt2.init_cache(TINY, 1, 12)
    _, cache = run(TINY, prompt, mask, cache=cache)
    logits, _ = run(TINY, tokens[:, 4:], cache=cache, labelled=np.array([[2]], np.int32))
    close(logits[:, 0], run(TINY, tokens)[:, -1])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_tree_of_continuations(scan_layers):
    """Two texts that begin alike, side by side in one cache: each sees its own ancestors alone."""
    config = dataclasses.replace(TINY, scan_layers=scan_layers)
    tokens = np.repeat(some_tokens(1, 7), 2, axis=0)
    tokens[1, 4:] = some_tokens(1, 3) + 1
    full = run(config, tokens)
    _, cache = run(config, tokens[:1, :4], cache=gpt2.init_cache(config, 1, 10))
    sees = np.zeros((1, 2, 10), bool)
    sees[..., :4] = True
    for step in range(3):
        sees[0, [0, 1], [4 + 2 * step, 5 + 2 * step]] = True
        positions = np.full((1, 2), 4 + step)
        logits, cache = run(config, tokens[None, :, 4 + step], sees, positions=positions, cache=cache)
        close(logits[0], full[:, 4 + step])


@pytest.mark.parametrize("tie", [True, False])
def test_labelled_is_a_gather_of_the_logits(tie):
    config = dataclasses.replace(TINY, tie=tie)
    tokens, labelled = some_tokens(2, 5), np.array([[4, 0, 0], [1, 2, 3]], np.int32)
    got = run(config, tokens, labelled=labelled)
    assert got.shape == (2, 3, TINY.vocab_size)
    close(got, np.take_along_axis(run(config, tokens), labelled[:, :, None], axis=1))


def loss(params, config, tokens, mask):
    logits = gpt2.GPT2(config).apply({"params": params}, tokens, mask)
    return (jnp.where(mask[:, :, None], jax.nn.log_softmax(logits), 0.0)[:, :, :7]).sum()


@functools.cache
def gradients(config: gpt2.GPT2Config):
    mask = np.arange(LENGTH)[None, :] >= np.array([0, 4])[:, None]
    grads = jax.jit(jax.grad(loss), static_argnums=1)(params_of(config), config, some_tokens(2, LENGTH), mask)
    return gpt2.to_loop(grads) if config.scan_layers else grads


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_layouts_are_one_function(layout):
    config = dataclasses.replace(TINY, **layout)
    close(run(config, some_tokens(2, LENGTH)), run(TINY, some_tokens(2, LENGTH)))
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients(TINY)))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * largest),
        gradients(config),
        gradients(TINY),
    )


def test_bfloat16_is_close():
    """bfloat16 has 8 bits: 2 layers stay within 3% of the largest logit; the logits are float32."""
    half = dataclasses.replace(TINY, dtype="bfloat16")
    tokens = some_tokens(2, LENGTH)
    exact, got = run(TINY, tokens), run(half, tokens)
    assert got.dtype == np.float32
    close(got, exact, tolerance=0.03)
    untied = dataclasses.replace(half, tie=False)
    close(run(untied, tokens), run(dataclasses.replace(TINY, tie=False), tokens), tolerance=0.03)
    for dtype in (None, "float32"):
        cache = gpt2.init_cache(half, 2, LENGTH, dtype)
        assert cache["layers"][0]["key"].dtype == jnp.dtype(dtype or "bfloat16")
        close(run(half, tokens, cache=cache)[0], exact, tolerance=0.03)


def test_bfloat16_gradients_are_close_and_float32():
    # jax lowers a product of mixed types, as in the gradients of scores and logits, with implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        got = gradients(dataclasses.replace(TINY, dtype="bfloat16"))
    assert {g.dtype for g in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    flat = lambda tree: np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)])  # noqa: E731
    exact = flat(gradients(TINY))
    assert np.linalg.norm(flat(got) - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_see_nothing_are_finite(dtype):
    config = dataclasses.replace(TINY, dtype=dtype)
    mask = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], bool)
    total = lambda params: gpt2.GPT2(config).apply({"params": params}, some_tokens(2, 5), mask).sum()  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):  # see above
        value, grads = jax.jit(jax.value_and_grad(total))(params_of(config))
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_ids_outside_the_vocabulary_are_not_silent():
    assert np.isnan(run(TINY, np.array([[TINY.vocab_size]], np.int32))).all()


def equations(jaxpr: Jaxpr, times: int = 1):
    """Every equation with the number of times it runs, in order."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for param in eqn.params.values():
            if isinstance(param, ClosedJaxpr):
                yield from equations(param.jaxpr, inner)
            elif isinstance(param, Jaxpr):
                yield from equations(param, inner)


def trace(config: gpt2.GPT2Config, **kwargs) -> Jaxpr:
    apply = functools.partial(gpt2.GPT2(config).apply, **kwargs)
    return jax.make_jaxpr(apply)({"params": shapes(config)}, some_tokens(2, 5)).jaxpr


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_product_a_weight(layout, tie):
    config = dataclasses.replace(TINY, tie=tie, **layout)
    labelled = np.array([[1, 2, 3], [1, 2, 3]], np.int32)
    products = collections.Counter()
    for eqn, times in equations(trace(config, labelled=labelled)):
        if eqn.primitive.name == "dot_general":
            products[eqn.outvars[0].aval.size] += times
    batch, length, width, heads = 2, 5, config.n_embd, config.n_head
    expected = collections.Counter()
    for size, count in (
        (batch * length * width, 5 * config.n_layer),  # query, key, value, out, down
        (batch * length * config.inner, config.n_layer),  # up
        (batch * heads * length * length, config.n_layer),  # scores
        (batch * length * width, config.n_layer),  # their sum over values
        (batch * 3 * config.vocab_size, 1),  # the head, on labelled places only
    ):
        expected[size] += count
    assert products == expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sites_are_what_tracing_finds(layout):
    config = dataclasses.replace(TINY, dtype="bfloat16", **layout)
    sites: dict[str, list] = {}
    for eqn, times in equations(trace(config)):
        if eqn.primitive.name == "name":
            aval = eqn.outvars[0].aval
            assert aval.shape[:2] == (2, 5)
            site = (aval.shape[2:], str(aval.dtype))
            sites.setdefault(eqn.params["name"], []).extend([site] * times)
    assert gpt2.sites(config) == {n: (len(s), *s[0]) for n, s in sites.items() if len(set(s)) == 1}
    assert list(sites)[:3] == ["tokens", "positions", "embeddings"]


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_axes_name_every_leaf(scan_layers, tie):
    flat, _ = flatten(shapes(dataclasses.replace(TINY, scan_layers=scan_layers, tie=tie)))
    for path, leaf in flat:
        axes = [a for glob, a in gpt2.AXES.items() if matches(glob, path)]
        assert len(axes) == 1 and len(axes[0]) == leaf.ndim, path
        assert ("s" in axes[0]) == (leaf.shape[0] == TINY.n_layer), path


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gpt2.GPT2Config(n_embd=10, n_head=4), "n_embd 10 is not a multiple of n_head 4"),
        (lambda: gpt2.GPT2Config(activation="mish"), "'mish' is none of gelu, gelu_new"),
        (lambda: run(TINY, some_tokens(1, 25)), "25 tokens, but the model has 24"),
        (lambda: gpt2.init_cache(TINY, 1, 25), "length 25, but 24 positions"),
        (
            lambda: run(TINY, some_tokens(1, 5), cache=gpt2.init_cache(TINY, 1, 4)),
            "5 tokens do not fit into a cache of length 4",
        ),
        (
            lambda: run(TINY, some_tokens(1, 3), segments=np.zeros((1, 3), int), cache=gpt2.init_cache(TINY, 1, 4)),
            "do not go together",
        ),
        (lambda: run(TINY, some_tokens(1, 3), np.ones((1, 3, 4), bool)), "needs a cache, and positions"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
