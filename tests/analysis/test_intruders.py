"""Intruder dimensions, against NumPy's singular vectors and PEFT's own function."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import analysis
from tests.helpers.adapters import AXES, dense, given_delta, low_rank
from tests.helpers.dense import as_matrices, dense_changes
from tests.helpers.reference import in_one_program, normal, same


def brute(w, change, k, epsilon):
    """Cosines and values of the first k output directions of w + change, and which intrude; float64."""
    base = np.linalg.svd(w, full_matrices=False)[2]
    u, values, v = np.linalg.svd(w + change, full_matrices=False)
    cosines = np.abs(v[:k] @ base.T).max(1)
    return u[:, :k], values[:k], v[:k], cosines, cosines < epsilon


intruders = jax.jit(analysis.intruders, static_argnames=("k", "epsilon"))


@given(st.integers(2, 8), st.integers(2, 8), st.integers(1, 3), st.integers(0, 99))
def test_intruders_are_those_of_the_dense_matrices(m, n, k, seed):
    k = min(k, m, n)
    w, a, b = (normal(*shape, seed=seed + j) for j, shape in enumerate([(2, m, n), (2, m, 1), (2, 1, n)]))
    got = intruders(w, a, b, 2.0, k=k, epsilon=0.9)
    for each, x, y, *rows in zip(*[np.asarray(x, np.float64) for x in (w, a, b)], *got, strict=True):
        _, values, _, cosines, intrudes = brute(each, 2 * x @ y, k, 0.9)
        all_values = np.linalg.svd(each + 2 * x @ y, compute_uv=False)
        gap = np.min(-np.diff(all_values), initial=1) / all_values[0]  # between vectors that rounding may turn
        np.testing.assert_allclose(rows[1], values, rtol=1e-5)
        np.testing.assert_allclose(rows[0], cosines, rtol=0, atol=1e-5 / gap)
        assert np.array_equal(rows[2], intrudes) or np.abs(cosines - 0.9).min() < 1e-5 / gap


@given(st.sampled_from([axes for axes in AXES if axes != "kkio"]), st.integers(0, 99))
def test_scaled_intruders_lose_that_part_of_the_adapted_weight(axes, seed):
    """The mitigated change, cut to the adapter's rank by NumPy, for every layer of a stack."""
    params = {"w": normal(*(3, 4, 5, 6)[: len(axes)], seed=seed)}
    method, delta = given_delta(low_rank(axes, 2, alpha=3), seed, params)
    delta = jax.tree.map(lambda leaf: 3 * leaf, delta)
    w, change = as_matrices(params["w"], axes), 1.5 * dense(delta, axes.count("s"))
    k = min(3, *w.shape[1:])
    assume(min(w.shape[1:]) > 1)
    _, scaled, residual = in_one_program(
        lambda delta: analysis.scale_intruders(method, delta, params, 0.5, k=3, epsilon=0.8), delta
    )
    got = dense(scaled, axes.count("s"))
    left_out = 0.0
    for each, one, new in zip(w, change, got, strict=True):
        u, values, v, cosines, intrudes = brute(each, one, k, 0.8)
        assume(np.abs(cosines - 0.8).min() > 1e-3)
        u_cut, s, v_cut = np.linalg.svd(one - 0.5 * (u * values * intrudes) @ v, full_matrices=False)
        np.testing.assert_allclose(new, (u_cut[:, :2] * s[:2]) @ v_cut[:2], rtol=0, atol=2e-4 * s[0])
        left_out += np.sum(s[2:] ** 2)
    np.testing.assert_allclose(residual.paths["w"] ** 2, left_out / (left_out + np.sum(got**2)), atol=1e-4)


def test_biases_stay_and_without_intruders_the_change_does():
    params = {"w": {"kernel": 9 * normal(6, 5), "bias": normal(5)}}
    method = lj.chain(lj.lora(lj.select("**/kernel"), rank=2), lj.bias_delta(lj.select("**/bias")))
    delta = given_delta(method, 1, params)[1]
    milder, scaled, residual = analysis.scale_intruders(method, delta, params, epsilon=0.0)
    same(scaled["w/bias"], delta["w/bias"])
    changes = [
        dense_changes(m, params, d, {"w/kernel": "io"})["w/kernel"] for m, d in ((method, delta), (milder, scaled))
    ]
    np.testing.assert_allclose(changes[1], changes[0], atol=2e-5)
    assert residual.total < 1e-6


def test_what_has_no_intruders_to_scale_is_said():
    w = normal(4, 3)
    with pytest.raises(ValueError, match=r"k=4 is above min\(m, n\) = 3"):
        analysis.intruders(w, normal(4, 1), normal(1, 3), k=4)
    with pytest.raises(ValueError, match=r"k=0 must be a whole number from 1"):
        analysis.intruders(w, normal(4, 1), normal(1, 3), k=0)
    with pytest.raises(ValueError, match=r"the rank 4 of the update is above"):
        analysis.intruders(w, normal(4, 4), normal(4, 3), k=1)
    params = {"kernel": normal(4, 3), "bias": normal(3)}
    lora, dora = (make(lj.select("kernel"), rank=2) for make in (lj.lora, lj.dora))
    with pytest.raises(ValueError, match=r"strength=1.5 must be a number from 0 to 1"):
        analysis.scale_intruders(*given_delta(lora, 1, params), params, 1.5)
    with pytest.raises(ValueError, match=r"kernel: its change is of no low rank: .*to_lora"):
        analysis.scale_intruders(*given_delta(dora, 1, params), params)
    with pytest.raises(ValueError, match="nothing that this 'bias_delta' changes is a matrix"):
        analysis.scale_intruders(*given_delta(lj.bias_delta(lj.select("bias")), 1, params), params)
    with pytest.raises(ValueError, match=r"@mlp_out/adapter changes activations"):
        analysis.scale_intruders(*given_delta(lj.adapter({"mlp_out": (2, 4)}, rank=2), 1, params), params)


def test_peft_scales_the_same_intruders():
    """Of two Linear layers with large adapters: as many, and the same change to float32's roundings of vectors."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(14, 20), torch.nn.Linear(20, 12))
    weights = [layer.weight.detach().numpy().copy() for layer in model]
    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["0", "1"], r=4, lora_alpha=6))
    params, delta, lines = {}, lj.Delta(), []
    with torch.no_grad():
        for n, (layer, size) in enumerate(zip(made.base_model.model, (0.5, 0.05), strict=True)):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.normal_(0, size), b.normal_(0, size)
            params[str(n)] = {"weight": jnp.asarray(weights[n])}
            delta[f"{n}/weight"] = {"a": jnp.asarray(a.numpy().T), "b": jnp.asarray(b.numpy().T)}
    reduce_intruder_dimension(made, threshold_epsilon=0.6, mitigation_lambda=0.4, logging_sink=lines.append)
    method = lj.lora(lj.select("*/weight"), rank=4, alpha=6)
    milder, scaled, _ = analysis.scale_intruders(method, delta, params, 0.4, epsilon=0.6)
    got = analysis.updates(milder, scaled)
    weights, before = analysis.weights(method, delta, params), analysis.updates(method, delta)
    for n, layer in enumerate(made.base_model.model):
        want = layer.get_delta_weight("intruder_reduced").detach().numpy().T
        np.testing.assert_allclose(
            (got[f"{n}/weight"].a @ got[f"{n}/weight"].b)[0], want, atol=2e-5 * np.abs(want).max()
        )
        count = analysis.intruders(weights[f"{n}/weight"], *before[f"{n}/weight"], epsilon=0.6).intruder.sum()
        assert any(line.endswith(f"{n}: Intruders: {count}" if count else f"{n}: No intruders") for line in lines)
    assert "Intruders" in lines[0] and "No intruders" in lines[1]
