"""Taps in models of Flax and Equinox: in every layout, with a cache, on eight devices; where their sites are."""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as named
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import sharding
from lora_jax.core.transforms import per_site
from lora_jax.models import encoder, gpt2
from tests.helpers.networks import started
from tests.helpers.reference import close, ints, normal, random_delta
from tests.helpers.sites import (
    KEY,
    LAYERS,
    PARAMS,
    TOKENS,
    WIDTH,
    Mix,
    mix,
    shift,
    tower,
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + named(nn.tanh(nn.Dense(WIDTH, name="up")(x)), "mlp_out")


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + named(nnx.tanh(self.up(x)), "mlp_out")


class Module(eqx.Module):
    up: eqx.nn.Linear

    def __call__(self, x):
        return x + named(jnp.tanh(jax.vmap(self.up)(x)), "mlp_out")


def test_linen_nnx_and_equinox():
    x = normal(3, WIDTH)
    method = shift()
    params = started(Block(), x)
    delta = random_delta(method, params)
    change = np.asarray(delta["@mlp_out/shift"]["by"])

    @jax.jit
    def block(params):
        adapted = method.apply(params, delta)
        return lj.lift(Block().apply)({"params": adapted}, x), Block().apply({"params": params}, x) + change

    close(*block(params))

    model = Plain(nnx.Rngs(0))
    graph, state = nnx.split(model)
    run = lj.lift(lambda state, x: nnx.merge(graph, state)(x))
    close(run(method.apply(state, delta), x), model(x) + change)
    call = lj.lift(lambda model, x: model(x))
    close(call(method.apply(model, delta), x), model(x) + change)
    model = Module(eqx.nn.Linear(WIDTH, WIDTH, key=KEY))
    close(call(method.apply(model, delta), x), model(x) + change)


CONFIG = gpt2.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2)
IDS = ints([[0, 0, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]])
MASK = jax.device_put(np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7], bool))
ENCODER = encoder.EncoderConfig(vocab_size=20, max_positions=16, hidden=8, layers=3, heads=2, inner=12)
LAYOUTS = [{"scan_layers": scan, "remat": remat} for scan in (False, True) for remat in (False, True)]


@functools.cache
def gpt2_params():
    return started(gpt2.GPT2(CONFIG), IDS)


def of_ids(w):
    """A tap of the tokens and the positions that a GPT-2 names."""
    sites = {"attention_out": 2, "block_out": 2}
    start = lambda key, site, n: {"w": w * jax.random.normal(key, (n, 8, 8)), "scale": jnp.ones((n, 8))}  # noqa: E731
    return per_site({"method": "mix"}, sites, start, Mix())


def test_gpt2_as_a_loop_and_scanned_with_remat():
    method, params = of_ids(0.3), gpt2_params()
    delta = jax.jit(method.init)(KEY, params)
    scanned = dataclasses.replace(CONFIG, scan_layers=True, remat=True)

    def run(config, params):
        return jax.jit(lj.lift(gpt2.GPT2(config).apply))({"params": method.apply(params, delta)}, IDS, MASK)

    want = run(CONFIG, params)
    close(run(scanned, gpt2.to_scanned(params)), want, 2e-5)
    assert np.max(np.abs(want - jax.jit(gpt2.GPT2(CONFIG).apply)({"params": params}, IDS, MASK))) > 0.1


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_with_a_cache_as_without(scan):
    """A prompt padded on the left, then single tokens: what is seen is the call's own."""
    method, config = of_ids(0.3), dataclasses.replace(CONFIG, scan_layers=scan)
    params = gpt2.to_scanned(gpt2_params()) if scan else gpt2_params()
    adapted = {"params": method.apply(params, jax.jit(method.init)(KEY, params))}
    run = jax.jit(lj.lift(gpt2.GPT2(config).apply))
    uncached = run(adapted, IDS, MASK)
    cache = gpt2.init_cache(config, 2, 10)
    ids, mask = np.asarray(IDS), np.asarray(MASK)
    logits, cache = run(adapted, ids[:, :5], mask[:, :5], cache=cache)
    logits, uncached = np.asarray(logits), np.asarray(uncached)
    close(logits[1], uncached[1, :5])
    close(logits[0, 2:], uncached[0, 2:5])
    for n in (5, 6):
        logits, cache = run(adapted, ids[:, n : n + 1], None, cache=cache)
        close(np.asarray(logits)[:, 0], uncached[:, n])


@pytest.mark.parametrize("options", LAYOUTS, ids=["loop", "loop remat", "scan", "scan remat"])
def test_sites_are_the_published_ones(options):
    for module, make, config in ((gpt2, gpt2.GPT2, CONFIG), (encoder, encoder.Encoder, ENCODER)):
        model = make(dataclasses.replace(config, dtype="bfloat16", **options))
        params = jax.eval_shape(model.init, KEY, IDS)
        sites = lj.sites(lambda p, ids, model=model: model.apply(p, ids), params, IDS)
        assert {name: (count, shape[2:], dtype) for name, (count, shape, dtype) in sites.items()} == module.sites(
            model.config
        )
    assert lj.sites(tower("scan in scan"), PARAMS, TOKENS)["mlp_out"] == (LAYERS, (2, 5, WIDTH), "float32")


def trained(mesh):
    """The losses of three steps with AdamW on low-rank factors and taps, and the delta after them."""
    method = lj.chain(lj.lora(lj.select("w", axes="sio"), rank=2), mix())
    params, tokens = PARAMS, np.tile(TOKENS, (2, 1))
    delta = random_delta(method, params)
    tx = lj.freeze_base(optax.adamw(3e-2))
    state = jax.jit(tx.init)(delta)
    if mesh is not None:
        rules = {"w": P(None, "fsdp", "tensor"), "**": P()}
        adapted = jax.eval_shape(method.apply, params, delta)
        params = jax.device_put(params, sharding.shardings(params, mesh, rules))
        delta, state = jax.device_put(
            (delta, state), tuple(sharding.shardings(x, mesh, rules, adapted) for x in (delta, state))
        )
        tokens = jax.device_put(tokens, sharding.batch_sharding(mesh))
        factors, taps = delta["w"], delta["@mlp_out/mix"]
        assert (factors["a"].sharding.spec, factors["b"].sharding.spec) == (
            P(None, "fsdp", None),
            P(None, None, "tensor"),
        )
        assert taps["scale"].sharding.spec == state.inner_states["trainable"].inner_state[0].count.sharding.spec == P()
        assert state.inner_states["trainable"].inner_state[0].mu["w"]["a"].sharding.spec == P(None, "fsdp", None)

    @jax.jit
    def step(delta, state, params, tokens):
        def loss(delta):
            return jnp.mean((lj.lift(tower("scan"))(method.apply(params, delta), tokens) - 1.0) ** 2)

        value, grads = jax.value_and_grad(loss)(delta)
        updates, state = tx.update(grads, state, delta)
        return optax.apply_updates(delta, updates), state, value

    losses = []
    for _ in range(3):
        delta, state, value = step(delta, state, params, tokens)
        losses.append(float(value))
    return losses, delta


def test_on_eight_devices_as_on_one():
    want, delta = trained(None)
    got, spread = trained(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert want[-1] < 0.9 * want[0]
    for ours, theirs in zip(jax.tree.leaves(spread), jax.tree.leaves(delta), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_tapped_params_have_shardings():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    method = lj.chain(lj.lora(lj.select("**/query/kernel", axes=gpt2.AXES), rank=2), of_ids(0.3))
    params = gpt2_params()
    adapted = jax.eval_shape(method.apply, params, jax.eval_shape(method.init, KEY, params))
    shardings = sharding.shardings(adapted, mesh, sharding.gpt2_rules(CONFIG.vocab_size, mesh))
    assert jax.tree.structure(shardings) == jax.tree.structure(adapted)
    query = shardings.params["h_0"]["attn"]["query"]["kernel"]
    assert (query.base.spec, query.a.spec) == (P("fsdp", "tensor"), P("fsdp", None))
    assert shardings.taps[0].factors["w"].spec == P()
