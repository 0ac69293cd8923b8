"""TIES and DARE, against entries in NumPy and PEFT's own functions."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import lora_jax as lj
from tests.helpers.adapters import dense, given_delta, low_rank, weights_and_ranks
from tests.helpers.dense import dense_changes
from tests.helpers.reference import close, in_one_program, leaves, merged_params, normal

KEY = jax.random.key(3)
WEIGHTS = [0.7, -1.5, 2.0]


def largest(change, density):
    """Row by row: the entries of a stack's layers that are largest in size."""
    flat = change.reshape(len(change), -1)
    kept = np.zeros_like(flat)
    for row, out in zip(flat, kept, strict=True):
        order = np.argsort(-np.abs(row))[: int(density * row.size)]
        out[order] = row[order]
    return kept.reshape(change.shape)


def elected(changes, weights):
    signs = np.where(sum(changes) >= 0, 1, -1)
    agrees = [np.sign(change) == signs for change in changes]
    total = sum(np.where(yes, weight * x, 0) for yes, weight, x in zip(agrees, weights, changes, strict=True))
    return total / np.maximum(sum(yes.astype(int) for yes in agrees), 1)


def cut(changes, rank):
    u, s, v = np.linalg.svd(changes, full_matrices=False)
    return (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank], np.linalg.norm(s[:, rank:]) / np.linalg.norm(s)


def three(axes, params, *ranks):
    pairs = [given_delta(low_rank(axes, rank, alpha=3), n, params) for n, rank in enumerate((*ranks, 2))]
    changes = [dense(delta, axes.count("s")) for _, delta in pairs]
    return pairs, [3 / rank * change for rank, change in zip((*ranks, 2), changes, strict=True)]


@given(weights_and_ranks(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_ties_of_every_layout(case, density):
    axes, params, *ranks = case
    pairs, changes = three(axes, params, *ranks)
    sorted_sizes = np.sort(np.abs(np.stack(changes)).reshape(3, len(changes[0]), -1), -1)
    assume(sorted_sizes.shape[-1] == 1 or np.diff(sorted_sizes).min() > 1e-4)  # else rounding chooses
    want = elected([largest(change, density) for change in changes], WEIGHTS)
    assume(np.abs(want).max() > 0.1)
    assume(np.abs(sum(largest(change, density) for change in changes))[want != 0].min() > 1e-4)
    whole = min(want.shape[1:])
    method, delta, residual = in_one_program(
        lambda *deltas: lj.arithmetic.ties(
            [(m, d) for (m, _), d in zip(pairs, deltas, strict=True)], WEIGHTS, density, whole
        ),
        *[delta for _, delta in pairs],
    )
    got = dense(delta, axes.count("s"))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert residual.total == 0 and method.spec["rank"] == {"w": whole}


def dropped(change, path, n, density):
    """By the documented keys: a mask of its own for each path and pair."""
    key = jax.random.fold_in(jax.random.fold_in(KEY, lj.stable_hash(path)), n)
    mask = jax.random.bernoulli(key, density, (len(change), change[0].size))
    return np.asarray(mask, np.float64).reshape(change.shape) * change / density


@pytest.mark.parametrize("with_ties", [False, True])
@pytest.mark.parametrize("axes", ["io", "sio", "ioo"])
def test_dare_drops_at_random_and_divides(axes, with_ties):
    params = {"w": normal(*(3, 8, 6)[: len(axes)])}
    pairs, changes = three(axes, params, 2, 3)
    pruned = [dropped(change, "w", n, 0.4) for n, change in enumerate(changes)]
    weighted = sum(weight * change for weight, change in zip(WEIGHTS, pruned, strict=True))
    want, left_out = cut(elected(pruned, WEIGHTS) if with_ties else weighted, 2)
    method, delta, residual = lj.arithmetic.dare(pairs, WEIGHTS, 0.4, 2, KEY, ties=with_ties)
    np.testing.assert_allclose(
        dense_changes(method, params, delta, {"w": axes})["w"], want, atol=2e-5 * np.abs(want).max()
    )
    np.testing.assert_allclose(residual.total, left_out, rtol=1e-4)
    again = lj.arithmetic.dare(pairs, WEIGHTS, 0.4, 2, KEY, ties=with_ties)[1]
    other = lj.arithmetic.dare(pairs, WEIGHTS, 0.4, 2, jax.random.key(4), ties=with_ties)[1]
    close(again, delta, 0.0)
    assert np.abs(other["w"]["b"] - delta["w"]["b"]).max() > 1e-3


def test_dare_is_the_sum_in_expectation():
    """The mean of 300 keys, within five standard errors."""
    params = {"w": normal(6, 5)}
    pairs, changes = three("io", params, 2, 3)

    @jax.jit
    def merged(key):
        _, delta, _ = lj.arithmetic.dare(pairs, WEIGHTS, 0.5, 5, key)
        return delta["w"]["a"] @ delta["w"]["b"]

    drawn = np.stack([merged(jax.random.key(n)) for n in range(300)])
    want = sum(weight * change[0] for weight, change in zip(WEIGHTS, changes, strict=True))
    assert (np.abs(drawn.mean(0) - want) < 5 * drawn.std(0) / np.sqrt(300) + 1e-5).all()


def test_of_any_methods_with_their_biases():
    """DoRA, LoKr and tuned leaves are merged as dense changes, and biases as they are, as a shift."""
    params = {"fc": {"kernel": normal(6, 5), "bias": normal(5)}, "out": {"kernel": normal(5, 4)}}
    kernel = lj.select("fc/kernel")
    dora = lj.chain(lj.dora(kernel, rank=2), lj.bias_delta(lj.select("fc/bias"), scale=2.0))
    pairs = [given_delta(m, n, params) for n, m in enumerate([dora, lj.lokr(kernel, rank=2), lj.tune(lj.select("**"))])]
    method, delta, residual = lj.arithmetic.ties(pairs, WEIGHTS, 0.5, {"fc/*": 5, "out/*": 1}, params=params)
    axes = {"fc/kernel": "io", "fc/bias": "o", "out/kernel": "io"}
    all_changes = [dense_changes(m, params, d, axes) for m, d in pairs]
    got = dense_changes(method, params, delta, axes)
    for path, terms in (("fc/kernel", (0, 1, 2)), ("fc/bias", (0, 2))):
        want = elected([largest(all_changes[n][path], 0.5) for n in terms], [WEIGHTS[n] for n in terms])
        np.testing.assert_allclose(got[path], want, atol=1e-5)
    want = cut(2 * largest(all_changes[2]["out/kernel"], 0.5), 1)
    np.testing.assert_allclose(got["out/kernel"], want[0], atol=1e-5)
    np.testing.assert_allclose(residual.paths["out/kernel"], want[1], rtol=1e-4)
    assert {part["method"] for part in method.spec["of"]} == {"lora", "bias_delta"}
    assert set(leaves(merged_params(method, params, delta))) == set(leaves(params))


def test_weights_may_be_traced():
    params = {"w": normal(6, 5)}
    pairs, _ = three("io", params, 2, 3)
    merge = lambda weights: lj.arithmetic.ties(pairs, weights, 0.5, 5)[1]  # noqa: E731
    close(jax.jit(lambda weights: merge(list(weights)))(np.float32(WEIGHTS)), merge(WEIGHTS), 1e-5)


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties"])
def test_peft_merges_alike(kind, monkeypatch):
    """`peft.utils.merge_utils` of the same dense changes, with our masks in the place of torch's."""
    pytest.importorskip("peft")
    import torch
    from peft.utils import merge_utils

    params = {"w": normal(12, 9)}
    pairs, changes = three("io", params, 2, 4)
    tensors = [torch.tensor(change[0], dtype=torch.float32) for change in changes]
    masks = iter(dropped(np.ones((1, 12, 9)), "w", n, 0.4)[0] * 0.4 for n in range(3))
    monkeypatch.setattr(torch, "bernoulli", lambda x: torch.tensor(np.round(next(masks)), dtype=x.dtype))
    want = getattr(merge_utils, kind)(tensors, torch.tensor(WEIGHTS), 0.4).numpy()
    if kind == "ties":
        method, delta, _ = lj.arithmetic.ties(pairs, WEIGHTS, 0.4, 9)
    else:
        method, delta, _ = lj.arithmetic.dare(pairs, WEIGHTS, 0.4, 9, KEY, ties=kind == "dare_ties")
    got = dense_changes(method, params, delta, {"w": "io"})["w"][0]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())


def test_what_cannot_be_merged_is_said():
    params = {"kernel": normal(4, 3), "bias": normal(3)}
    one = given_delta(lj.lora(lj.select("kernel"), rank=2), 1, params)
    for density in (0, 1.1, -1, True):
        with pytest.raises(ValueError, match=r"density=.* must be a number above 0 to 1"):
            lj.arithmetic.ties([one], [1], density, 1)
        with pytest.raises(ValueError, match=r"density=.* must be a number above 0 to 1"):
            lj.arithmetic.dare([one], [1], density, 1, KEY)
    for pairs, weights in (([], []), ([one], [1, 2])):
        with pytest.raises(ValueError, match=f"{len(pairs)} pairs and {len(weights)} weights"):
            lj.arithmetic.ties(pairs, weights, 0.5, 1)
    with pytest.raises(ValueError, match=r"kernel: rank=0 must be a whole number from 1"):
        lj.arithmetic.ties([one], [1], 0.5, 0)
    other = given_delta(lj.lora(lj.select("kernel"), rank=2), 1, {"kernel": normal(3, 4)})
    with pytest.raises(ValueError, match=r"kernel: the adapters are of different bases: io \(3, 4\) and io \(4, 3\)"):
        lj.arithmetic.ties([one, other], [1, 1], 0.5, 1)
    square = {"w": normal(3, 3)}
    with pytest.raises(ValueError, match=r"w: the adapters are of different bases: io \(3, 3\) and oi \(3, 3\)"):
        lj.arithmetic.ties([given_delta(low_rank(axes, 1), 1, square) for axes in ("io", "oi")], [1, 1], 0.5, 1)
    with pytest.raises(ValueError, match="nothing that this 'bias_delta' changes is a matrix"):
        lj.arithmetic.ties([given_delta(lj.bias_delta(lj.select("bias")), 1, params)], [1], 0.5, 1)
    with pytest.raises(ValueError, match="@mlp_out/adapter changes activations"):
        lj.arithmetic.ties([one, given_delta(lj.adapter({"mlp_out": (2, 4)}, rank=2), 1, params)], [1, 1], 0.5, 1)
