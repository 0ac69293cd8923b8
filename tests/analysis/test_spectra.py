"""Spectra, ranks and amplification, against dense matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax import analysis
from tests.helpers.dense import near
from tests.helpers.reference import normal


@jax.jit
def of_factors(a, b):
    values = analysis.spectrum(a, b, -1.5)
    return values, analysis.effective_rank(values), [analysis.rank_of_share(values, share) for share in (0.5, 0.9, 1)]


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_spectra_and_ranks_are_those_of_the_dense_update(count, m, n, r, seed):
    a, b = normal(count, m, r, seed=seed), normal(count, r, n, seed=seed + 1)
    values, effective, ranks = of_factors(a, b)
    want = np.linalg.svd(1.5 * np.asarray(a, np.float64) @ np.asarray(b, np.float64), compute_uv=False)
    assert values.shape[1] == min(m, n, r)
    near(values, want[:, : values.shape[1]], 1e-5)
    shares = want / want.sum(1, keepdims=True)
    entropy = -np.sum(np.where(shares > 0, shares * np.log(np.maximum(shares, 1e-300)), 0), 1)
    np.testing.assert_allclose(effective, np.exp(entropy), rtol=1e-3)  # values that are zero but for rounding
    for share, got in zip((0.5, 0.9), ranks, strict=False):
        for row, rank in zip(want, got, strict=True):
            sums = np.cumsum(row**2) / np.sum(row**2)
            assert rank == 1 + np.sum(sums < share) or np.abs(sums - share).min() < 1e-5
    assert (np.asarray(ranks[2]) <= values.shape[1]).all()


def test_ranks_of_equal_values_of_zeros_and_of_a_wrong_share():
    values = jnp.array([[2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(analysis.effective_rank(values), [3, 0], rtol=1e-6)
    assert analysis.rank_of_share(values, 1).tolist() == [3, 0]
    assert analysis.rank_of_share(values[0], 2 / 3 - 1e-3).tolist() == 2
    for share in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"share=.* must be a number above 0 to 1"):
            analysis.rank_of_share(values, share)


amplification = jax.jit(analysis.amplification)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_amplification_is_that_of_the_dense_matrices(m, n, r, seed):
    r = min(m, n, r)
    w, a, b = (normal(*shape, seed=seed + k) for k, shape in enumerate([(2, m, n), (2, m, r), (2, r, n)]))
    got = amplification(w, a, b, 3.0)
    exact = [np.asarray(x, np.float64) for x in (w, a, b)]
    for k, (w, a, b) in enumerate(zip(*exact, strict=True)):
        u, _, v = np.linalg.svd(a @ b, full_matrices=False)
        inside = u[:, :r] @ u[:, :r].T @ w @ v[:r].T @ v[:r]  # the paper's projection of W, of the same norm
        want = {"projected": np.linalg.norm(inside), "update": 3 * np.linalg.norm(a @ b)}
        want["factor"] = want["update"] / want["projected"]
        want["top"] = np.linalg.norm(np.linalg.svd(w, compute_uv=False)[:r])
        want["random"] = r * np.linalg.norm(w) / np.sqrt(m * n)
        assert set(got) == set(want)
        for name, value in want.items():
            condition = np.linalg.cond(a) * np.linalg.cond(b)
            np.testing.assert_allclose(got[name][k], value, rtol=1e-5 * condition, err_msg=name)


def test_of_w_s_own_first_directions_projected_is_top():
    w = np.asarray(normal(20, 12), np.float64)
    u, values, v = np.linalg.svd(w, full_matrices=False)
    got = amplification(jnp.float32(w), jnp.float32(u[:, :4]), jnp.float32(v[:4]))
    want = np.sqrt(np.sum(values[:4] ** 2))
    np.testing.assert_allclose([got["projected"], got["top"]], want, rtol=1e-5)
    np.testing.assert_allclose(got["update"], 2, rtol=1e-5)


def test_random_is_the_root_of_the_mean_square_of_random_directions():
    """Of 2,000 updates, within five standard errors."""
    w = jnp.broadcast_to(normal(16, 10), (2000, 16, 10))
    got = amplification(w, normal(2000, 16, 3, seed=1), normal(2000, 3, 10, seed=2))
    squares = np.asarray(got["projected"], np.float64) ** 2
    assert abs(squares.mean() - float(got["random"][0]) ** 2) < 5 * squares.std() / np.sqrt(2000)


def test_an_update_of_w_s_own_weaker_directions_is_between_random_and_top():
    """The paper's order: random < update << top, and an amplification above 1."""
    w = np.asarray(normal(64, 64), np.float64)
    u, _, v = np.linalg.svd(w)
    got = amplification(jnp.float32(w), jnp.float32(9 * u[:, 30:34]), jnp.float32(v[30:34]))
    assert 2 * got["random"] < got["projected"] < got["top"] / 1.5 and got["factor"] > 1


def test_directions_of_an_update_that_are_zero_do_not_count():
    w, a, b = normal(6, 5), normal(6, 2), normal(2, 5)
    zero = jnp.zeros((6, 1)), jnp.zeros((1, 5))
    padded = amplification(w, jnp.concatenate([a, zero[0]], 1), jnp.concatenate([b, zero[1]], 0))
    near(padded["projected"], amplification(w, a, b)["projected"], 1e-5)
    nothing = amplification(w, a, 0 * b)
    assert nothing["projected"] == nothing["update"] == 0 and np.isnan(nothing["factor"])


def test_factors_that_do_not_fit_the_weight_are_said():
    w = normal(4, 3)
    for a, b in ((normal(3, 1), normal(1, 3)), (normal(4, 1), normal(2, 3)), (normal(4, 1), normal(1, 4))):
        with pytest.raises(ValueError, match=r"must be \(m, r\) and \(r, n\) for w \(m, n\), here \(4, 3\)"):
            analysis.amplification(w, a, b)
    with pytest.raises(ValueError, match=r"the rank 4 of the update is above min\(m, n\) = 3"):
        analysis.amplification(w, normal(4, 4), normal(4, 3))
