"""Attention against JAX's own, and what it saves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.models.attention import attend, joined_heads, split_heads
from lora_jax.models.masks import attention_mask
from lora_jax.planning.flops import equations


def inputs(b: int, n: int, heads: int, size: int, seed: int = 0) -> list[Any]:
    return [jax.random.normal(key, (b, n, heads * size)) for key in jax.random.split(jax.random.key(seed), 3)]


def own(heads: int, mask: Any, *qkv: Any, block: int = 0) -> Any:
    return joined_heads(attend(*(split_heads(x, heads) for x in qkv), mask, block=block))


def of_jax(heads: int, mask: Any, *qkv: Any) -> Any:
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in qkv)
    return jax.nn.dot_product_attention(query, key, value, mask=mask).reshape(qkv[0].shape)


@settings(max_examples=4)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_outputs_and_gradients_are_those_of_jax(b: int, n: int, heads: int, size: int, causal: bool, seed: int) -> None:
    qkv = inputs(b, n, heads, size, seed)
    real = jnp.arange(n)[None] < jax.random.randint(jax.random.key(seed), (b, 1), 1, n + 1)
    mask = attention_mask(real, None, causal=n if causal else 0)

    def both(fn: Any) -> Any:
        cubes = jax.jit(jax.grad(lambda qkv: (fn(heads, mask, *qkv) ** 3).sum()))
        return jax.jit(lambda qkv: fn(heads, mask, *qkv))(qkv), cubes(qkv)

    # float32 sums of at most 9 x 5 products in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), both(own), both(of_jax))


@settings(max_examples=4)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 99))
def test_blocks_of_queries_change_nothing(n: int, block: int, causal: bool, padded: bool, seed: int) -> None:
    qkv = inputs(2, n, 2, 3, seed)
    real = jnp.arange(n)[None] < jax.random.randint(jax.random.key(seed), (2, 1), 1, n + 1)
    mask = attention_mask(real if padded else None, None, causal=n if causal else 0)
    expected = jax.jit(jax.value_and_grad(lambda qkv: (own(2, mask, *qkv) ** 3).sum()))(qkv)
    blocks = jax.jit(jax.value_and_grad(lambda qkv: (own(2, mask, *qkv, block=block) ** 3).sum()))(qkv)
    # keys' and values' gradients are summed block by block
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), expected, blocks)


def test_with_blocks_no_scores_of_all_pairs_exist() -> None:
    n = 24
    qkv, mask = inputs(1, n, 2, 3), attention_mask(None, None, causal=n)

    def largest(block: int) -> int:
        grad = jax.make_jaxpr(jax.grad(lambda qkv: own(2, mask, *qkv, block=block).sum()))(qkv)
        values = [var.aval for eqn in equations(grad.jaxpr) for var in eqn.outvars]
        return max(value.size for value in values if value.dtype == jnp.float32)

    assert largest(0) == 2 * n * n
    assert largest(6) < n * n


def test_who_sees_nobody_has_no_nan_and_bfloat16_stays() -> None:
    qkv = [x.astype(jnp.bfloat16) for x in inputs(2, 4, 2, 3)]
    outputs = own(2, jnp.zeros((1, 1, 4, 4), bool), *qkv)
    assert outputs.dtype == jnp.bfloat16 and bool(jnp.isfinite(outputs).all())


def test_less_is_moved_than_with_places_before_heads() -> None:
    qkv, mask = inputs(4, 64, 4, 32), attention_mask(None, None, causal=64)

    def moved(f: Any) -> float:
        grad = jax.jit(jax.grad(lambda qkv: f(4, mask, *qkv).sum()))
        return grad.lower(qkv).compile().cost_analysis()["bytes accessed"]

    assert moved(own) < 0.95 * moved(of_jax)
