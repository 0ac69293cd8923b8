"""The trained shift of a bias."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods.bias_delta import bias_delta
from tests.helpers.networks import Stack, stacked, started
from tests.helpers.reference import close, filled, normal, same

KEY = jax.random.key(0)
X = normal(4, 8)
MODEL = Stack(layers=2)
PARAMS = started(MODEL, X)
METHOD = bias_delta(lj.select("**/bias"), scale={"**/up/*": 2.0, "**": -0.5})


def test_it_adds_scale_times_shift_to_the_bias():
    delta = filled(METHOD.init(KEY, PARAMS))
    merged = lj.merge(METHOD.apply(PARAMS, delta))
    close(merged["h_0"]["up"]["bias"], PARAMS["h_0"]["up"]["bias"] + 2.0 * delta["h_0/up/bias"]["shift"])
    close(merged["h_1"]["down"]["bias"], PARAMS["h_1"]["down"]["bias"] - 0.5 * delta["h_1/down/bias"]["shift"])
    same(merged["h_0"]["up"]["kernel"], PARAMS["h_0"]["up"]["kernel"])
    half = METHOD.apply(PARAMS, delta, strength=0.5)
    close(lj.merge(half)["h_0"]["up"]["bias"], PARAMS["h_0"]["up"]["bias"] + delta["h_0/up/bias"]["shift"])


def test_it_takes_gradients_through_lift_and_none_for_the_base():
    delta = filled(METHOD.init(KEY, PARAMS))

    def loss(params, delta):
        run = lj.lift(lambda params: MODEL.apply({"params": params}, X), on_dense="error")
        return jnp.sum(jnp.sin(run(METHOD.apply(params, delta))))

    def densely(delta):
        return jnp.sum(jnp.sin(MODEL.apply({"params": lj.merge(METHOD.apply(PARAMS, delta))}, X)))

    of_base, got = jax.jit(jax.grad(loss, (0, 1)))(PARAMS, delta)
    close(got, jax.grad(densely)(delta), 2e-5)
    assert not np.any(of_base["h_0"]["up"]["bias"]) and np.any(of_base["h_0"]["up"]["kernel"])


@pytest.mark.parametrize("remat", [False, True])
def test_the_scanned_layout_is_the_same_function(remat):
    loop = bias_delta(lj.select("**/bias"), scale=2.0)
    delta = filled(loop.init(KEY, PARAMS))
    other = {name: jnp.stack([delta[f"h_{n}/{name}/bias"]["shift"] for n in (0, 1)]) for name in ("up", "down")}
    other = lj.Delta({f"h/{name}/bias": {"shift": value} for name, value in other.items()})
    model, params = Stack(layers=2, scan=True, remat=remat), stacked(PARAMS, 2)
    run = lj.lift(model.apply, on_dense="error")
    want = MODEL.apply({"params": lj.merge(loop.apply(PARAMS, delta))}, X)
    close(run({"params": loop.apply(params, other)}, X), want)


def test_unmerging_gives_the_base_back():
    delta = filled(METHOD.init(KEY, PARAMS))
    close(lj.unmerge(lj.merge(METHOD.apply(PARAMS, delta)), METHOD, delta), PARAMS, 1e-6)


def test_a_low_precision_base_is_rounded_once():
    params = {"bias": normal(64).astype(jnp.bfloat16)}
    method = bias_delta(lj.select("bias"), scale=0.3)
    delta = filled(method.init(KEY, params))
    want = (params["bias"].astype(jnp.float32) + 0.3 * delta["bias"]["shift"]).astype(jnp.bfloat16)
    same(lj.merge(method.apply(params, delta))["bias"], want)


def test_what_cannot_work_is_said():
    with pytest.raises(ValueError, match=r"layers=\(1,\)"):
        bias_delta(lj.select("**/bias", layers=[1])).init(KEY, PARAMS)
    with pytest.raises(ValueError, match="no glob of"):
        partly = bias_delta(lj.select("**/bias"), scale={"**/up/*": 1.0})
        partly.apply(PARAMS, partly.init(KEY, PARAMS))
    delta = METHOD.init(KEY, PARAMS)
    with pytest.raises(ValueError, match="h_0/up/bias: the delta's factors"):
        METHOD.apply(PARAMS, lj.Delta(delta | {"h_0/up/bias": {"shift": jnp.ones(3)}}))
    kept = lj.without_tuned(PARAMS, lj.tune(lj.select("h_0/up/bias")).init(KEY, PARAMS))
    with pytest.raises(ValueError, match="was taken out"):
        METHOD.apply(kept, delta)


def test_its_spec_is_json():
    again = lj.from_spec(json.loads(json.dumps(METHOD.spec)))
    delta = filled(METHOD.init(KEY, PARAMS))
    same(lj.merge(again.apply(PARAMS, delta)), lj.merge(METHOD.apply(PARAMS, delta)))
    assert lj.from_spec(METHOD.spec | {"peft": {"x": [1]}}).spec["peft"] == {"x": [1]}
