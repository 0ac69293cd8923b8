"""Changes as LoRA: errors are those of NumPy's truncated singular value decomposition of merged - base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import analysis
from tests.helpers.adapters import dense, given_delta, weights_and_ranks
from tests.helpers.dense import as_matrices, dense_changes
from tests.helpers.networks import Stack, started
from tests.helpers.reference import close, in_one_program, leaves, merged_params, normal

METHODS = {
    "lora": lambda w: lj.lora(w, rank=3, alpha=2, strict=False),
    "pissa": lambda w: lj.pissa(w, rank=1),
    "vera": lambda w: lj.vera(w, rank=3),
    "dora": lambda w: lj.dora(w, rank=2, strict=False),
    "lokr": lambda w: lj.lokr(w, rank=2, alpha=3),
    "ia3": lj.ia3,
    "tune": lj.tune,
}


def is_best(got, residual, want, size, rank):
    """`got` and its residual, of changes that are differences of matrices of this size, rounded."""
    values = np.linalg.svd(want, compute_uv=False)
    norm, tail = np.linalg.norm(values), np.linalg.norm(values[:, rank:])
    tolerance = 3e-6 * size * np.sqrt(want.size)
    assert abs(float(residual) * norm - tail) < tolerance
    assert abs(np.linalg.norm(got - want) - tail) < 2 * tolerance


@given(weights_and_ranks(), st.sampled_from(sorted(METHODS)))
def test_the_error_is_that_of_the_truncated_dense_change(case, name):
    axes, params, rank, _ = case
    method = METHODS[name](lj.select("w", axes=axes))
    delta = given_delta(method, 1, params)[1]
    want = dense_changes(method, params, delta, {"w": axes})["w"]
    rank = min(rank, *want.shape[1:])
    lora, as_lora, residual = in_one_program(lambda delta: analysis.to_lora(method, delta, rank, params), delta)
    assert lora.spec["method"] == "lora" and lora.spec["alpha"] is None
    got = dense(as_lora, axes.count("s"))
    is_best(got, residual.paths["w"], want, float(jnp.abs(params["w"]).max()) + np.abs(want).max(), rank)
    assert float(residual.total) == float(residual.paths["w"])


@given(weights_and_ranks())
def test_the_difference_of_two_models_is_extracted(case):
    axes, params, rank, _ = case
    tuned = {"w": params["w"] + normal(*params["w"].shape, seed=5)}
    want = as_matrices(tuned["w"], axes) - as_matrices(params["w"], axes)
    rank = min(rank, *want.shape[1:])
    _, delta, residual = in_one_program(
        lambda tuned: analysis.extract(params, tuned, lj.select("w", axes=axes), rank), tuned
    )
    got = dense(delta, axes.count("s"))
    is_best(got, residual.paths["w"], want, float(jnp.abs(tuned["w"]).max()), rank)


def test_biases_are_kept_whole_and_a_full_rank_is_the_tuned_model():
    params = started(Stack(layers=2), normal(4, 8, seed=5))
    tune = lj.tune(lj.select("**"))
    delta = given_delta(tune, 1, params)[1]
    tuned = merged_params(tune, params, delta)
    for convert in (
        lambda: analysis.to_lora(tune, delta, 8, params),
        lambda: analysis.extract(params, tuned, lj.select("**"), 8),
    ):
        method, as_lora, residual = convert()
        assert [part["method"] for part in method.spec["of"]] == ["lora", "bias_delta"]
        close(leaves(merged_params(method, params, as_lora)), leaves(tuned), 1e-5)
        assert set(residual.paths) == {path for path in leaves(params) if "kernel" in path} and residual.total < 1e-6


def test_a_bias_that_is_scaled_is_one_that_is_shifted():
    params = {"fc": {"kernel": normal(4, 3), "bias": normal(3)}}
    method, delta = given_delta(lj.ia3(lj.select("fc/kernel")), 1, params)
    lora, as_lora, _ = analysis.to_lora(method, delta, {"fc/*": 3}, params)
    close(merged_params(lora, params, as_lora), merged_params(method, params, delta), 1e-5)


def test_models_of_other_dtypes_are_subtracted_in_float32():
    params, tuned = {"w": normal(5, 4).astype(jnp.bfloat16)}, {"w": normal(5, 4, seed=1)}
    _, delta, _ = analysis.extract(params, tuned, lj.select("w"), 4)
    want = np.asarray(tuned["w"], np.float64) - np.asarray(params["w"].astype(jnp.float32), np.float64)
    np.testing.assert_allclose(np.asarray(delta["w"]["a"], np.float64) @ np.asarray(delta["w"]["b"]), want, atol=1e-5)


def test_an_adapter_of_many_layers_runs_under_jit_and_takes_a_rank_for_each_path():
    params = started(Stack(layers=2), normal(4, 8, seed=5))
    method = lj.dora(lj.select("**/kernel"), rank=2)
    delta = given_delta(method, 1, params)[1]
    ranks = {"**/up/*": 1, "**": 3}
    lora, as_lora, residual = in_one_program(lambda delta: analysis.to_lora(method, delta, ranks, params), delta)
    assert {path: factors["a"].shape[-1] for path, factors in as_lora.items()} == lora.spec["rank"]
    assert lora.spec["rank"]["h_0/up/kernel"] == 1 and lora.spec["rank"]["h_1/down/kernel"] == 3
    assert set(residual.paths) == set(as_lora)


def test_what_has_no_form_as_lora_is_said():
    params = {"kernel": normal(4, 3), "bias": normal(3)}
    lora = given_delta(lj.lora(lj.select("kernel"), rank=2), 1, params)
    for rank in (0, 4, 1.5, {"kernel": 4}):
        with pytest.raises(ValueError, match=r"kernel: rank=.* must be a whole number from 1"):
            analysis.to_lora(*lora, rank)
    with pytest.raises(ValueError, match=r"no glob of .* matches 'kernel'"):
        analysis.to_lora(*lora, {"other": 1})
    with pytest.raises(ValueError, match="nothing that this 'bias_delta' changes is a matrix"):
        analysis.to_lora(*given_delta(lj.bias_delta(lj.select("bias")), 1, params), 1)
    adapter = lj.adapter({"mlp_out": (2, 4)}, rank=2)
    with pytest.raises(ValueError, match=r"@mlp_out/adapter changes activations, and no weight"):
        analysis.to_lora(*given_delta(lj.chain(lora[0], adapter), 1, params), 1)
    prefix = lj.prefix_embedding(lj.select("kernel", axes="vo"), prefix=1)
    with pytest.raises(ValueError, match="'prefix_embedding' has rows of its own tokens"):
        analysis.to_lora(*given_delta(prefix, 1, params), 1)
    with pytest.raises(ValueError, match=r"kernel: what Dora changes .*pass params="):
        analysis.to_lora(*given_delta(lj.dora(lj.select("kernel"), rank=1), 1, params), 1)


def test_models_that_do_not_fit_are_said():
    params = {"kernel": normal(4, 3), "bias": normal(3)}
    for tuned, seen in (({"bias": normal(3)}, "none"), (params | {"kernel": normal(3, 4)}, r"\(3, 4\)")):
        with pytest.raises(ValueError, match=rf"kernel is \(4, 3\) in params, {seen} in tuned_params"):
            analysis.extract(params, tuned, lj.select("kernel"), 1)
    with pytest.raises(ValueError, match="matches no parameter"):
        analysis.extract(params, params, lj.select("query"), 1)
    with pytest.raises(ValueError, match="nothing that the selection has is a matrix"):
        analysis.extract(params, params, lj.select("bias"), 1)


def test_the_same_adapter_again_is_a_lora_of_its_rank():
    params = {"kernel": normal(6, 5)}
    method, delta = given_delta(lj.lora(lj.select("kernel"), rank=2, alpha=5), 1, params)
    lora, again, residual = analysis.to_lora(method, delta, 4)
    assert again["kernel"]["a"].shape == (6, 2) and residual.total == 0
    close(merged_params(lora, params, again), merged_params(method, params, delta), 1e-6)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(
        jnp.shape, jax.eval_shape(lora.init, jax.random.key(0), params)
    )
