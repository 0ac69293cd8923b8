"""Llamas with LoRA on meshes of eight devices: losses and gradients as on one, also where the heads of keys and values
do not divide over `tensor`."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.core import selection
from lora_jax.core.selection import look_up
from lora_jax.distributed import sharding
from lora_jax.models import layers, layouts
from lora_jax.models.family import new_cache
from lora_jax.models.llama import AXES, FAMILIES, Llama, LlamaConfig
from lora_jax.planning import collectives
from tests.helpers.meshes import mesh_of

LENGTH = 18
SIZES: dict[str, Any] = {"vocab_size": 52, "max_length": 24, "hidden": 32, "layers": 2, "heads": 12, "head_size": 8}
SIZES |= {"inner": 40, "eps": 1e-5}
WINDOWS: dict[str, Any] = {"window": 5, "local": (True, False)}


def config_of(family: str, key_heads: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(family, key_value_heads=key_heads, **(SIZES | FAMILIES[family] | options))


CONFIGS = {
    "1": config_of("llama", 1),
    "2": config_of("llama", 2, scan_layers=True, remat=True),
    "3": config_of("llama", 3),
    "3 of 6, scan": config_of("llama", 3, heads=6, scan_layers=True),  # 6 heads do not divide over 4 either
    "3, odd features": config_of("llama", 3, head_size=10, bias="all"),  # nor 30 features of the keys
    "6": config_of("llama", 6),
    "mistral, 3": config_of("mistral", 3, **WINDOWS, query_block=5),
    "qwen3, 3, scan": config_of("qwen3", 3, scan_layers=True),
    "gemma2, 3": config_of("gemma2", 3, **WINDOWS, score_cap=20.0, logit_cap=9.0),
    "gemma3, 3, scan, remat": config_of("gemma3_text", 3, **WINDOWS, scan_layers=True, remat=True, query_block=7),
}
MESHES = [(4, 2, 1), (2, 2, 2), (1, 2, 4)]
METHOD = lj.lora(lj.select("**/{attn,mlp}/*/kernel", axes=AXES), rank=2, alpha=8)


@functools.cache
def setup(config: LlamaConfig) -> tuple:
    """Parameters, a delta that is not zero, and eight texts of 6 to 18 tokens."""
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(1, config.vocab_size, (8, LENGTH)), jnp.int32)
    mask = jnp.asarray(np.arange(LENGTH) < random.integers(6, LENGTH + 1, (8, 1)))
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    delta = jax.eval_shape(METHOD.init, jax.random.key(1), params)
    delta = jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), delta)
    return params, delta, {"tokens": tokens, "mask": mask}


def loss_of(model: Llama, delta: Any, params: Any, batch: Any) -> jax.Array:
    apply = lj.lift(model.apply, on_dense="error")
    logits = apply({"params": METHOD.apply(params, delta)}, batch["tokens"], batch["mask"])[:, :-1]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(nll, where=batch["mask"][:, 1:])


@functools.cache
def on_one_device(config: LlamaConfig) -> tuple:
    params, delta, batch = setup(config)
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, Llama(config))))(delta, params, batch)


def on_mesh(config: LlamaConfig, mesh: jax.sharding.Mesh) -> tuple:
    """The model and its parameters, delta and batch, on the mesh."""
    model, (params, delta, batch) = sharding.on_mesh(Llama(config), mesh), setup(config)
    placement = sharding.Placement.of(model, mesh)
    adapted = jax.eval_shape(METHOD.apply, params, delta)
    places = placement.shardings(delta, adapted), placement.shardings(params), sharding.batch_sharding(mesh)
    return model, *(jax.device_put(x, place) for x, place in zip((delta, params, batch), places, strict=True))


def compiled_with_warnings(fn: Any, *arguments: Any) -> Any:
    """The compiled program, compiled anew: what was kept of an earlier run comes without the compiler's warnings."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        return jax.jit(fn).lower(*arguments).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


QUICK = ("qwen3, 3, scan", (1, 2, 4))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow)
        for case in itertools.product(CONFIGS, MESHES)
    ],
)
def test_losses_and_gradients_are_those_of_one_device(name, sizes, capfd):
    model, *arguments = on_mesh(CONFIGS[name], mesh_of(*sizes))
    compiled = compiled_with_warnings(jax.value_and_grad(functools.partial(loss_of, model)), *arguments)
    (value, grads), (expected, theirs) = compiled(*arguments), on_one_device(CONFIGS[name])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(theirs))
    for path, factors in grads.items():
        for factor, ours in factors.items():
            np.testing.assert_allclose(ours, theirs[path][factor], rtol=0, atol=1e-5 * largest, err_msg=path)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    sent = collectives.of_program(compiled.as_text(), dict(zip(sharding.AXES, sizes, strict=True)))
    of_numbers = [one for one in sent if one.bytes > sum(map(math.prod, one.shapes))]  # others are masks
    assert not [one for one in of_numbers if any(len(x) > 3 and x[-1] == LENGTH for x in one.shapes)]  # scores stay


@pytest.mark.slow
@pytest.mark.parametrize("name", ["3", "gemma3, 3, scan, remat"])
def test_steps_with_a_cache_are_those_of_one_device(name):
    """Fourteen tokens, padded on the left, then one more."""
    config = CONFIGS[name]
    params, _, batch = setup(config)
    tokens = batch["tokens"][:, :15]
    mask = jnp.arange(15)[None] >= jnp.arange(8)[:, None]
    model, _, placed, _ = on_mesh(config, mesh_of(1, 2, 4))

    @jax.jit
    def last(params, tokens, mask):
        cache = new_cache(model, 8, 15)
        _, cache = model.apply({"params": params}, tokens[:, :-1], mask[:, :-1], cache=cache)
        return model.apply({"params": params}, tokens[:, -1:], mask[:, -1:], cache=cache)[0][:, 0]

    expected = jax.jit(Llama(config).apply)({"params": params}, tokens, mask)[:, -1]
    tolerance = 1e-5 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(last(placed, tokens, mask), expected, rtol=0, atol=tolerance)


def test_heads_that_do_not_divide_are_named(caplog):
    mesh, divides = mesh_of(1, 2, 4), CONFIGS["3"]
    layouts.log_replicated.cache_clear()
    for _ in range(2):
        rules = sharding.rules_for(Llama(divides), mesh)
    (message,) = caplog.messages
    assert message.startswith("3 heads of keys and values do not divide over the 4 devices of tensor")
    assert "attn/key and attn/value" in message and message.endswith("spread over features")
    assert look_up(rules, "h_0/attn/key/kernel", "") == P("fsdp", "tensor")
    caplog.clear()
    odd = dataclasses.replace(CONFIGS["3, odd features"], scan_layers=True)
    rules = sharding.rules_for(Llama(odd), mesh)
    assert caplog.messages[0].endswith("stay whole along it")
    assert look_up(rules, "h/attn/value/kernel", "") == P(None, "fsdp", None)
    assert look_up(rules, "h/attn/query/kernel", "") == P(None, "fsdp", "tensor")
    caplog.clear()
    sharding.rules_for(Llama(CONFIGS["6"]), mesh_of(2, 2, 2))
    assert not caplog.messages


def test_every_device_holds_the_heads_that_its_queries_attend_with():
    """Each of 2 heads twice over 4 devices, each of 3 four times: the fewest that divide."""
    residual = NamedSharding(mesh_of(1, 2, 4), P(("data", "fsdp"), "tensor"))
    for heads, expected in {1: 4, 2: 4, 3: 12, 4: 4, 6: 12, 12: 12}.items():
        query, key = (jax.ShapeDtypeStruct((2, n, 4, 8), jnp.float32) for n in (12, heads))
        out = jax.eval_shape(functools.partial(layers.over_heads, sharding=residual), query, key, key)
        assert [x.shape[1] for x in out] == [12, expected, expected], heads


@pytest.mark.parametrize("name", ["qwen3, 3, scan", "3, odd features"])
def test_every_leaf_has_a_rule(name):
    config = CONFIGS[name]
    params, delta, _ = setup(config)
    placement = sharding.Placement.of(Llama(config), mesh_of(1, 2, 4))
    places = placement.shardings(delta, jax.eval_shape(METHOD.apply, params, delta))
    layer = "h" if config.scan_layers else "h_0"
    b = places[f"{layer}/attn/key/kernel"]["b"].spec
    assert b == (P(None, None, "tensor") if config.scan_layers else P(None, None))
    specs = {path: place.spec for path, place in selection.flatten(placement.shardings(params))[0]}
    if config.bias:
        assert specs["h_0/attn/query/bias"] == P("tensor") and specs["h_0/attn/key/bias"] == P()
    if config.qk_norm:
        assert specs["h/attn/key_norm/scale"] == P()
