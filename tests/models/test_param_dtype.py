"""Parameters kept in 16 bits: half the bytes, the function of their rounded values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import encoder, gpt2

MODELS = {
    "gpt2": gpt2.GPT2(
        gpt2.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, param_dtype="bfloat16")
    ),
    "encoder": encoder.Encoder(
        encoder.EncoderConfig(
            vocab_size=40, max_positions=18, hidden=16, layers=2, heads=2, inner=32, param_dtype="bfloat16"
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_in_bfloat16(name):
    model, tokens = MODELS[name], jax.random.randint(jax.random.key(1), (2, 9), 2, 40)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    float32_params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    method = lj.lora(lj.select("**/{query,up}/kernel", axes=gpt2.AXES), rank=2, a_init="gaussian")
    delta = jax.tree.map(lambda x: x + 0.02, method.init(jax.random.key(2), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype("float32")}
    apply = lj.lift(model.apply)
    outputs = apply({"params": method.apply(params, delta)}, tokens)
    # it computes in float32: the same numbers but for the order of sums
    np.testing.assert_allclose(outputs, apply({"params": method.apply(float32_params, delta)}, tokens), atol=2e-5)
