"""The trained shift of a bias."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods.bias_delta import bias_delta
from tests.helpers.networks import Stack, stacked, started
from tests.helpers.reference import close, merged_params, normal, random_delta, same

KEY = jax.random.key(0)
X = normal(4, 8)
MODEL = Stack(layers=2)
PARAMS = started(MODEL, X)
METHOD = bias_delta(lj.select("**/bias"), scale={"**/up/*": 2.0, "**": -0.5})


def test_it_adds_scale_times_shift_to_the_bias():
    delta = random_delta(METHOD, PARAMS)
    merged = merged_params(METHOD, PARAMS, delta)
    base, moved = jax.tree.map(np.asarray, (PARAMS, dict(delta)))
    up, down = base["h_0"]["up"]["bias"], base["h_1"]["down"]["bias"]
    close(merged["h_0"]["up"]["bias"], up + np.float32(2.0) * moved["h_0/up/bias"]["shift"])
    close(merged["h_1"]["down"]["bias"], down - np.float32(0.5) * moved["h_1/down/bias"]["shift"])
    same(merged["h_0"]["up"]["kernel"], PARAMS["h_0"]["up"]["kernel"])
    half = merged_params(METHOD, PARAMS, delta, strength=0.5)
    close(half["h_0"]["up"]["bias"], up + moved["h_0/up/bias"]["shift"])


def test_it_takes_gradients_through_lift_and_none_for_the_base():
    delta = random_delta(METHOD, PARAMS)

    def loss(params, delta):
        run = lj.lift(lambda params: MODEL.apply({"params": params}, X), on_dense="error")
        return jnp.sum(jnp.sin(run(METHOD.apply(params, delta))))

    def densely(delta):
        return jnp.sum(jnp.sin(MODEL.apply({"params": lj.merge(METHOD.apply(PARAMS, delta))}, X)))

    (of_base, got), want = jax.jit(lambda p, d: (jax.grad(loss, (0, 1))(p, d), jax.grad(densely)(d)))(PARAMS, delta)
    close(got, want, 2e-5)
    assert not np.any(of_base["h_0"]["up"]["bias"]) and np.any(of_base["h_0"]["up"]["kernel"])


@pytest.mark.parametrize("remat", [False, True])
def test_the_scanned_layout_is_the_same_function(remat):
    loop = bias_delta(lj.select("**/bias"), scale=2.0)
    delta = random_delta(loop, PARAMS)
    other = {name: np.stack([delta[f"h_{n}/{name}/bias"]["shift"] for n in (0, 1)]) for name in ("up", "down")}
    other = lj.Delta({f"h/{name}/bias": {"shift": value} for name, value in other.items()})
    model, params = Stack(layers=2, scan=True, remat=remat), stacked(PARAMS, 2)
    run = lj.lift(model.apply, on_dense="error")
    outputs = jax.jit(
        lambda d, other: (
            run({"params": loop.apply(params, other)}, X),
            MODEL.apply({"params": lj.merge(loop.apply(PARAMS, d))}, X),
        )
    )
    close(*outputs(delta, other))


def test_unmerging_gives_the_base_back():
    delta = random_delta(METHOD, PARAMS)
    merged = merged_params(METHOD, PARAMS, delta)
    close(jax.jit(lambda merged, d: lj.unmerge(merged, METHOD, d))(merged, delta), PARAMS, 1e-6)


def test_a_low_precision_base_is_rounded_once():
    params = {"bias": np.asarray(normal(64)).astype(jnp.bfloat16)}
    method = bias_delta(lj.select("bias"), scale=0.3)
    delta = random_delta(method, params)
    change = np.float32(0.3) * np.asarray(delta["bias"]["shift"])
    want = (params["bias"].astype(np.float32) + change).astype(jnp.bfloat16)
    same(merged_params(method, params, delta)["bias"], want)


def test_what_cannot_work_is_said():
    with pytest.raises(ValueError, match=r"layers=\(1,\)"):
        bias_delta(lj.select("**/bias", layers=[1])).init(KEY, PARAMS)
    with pytest.raises(ValueError, match="no glob of"):
        partly = bias_delta(lj.select("**/bias"), scale={"**/up/*": 1.0})
        partly.apply(PARAMS, random_delta(partly, PARAMS))
    delta = random_delta(METHOD, PARAMS)
    with pytest.raises(ValueError, match="h_0/up/bias: the delta's factors"):
        METHOD.apply(PARAMS, lj.Delta(delta | {"h_0/up/bias": {"shift": jnp.ones(3)}}))
    kept = lj.without_tuned(PARAMS, random_delta(lj.tune(lj.select("h_0/up/bias")), PARAMS))
    with pytest.raises(ValueError, match="was taken out"):
        METHOD.apply(kept, delta)


def test_its_spec_is_json():
    again = lj.from_spec(json.loads(json.dumps(METHOD.spec)))
    delta = random_delta(METHOD, PARAMS)
    same(again.apply(PARAMS, delta), METHOD.apply(PARAMS, delta))
    assert lj.from_spec(METHOD.spec | {"peft": {"x": [1]}}).spec["peft"] == {"x": [1]}
