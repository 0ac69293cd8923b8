"""A loss in pieces against the whole: values, gradients, FLOPs and bytes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import training
from lora_jax.models import gpt2
from lora_jax.planning.flops import count
from lora_jax.training import objectives
from lora_jax.training.loss import chunked_loss, cross_entropy
from tests.helpers.runs import model_and_params, schedule

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # float32, summed in another order


def made(b: int, n: int, seed: int = 0, vocab: int = 31, width: int = 5) -> tuple[Any, ...]:
    random = np.random.default_rng(seed)
    weights = {"w": random.normal(size=(width, vocab)), "bias": random.normal(size=vocab)}
    labels = random.integers(0, vocab, (b, n))
    real = random.integers(0, 2, (b, n))
    x, real, weights = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32), (random.normal(size=(b, n, width)), real, weights)
    )
    return weights, x, jnp.asarray(labels, jnp.int32), real


def loss(weights: Any, x: Any, labels: Any, real: Any) -> Any:
    return cross_entropy(x @ weights["w"] + weights["bias"][None, None], labels, real, 0.1)[0]


@settings(max_examples=2)
@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 12), st.integers(0, 99))
@example(1, 1, 1, 0)
@example(2, 3, 12, 0)
@example(3, 11, 4, 0)
def test_the_sum_and_every_gradient_are_those_of_the_whole(b: int, n: int, pieces: int, seed: int) -> None:
    given_ = made(b, n, seed)
    cut = functools.partial(chunked_loss, loss, chunks=pieces)

    @jax.jit
    def everything(*given_: Any) -> Any:
        return [jax.value_and_grad(fn, (0, 1))(*given_) for fn in (cut, loss)], cut(*given_)

    (loss_and_grads, expected), value = everything(*given_)
    jax.tree.map(close, loss_and_grads, expected)
    close(value, expected[0])


@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint, lambda f: lambda *xs: 3 * f(*xs) / 3])
def test_its_gradient_is_taken_from_outside_too(around: Any) -> None:
    given_ = made(2, 7)
    cut = around(functools.partial(chunked_loss, loss, chunks=3))
    jax.tree.map(close, *jax.jit(lambda *xs: [jax.grad(fn, (0, 1))(*xs) for fn in (cut, loss)])(*given_))


def test_in_bfloat16_gradients_keep_their_dtypes() -> None:
    weights, x, *along = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, made(2, 6))
    grads = jax.jit(jax.grad(functools.partial(chunked_loss, loss, chunks=3), (0, 1)))(weights, x, *along)
    jax.tree.map(lambda g, w: np.testing.assert_equal(g.dtype, w.dtype), grads, (weights, x))


def test_members_of_a_vmap_have_their_own() -> None:
    weights, x, *along = made(2, 7)
    many = jax.tree.map(lambda w: np.stack([w, 2 * w]), weights)
    grad = jax.grad(functools.partial(chunked_loss, loss, chunks=4), (0, 1))
    batched_grads = jax.jit(jax.vmap(lambda w: grad(w, x, *along)))(many)
    alone = jax.jit(lambda w: jax.grad(loss, (0, 1))(w, x, *along))
    for k in range(2):
        member_weights, got = jax.tree.map(lambda w, k=k: np.asarray(w)[k], (many, batched_grads))
        jax.tree.map(close, got, alone(member_weights))


def test_a_frozen_head_has_no_gradient_and_nothing_is_computed_twice() -> None:
    weights, x, *along = made(2, 8)
    product = count(lambda x: x @ weights["w"], x)
    of_x = jax.grad(lambda x: chunked_loss(loss, weights, x, *along, chunks=4))
    assert count(of_x, x) == 2 * product
    assert count(jax.grad(lambda w, x: chunked_loss(loss, w, x, *along, chunks=4), (0, 1)), weights, x) == 3 * product
    assert count(lambda x: chunked_loss(loss, weights, x, *along, chunks=4), x) == product


def test_the_logits_are_never_whole() -> None:
    weights, x, *along = made(4, 64, vocab=4096, width=8)
    logits = 4 * x[..., 0].size * 4096

    def bytes_of(pieces: int) -> int:
        grad = jax.jit(jax.grad(functools.partial(chunked_loss, loss, chunks=pieces), 1))
        return grad.lower(weights, x, *along).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(1) > logits
    assert bytes_of(8) < logits / 3


HEADS = {
    "frozen": {"method": "lora", "select": ["**/attn/query/kernel"], "rank": 2},
    "low rank": {"method": "lora", "select": ["wte/embedding"], "rank": 2, "axes": gpt2.AXES},
    "dropout": {"method": "lora", "select": ["wte/embedding"], "rank": 2, "axes": gpt2.AXES, "dropout": 0.5},
    "dora": {"method": "dora", "select": ["wte/embedding"], "rank": 2, "axes": gpt2.AXES},
    "full": {"method": "tune", "select": ["**"]},
}


@pytest.mark.parametrize(
    ("head", "tie"),
    [("frozen", True), ("low rank", False), ("dropout", True), ("dora", True), ("full", True), ("full", False)],
)
def test_a_language_model_s_loss_in_pieces_is_that_of_its_logits(head: str, tie: bool, monkeypatch: Any) -> None:
    model, params = model_and_params(tie=tie)
    spec = dict(HEADS[head])
    if not tie and spec["select"] == ["wte/embedding"]:
        spec["select"] = ["lm_head/kernel"]
    method = lj.from_spec(spec)
    start = jax.jit(method.init)(jax.random.key(1), params)
    delta = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.01), start)
    objective = training.language_model(model, 0.1)
    batch = {name: jnp.asarray(x) for name, x in schedule(4, buckets=1)(0)[0].items()}

    def whole(delta: Any) -> Any:
        logits = objective.forward(method.apply(params, delta, key=key), batch)
        return cross_entropy(logits, batch["labels"], batch["weights"], 0.1)[0]

    monkeypatch.setattr(objectives, "LEAST", 1)
    monkeypatch.setattr(objectives, "CHUNKS", 4)
    key = jax.random.key(0)
    assert batch["labels"].shape[1] % 4  # the last piece is filled up
    in_parts = lambda delta: objective.loss(method.apply(params, delta, key=key), batch)[0]  # noqa: E731

    @jax.jit
    def everything(delta: Any) -> Any:
        adapted = method.apply(params, delta, key=key)
        unsmoothed = cross_entropy(objective.forward(adapted, batch), batch["labels"], batch["weights"])
        losses = [jax.value_and_grad(fn)(delta) for fn in (in_parts, whole)]
        return losses, objective.validation(adapted, batch), unsmoothed

    (loss_and_grads, expected), validation, unsmoothed = everything(delta)
    jax.tree.map(close, loss_and_grads, expected)
    close(validation[:2], unsmoothed)
    assert validation[2] is None
