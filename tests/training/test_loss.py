"""The loss against the formulas of the paper's code, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from lora_jax.training import cross_entropy


def reference(logits, labels, weights, smoothing):
    """Their code: (1 - e) * nll + e * mean(-log p), times the mask."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    loss = (1 - smoothing) * nll + smoothing * -log_p.mean(-1)
    return (loss * weights).sum(), weights.sum()


@given(st.integers(1, 2), st.integers(1, 3), st.integers(2, 30), st.floats(0, 1), st.integers(0, 99))
def test_sum_and_count(b: int, n: int, vocab: int, smoothing: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 5, (b, n, vocab)).astype(np.float32)
    labels = random.integers(0, vocab, (b, n)).astype(np.int32)
    weights = random.integers(0, 2, (b, n)).astype(np.float32)
    sum_and_count = jax.jit(cross_entropy, static_argnums=3)(logits, labels, weights, smoothing)
    expected = reference(logits, labels, weights, smoothing)
    np.testing.assert_allclose(sum_and_count, expected, rtol=1e-5, atol=1e-5)


def test_smoothing_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (7, 11)).astype(np.float32)
    labels = random.integers(0, 11, 7)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), label_smoothing=0.1, reduction="sum"
    )
    ones = jnp.ones(7)
    loss, _ = cross_entropy(jnp.array(logits), jnp.array(labels, jnp.int32), ones, 0.1)
    np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-6)


def test_unweighted_positions_do_not_matter() -> None:
    logits = jnp.array([[1.0, 2.0], [5.0, -5.0]])
    one, count = cross_entropy(logits, jnp.array([0, 1]), jnp.array([1.0, 0.0]))
    alone, _ = cross_entropy(logits[:1], jnp.array([0]), jnp.ones(1))
    assert one == alone and count == 1


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = jax.random.normal(jax.random.key(0), (4, 1000), jnp.bfloat16)
    labels, weights = jnp.zeros(4, jnp.int32), jnp.ones(4)
    with jax.numpy_dtype_promotion("standard"):  # so that a loss in bfloat16 would be a number, not an error
        loss, _ = cross_entropy(logits, labels, weights, 0.1)
    wide, _ = cross_entropy(logits.astype(jnp.float32), labels, weights, 0.1)
    assert loss.dtype == jnp.float32 and loss == wide


def test_shapes_are_checked_here() -> None:
    """By the annotations (tests/conftest.py): labels of one position fewer than the logits."""
    with pytest.raises(TypeCheckError, match="labels"):
        cross_entropy(jnp.zeros((2, 5)), jnp.zeros(1, jnp.int32), jnp.ones(2))
