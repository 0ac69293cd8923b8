"""Activation functions against torch's and jax's, and what they keep for their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import layers

X = np.concatenate([np.linspace(-12, 12, 2001), [0.0, 1e-6, -1e-6, 100.0, -100.0]]).astype(np.float32)
THEIRS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


@pytest.mark.parametrize("name", THEIRS)
def test_value_and_derivative(name):
    """To 2e-6: float32's rounding of 1 + erf where that is near 0."""
    ours, theirs = (lambda f: jax.vjp(f, X))(layers.ACTIVATIONS[name]), jax.vjp(THEIRS[name], X)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(ours[1](X)[0], theirs[1](X)[0], rtol=1e-5, atol=5e-5)


def test_gelu_is_torch_s():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X)
    np.testing.assert_allclose(layers.ACTIVATIONS["gelu"](X), torch.nn.functional.gelu(x), rtol=1e-6, atol=1e-6)
    half = layers.ACTIVATIONS["gelu"](jnp.asarray(X, jnp.bfloat16))
    expected = torch.nn.functional.gelu(x.bfloat16()).float()
    np.testing.assert_allclose(np.asarray(half, np.float32), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", THEIRS)
def test_only_the_input_is_kept(name):
    x = jnp.ones((4, 5))
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(layers.ACTIVATIONS[name], x)[1], x))
    assert [leaf.shape for leaf in kept if leaf.shape] == [(4, 5)]


def test_float64_and_forward_mode():
    with jax.enable_x64(True):
        x = jnp.linspace(-3.0, 3.0, 7, dtype=jnp.float64)
        ours = jax.jvp(layers.ACTIVATIONS["gelu"], (x,), (x,))
        theirs = jax.jvp(THEIRS["gelu"], (x,), (x,))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gated_s_values_and_derivatives():
    """To float64's rounding: both terms and both modes, against the product itself."""
    with jax.enable_x64(True):
        gate, up = jax.random.normal(jax.random.key(0), (2, 5, 7), jnp.float64) * 4
        both = (functools.partial(layers.gated, jax.nn.silu), lambda gate, up: jax.nn.silu(gate) * up)
        for mode in (jax.jacfwd, jax.jacrev):
            results = [mode(f, argnums=(0, 1))(gate, up) for f in both]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), *results)
        second = [jax.hessian(lambda g, f=f: f(g, up).sum())(gate) for f in both]
    np.testing.assert_allclose(*second, rtol=1e-12, atol=1e-14)


def test_a_compiled_gated_keeps_its_inputs_alone():
    """Three more MLPs with frozen weights keep two arrays each of the inner size, and their small inputs."""
    kernels = jnp.ones((2, 4, 512)), jnp.ones((512, 4))

    def temporary(depth):
        def loss(x, into, out):
            for _ in range(depth):
                x = jnp.sin(x) + layers.gated(layers.ACTIVATIONS["silu"], x @ into[0], x @ into[1]) @ out
            return x.sum()

        step = jax.jit(jax.grad(loss)).lower(jnp.ones((32, 4)), *kernels).compile()
        return step.memory_analysis().temp_size_in_bytes

    assert temporary(6) - temporary(3) < 3 * 2.2 * 32 * 512 * 4
