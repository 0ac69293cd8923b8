"""Truncations of adapters to a lower rank, against NumPy's singular values of the dense change."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.methods.arithmetic import add, truncate
from tests.helpers.adapters import all_merged, dense, given_delta, low_rank, weights_and_ranks
from tests.helpers.networks import Stack, started
from tests.helpers.reference import close, in_one_program, leaves, normal, same

KEY = jax.random.key(0)
PARAMS = started(Stack(layers=2), normal(4, 8, seed=5))
KERNELS = lj.select("**/kernel")
LORA = lj.lora(KERNELS, rank=2, alpha=3)


@given(weights_and_ranks(), st.integers(1, 7))
def test_a_truncation_is_as_near_as_any_matrix_of_its_rank(case, rank):
    """Each layer's singular values, by NumPy from the dense change: their tail is the error."""
    axes, params, have, _ = case
    low, before = given_delta(low_rank(axes, have), 1, params)
    method, delta, residual = in_one_program(lambda delta: truncate(low, delta, rank), before)
    dense_change, got = (dense(each, axes.count("s")) for each in (before, delta))
    values = np.linalg.svd(dense_change, compute_uv=False)
    norm = np.sqrt(np.sum(values**2))
    best = np.sqrt(np.sum(values[:, rank:] ** 2)) / norm
    kept = min(rank, have, *dense_change.shape[1:])
    assert method.spec["rank"] == {"w": kept}
    assert jax.tree.map(jnp.shape, delta) == jax.tree.map(jnp.shape, jax.eval_shape(method.init, KEY, params))
    # within roundings of float32, of the whole
    assert abs(float(residual.paths["w"]) - best) < 2e-6 and float(residual.total) == float(residual.paths["w"])
    assert abs(np.linalg.norm(got - dense_change) / norm - best) < 2e-6


def test_truncation_forms_no_array_as_large_as_the_weight():
    params = {"one": normal(64, 96), "stack": normal(3, 64, 96)}
    selection = lj.select("*", axes={"one": "io", "stack": "sio"})
    method, delta = given_delta(lj.lora(selection, rank=4), 1, params)

    def both(delta):
        return truncate(*add([(method, delta), (method, delta)], [1, 2]), 3)[1:]

    def outputs(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in eqn.outvars)
            for inner in (x for x in eqn.params.values() if hasattr(x, "eqns")):
                yield from outputs(getattr(inner, "jaxpr", inner))

    sizes = list(outputs(jax.make_jaxpr(both)(delta)))
    assert len(sizes) > 50 and max(sizes) == 3 * 96 * 8  # B of rank 8 of the stack; less than one 64 x 96


def test_a_truncation_keeps_the_rest_and_takes_a_rank_for_each_path():
    method = lj.chain(lj.lora(KERNELS, rank=4), lj.tune(lj.select("h_0/*/bias")), lj.shift(lj.select("h_1/*/bias")))
    delta = given_delta(method, 1, PARAMS)[1]
    small, cut, residual = in_one_program(lambda delta: truncate(method, delta, {"**/up/*": 1, "**": 4}), delta)
    for path in delta:
        if "bias" in path:
            same(cut[path], delta[path])
        else:
            assert cut[path]["a"].shape[-1] == (1 if "up" in path else 4)
    assert set(residual.paths) == {path for path in delta if "kernel" in path}
    assert all(float(share) == 0 for path, share in residual.paths.items() if "up" not in path)
    norms = {
        path: np.linalg.norm(np.asarray(delta[path]["a"]) @ np.asarray(delta[path]["b"])) for path in residual.paths
    }
    lost = [norm * float(residual.paths[path]) for path, norm in norms.items()]
    assert abs(float(residual.total) - np.linalg.norm(lost) / np.linalg.norm([*norms.values()])) < 1e-5
    got, want = all_merged([(small, cut), (method, delta)], PARAMS)
    close(got["h_0/down/kernel"], want["h_0/down/kernel"], 1e-6)


def test_a_change_of_zero_is_truncated_without_nan():
    _, delta, residual = in_one_program(lambda key: truncate(LORA, LORA.init(key, PARAMS), 1), KEY)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(residual))
    same(all_merged([(lj.lora(KERNELS, rank=1), delta)], PARAMS)[0], leaves(PARAMS))
