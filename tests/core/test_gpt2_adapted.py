"""The core on the project's GPT-2: layouts, padding, packing and the labelled head agree with merged weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import gpt2
from tests.helpers.networks import started
from tests.helpers.reference import close, densely, ints, leaves, random_delta, same

CONFIG = gpt2.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
TOKENS = ints([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]])
MASK = jax.device_put(np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool))
PLACES = ints([[2, 4], [1, 2]])


def model_of(**options):
    return gpt2.GPT2(dataclasses.replace(CONFIG, **options))


@pytest.fixture(scope="module")
def params():
    return started(model_of(), TOKENS)


def lora(globs="{**/kernel,wte/embedding,wpe/embedding}", **options):
    return lj.lora(lj.select(globs, axes=gpt2.AXES, **options), rank=2, alpha=3)


def axes_of(params):
    return {path: ("vo" if "embedding" in path else "io") for path in leaves(params)}


def value_and_grad(model, method, params, kwargs, on_dense="error"):
    forward = lj.lift(model.apply, on_dense=on_dense)

    def loss(delta):
        logits = forward({"params": method.apply(params, delta)}, TOKENS, **kwargs)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({"mask": MASK, "labelled": PLACES}, id="padded and labelled"),
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"segments": ints([[1, 1, 1, 2, 2, 2]] * 2)}, id="packed", marks=pytest.mark.slow),
    ],
)
def test_everything_adapted_equals_dense(params, kwargs):
    model, method = model_of(), lora()
    delta = random_delta(method, params, size=0.1)

    def by_hand(delta):
        dense = densely(params, delta, axes_of(params), scale=1.5)
        logits = model.apply({"params": dense}, TOKENS, **kwargs)
        return jnp.sum(jnp.sin(logits)), logits

    lifted = value_and_grad(model, method, params, kwargs)
    run = jax.jit(lambda d: (lifted(d), jax.value_and_grad(by_hand, has_aux=True)(d)))
    ((_, logits), grads), ((_, want), want_grads) = run(delta)
    close(logits, want)
    close(grads, want_grads, 2e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"scan_layers": True, "remat": True}, id="scan and remat"),
        pytest.param({"scan_layers": True}, id="scan", marks=pytest.mark.slow),
        pytest.param({"remat": True}, id="remat", marks=pytest.mark.slow),
    ],
)
def test_layouts_agree(params, options):
    method, kwargs = lora(), {"mask": MASK, "labelled": PLACES}
    delta = random_delta(method, params, size=0.1)
    (_, want), want_grads = value_and_grad(model_of(), method, params, kwargs)(delta)
    convert = gpt2.to_scanned if options.get("scan_layers") else (lambda tree: tree)
    back = gpt2.to_loop if options.get("scan_layers") else (lambda tree: tree)
    other = convert(delta)
    assert isinstance(other, lj.Delta)
    (_, got), grads = value_and_grad(model_of(**options), method, convert(params), kwargs)(other)
    close(got, want)
    close(back(grads), want_grads, 2e-5)
    same(back(other), delta)


def test_decoding_with_a_cache(params):
    model, method = model_of(), lora()
    adapted = method.apply(params, random_delta(method, params, size=0.1))
    full = jax.jit(lj.lift(model.apply, on_dense="error"))({"params": adapted}, TOKENS)
    step = jax.jit(lj.lift(lambda p, tokens, cache: model.apply({"params": p}, tokens, cache=cache), on_dense="error"))
    cache, logits = gpt2.init_cache(model.config, 2, 8), []
    for n in range(0, 6, 3):
        out, cache = step(adapted, np.asarray(TOKENS)[:, n : n + 3], cache)
        logits.append(out)
    close(np.concatenate(logits, axis=1), full, 2e-5)


def test_some_layers_of_both_layouts(params):
    loop, scanned = lora("**/query/kernel", layers=[1]), lora("**/query/kernel", layers=[1])
    delta = random_delta(loop, params)
    stacked_delta = lj.Delta(
        {"h/attn/query/kernel": jax.tree.map(lambda leaf: np.asarray(leaf)[None], delta["h_1/attn/query/kernel"])}
    )
    stacked = gpt2.to_scanned(params)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), stacked)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, stacked_delta)

    @jax.jit
    def both(delta, stacked_delta):
        got = lj.lift(model_of(scan_layers=True).apply)({"params": scanned.apply(stacked, stacked_delta)}, TOKENS)
        return got, lj.lift(model_of().apply)({"params": loop.apply(params, delta)}, TOKENS)

    close(*both(delta, stacked_delta))


@pytest.mark.slow
def test_bfloat16_compute(params):
    method = lora("**/kernel")
    delta = random_delta(method, params, size=0.1)
    (_, want), exact = value_and_grad(model_of(), method, params, {})(delta)
    with jax.numpy_dtype_promotion("standard"):  # JAX lowers its attention's gradient by promoting types
        (_, got), grads = value_and_grad(model_of(dtype="bfloat16"), method, params, {})(delta)
    assert got.dtype == jnp.float32 and {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    close(got, want, 3e-2)
    norm = lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)) ** 0.5  # noqa: E731
    difference = jax.tree.map(jnp.subtract, grads, exact)
    assert float(norm(difference) / norm(exact)) < 0.05
