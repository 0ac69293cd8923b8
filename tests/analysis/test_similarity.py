"""phi of paper's section 7.2 and what compares two updates, against projections and dense matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import analysis
from tests.helpers.adapters import given_delta, low_rank
from tests.helpers.dense import near, product
from tests.helpers.reference import normal, same

phi = jax.jit(analysis.subspace_similarity)


def rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def with_values(rng, d, n):
    """(d, n), with singular values n, n - 1, .., 1: its directions are well apart."""
    return rotation(rng, d)[:, :n] * np.arange(n, 0, -1.0) @ rotation(rng, n)


def brute(x, y):
    """The trace of the product of the projections on the first i and j directions, over min(i, j)."""
    u, v = (np.linalg.svd(np.asarray(each, np.float64), full_matrices=False)[0] for each in (x, y))
    onto = [[w[:, :k] @ w[:, :k].T for k in range(1, w.shape[1] + 1)] for w in (u, v)]
    overlaps = [[np.trace(p @ q) for q in onto[1]] for p in onto[0]]
    return np.array([[t / min(i, j) for j, t in enumerate(row, 1)] for i, row in enumerate(overlaps, 1)])


@st.composite
def factors(draw):
    d = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return rng, *(with_values(rng, d, draw(st.integers(1, d))).astype(np.float32) for _ in range(2))


@given(factors())
def test_phi_is_that_of_the_projections(case):
    rng, x, y = case
    got = phi(x, y)
    np.testing.assert_allclose(got, brute(x, y), rtol=0, atol=1e-5)  # roundings of float32, of vectors
    np.testing.assert_allclose(phi(y, x), got.T, rtol=0, atol=1e-5)
    turned = x @ rotation(rng, x.shape[1]).astype(np.float32)  # the same directions, in the same order
    np.testing.assert_allclose(phi(turned, y), got, rtol=0, atol=1e-4)
    moved = rotation(rng, x.shape[0]).astype(np.float32)  # all of the space
    np.testing.assert_allclose(phi(moved @ x, moved @ y), got, rtol=0, atol=1e-4)


@given(st.integers(2, 10), st.data())
def test_inside_is_one_and_orthogonal_is_zero(d, data):
    n = data.draw(st.integers(1, d - 1))
    m = data.draw(st.integers(n, d))
    space = rotation(np.random.default_rng(d), d)
    outer = (space[:, :m] * np.arange(m, 0, -1)).astype(np.float32)
    inner = (outer @ normal(m, n)).astype(np.float32)
    np.testing.assert_allclose(phi(inner, outer)[:, m - 1], 1, atol=1e-4)
    other = (space[:, n:] * np.arange(d - n, 0, -1)).astype(np.float32)
    np.testing.assert_allclose(phi(outer[:, :n], other), 0, atol=1e-5)


def test_random_subspaces_share_max_of_i_and_j_over_d():
    """The mean of 2,000 pairs, within five of its standard errors."""
    x, y = normal(2000, 24, 4, seed=1), normal(2000, 24, 7, seed=2)
    shares = np.asarray(phi(x, y), np.float64)
    want = np.asarray(analysis.random_similarity(4, 7, 24))
    errors = shares.std(0) / np.sqrt(len(shares))
    assert (np.abs(shares.mean(0) - want) < 5 * errors + 1e-6).all()
    assert want[1, 2] == np.float32(3 / 24) and want[3, 0] == np.float32(4 / 24)


def test_directions_of_value_zero_are_in_no_subspace():
    x = jnp.outer(normal(5), normal(3))  # of rank 1
    got = phi(x, jnp.eye(5))
    np.testing.assert_allclose(got[:, -1], [1, 1 / 2, 1 / 3], atol=1e-5)
    assert not np.any(phi(jnp.zeros((5, 2)), jnp.eye(5)))


def test_of_a_stack_each_is_as_alone_and_bf16_is_widened():
    x, y = normal(3, 6, 2).astype(jnp.bfloat16), normal(3, 6, 4, seed=1)
    got = phi(x, y)
    assert got.shape == (3, 2, 4) and got.dtype == jnp.float32
    for n in range(3):
        np.testing.assert_allclose(got[n], brute(np.asarray(x[n], np.float32), y[n]), rtol=0, atol=2e-5)
    np.testing.assert_allclose(jax.vmap(analysis.subspace_similarity)(x, y), got, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axes", ["io", "oi", "vo", "sio", "iso", "ioo", "iio"])
def test_of_adapters_compares_the_factors_of_every_layout(axes):
    params = {"w": normal(*(3, 4, 5, 6)[: len(axes)])}
    methods = [low_rank(axes, 2, alpha=3), low_rank(axes, 3)]
    deltas = [given_delta(method, n, params)[1] for n, method in enumerate(methods)]
    stacked = axes.count("s")
    for side, name in (("input", "a"), ("output", "b")):
        one, two = (np.asarray(delta["w"][name]) for delta in deltas)
        if name == "b":
            one, two = (np.moveaxis(x, stacked, -1) for x in (one, two))
        one, two = (x.reshape(int(np.prod(x.shape[:stacked])), -1, x.shape[-1]) for x in (one, two))

        @jax.jit
        def similarity(one, two, side=side):
            return analysis.of_adapters(methods[0], one, methods[1], two, side)["w"]

        if max(one.shape[2], two.shape[2]) > one.shape[1]:
            with pytest.raises(ValueError, match=f"w, side='{side}': . .* more columns than the width"):
                similarity(*deltas)
            continue
        got = similarity(*deltas)
        for n, (x, y) in enumerate(zip(one, two, strict=True)):
            np.testing.assert_allclose(got.phi[n], brute(x, y), rtol=0, atol=1e-4)
        np.testing.assert_array_equal(got.random, analysis.random_similarity(2, 3, one.shape[1]))


@jax.jit
def both_compared(one, two):
    alignment, distance = analysis.alignment, analysis.distance
    return alignment(one, two), distance(one, two), distance(one, one), alignment(two, two)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_alignment_and_distance_are_those_of_the_dense_updates(count, m, n, r, seed):
    one = analysis.Update(normal(count, m, r, seed=seed), normal(count, r, n, seed=seed + 1))
    two = analysis.Update(normal(count, m, 2, seed=seed + 2), normal(count, 2, n, seed=seed + 3))
    x, y = product(one), product(two)
    norms = [np.linalg.norm(each, axis=(1, 2)) for each in (x, y)]
    aligned, apart, same_apart, same_aligned = both_compared(one, two)
    near(aligned, np.sum(x * y, (1, 2)) / norms[0] / norms[1], 1e-4)
    near(apart, np.linalg.norm(x - y, axis=(1, 2)) / norms[1], 1e-5)
    np.testing.assert_allclose(same_apart, 0, atol=2e-6)  # some roundings; a sum of squares has 3e-4
    np.testing.assert_allclose(same_aligned, 1, atol=1e-5)


def test_two_adapters_are_compared_where_both_change_a_weight():
    params = {"q": normal(6, 5), "k": normal(6, 5), "v": normal(6, 5)}
    one = given_delta(lj.lora(lj.select("{q,k}"), rank=2), 1, params)
    two = given_delta(lj.lora(lj.select("{k,v}"), rank=3, alpha=1), 2, params)
    updates = [analysis.updates(*pair) for pair in (one, two)]
    compared = analysis.compare(*updates)
    assert set(compared) == {"k"}
    same(compared["k"].input, analysis.of_adapters(*one, *two)["k"])
    same(compared["k"].output, analysis.of_adapters(*one, *two, side="output")["k"])
    same(compared["k"].distance, analysis.distance(updates[0]["k"], updates[1]["k"]))
    same(compared["k"].alignment, analysis.alignment(updates[0]["k"], updates[1]["k"]))


def test_what_cannot_be_compared_is_said():
    x = normal(4, 2)
    for wrong in (normal(3, 2), normal(2)):
        with pytest.raises(ValueError, match=r"must be \(d, n\) and \(d, m\)"):
            analysis.subspace_similarity(x, wrong)
    with pytest.raises(ValueError, match=r"y \(4, 5\) has more columns than the width 4"):
        analysis.subspace_similarity(x, normal(4, 5))
    params = {"q": normal(6, 5), "v": normal(6, 5)}
    one, two = (given_delta(lj.lora(lj.select(path), rank=2), 1, params) for path in "qv")
    with pytest.raises(ValueError, match=r"no weight in common: \['q'\] ... and \['v'\]"):
        analysis.of_adapters(*one, *two)
    with pytest.raises(ValueError, match="side='left': choose one of"):
        analysis.of_adapters(*one, *one, side="left")
    wider = given_delta(lj.lora(lj.select("q"), rank=2), 1, {"q": normal(7, 5)})
    with pytest.raises(ValueError, match=r"q: the adapters are of different bases: .*\(1, 6, 5\) and \(1, 7, 5\)"):
        analysis.of_adapters(*one, *wider)
    with pytest.raises(ValueError, match=r"q: the adapters are of different bases"):
        analysis.compare(analysis.updates(*one), analysis.updates(*wider))
