"""Encoders with LoRA and a classifier that trains, on meshes of eight devices: the same losses as on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.distributed import sharding
from lora_jax.models.encoder import AXES, Encoder, EncoderConfig
from lora_jax.training import objectives
from tests.helpers.meshes import BERT, ROBERTA, mesh_of

METHOD = lj.chain(
    lj.lora(lj.select("**/{query,value}/kernel", axes=AXES), rank=2, alpha=8, dropout=0.1),
    lj.tune(lj.select("classifier/**")),
)
STEPS = 8
RUNS = [(ROBERTA, (2, 2, 2)), (BERT, (2, 2, 2))]


@functools.cache
def setup(config: EncoderConfig) -> tuple:
    """Model, parameters, and a batch of eight texts of 6 to 12 tokens, whose labels their first tokens tell."""
    model, random = Encoder(config), np.random.default_rng(0)
    tokens = random.integers(2, config.vocab_size, (8, 12), dtype=np.int32)
    mask = np.arange(12) < random.integers(6, 13, (8, 1))
    batch = {
        "tokens": jnp.asarray(np.where(mask, tokens, config.pad_id)),
        "mask": jnp.asarray(mask),
        "token_types": jnp.asarray((np.arange(12) >= 4) & mask, jnp.int32) * (config.token_types - 1),
        "labels": jnp.asarray(tokens[:, 0] % config.labels),
        "weights": jnp.ones(8, jnp.float32),
    }
    params = jax.jit(model.init)(jax.random.key(0), batch["tokens"])["params"]
    return (
        model,
        jax.tree.map(lambda x: jnp.asarray(4 * np.asarray(x)), params),
        batch,
    )  # so that hidden states differ from text to text


def adam_losses(config: EncoderConfig, mesh: jax.sharding.Mesh | None) -> tuple[list, lj.Delta]:
    """The losses of some Adam steps, with the model's dropout and LoRA's own, and the delta after them."""
    model, params, batch = setup(config)
    delta = METHOD.init(jax.random.key(2), params)
    base = lj.without_tuned(params, delta)
    tx = lj.freeze_base(optax.adam(1e-2))
    state = tx.init(delta)
    if mesh is not None:
        rules = sharding.rules_for(model, mesh)
        adapted = jax.eval_shape(METHOD.apply, base, delta)
        base = jax.device_put(base, sharding.shardings(base, mesh, rules))
        delta = jax.device_put(delta, sharding.shardings(delta, mesh, rules, adapted))
        state = jax.device_put(state, sharding.shardings(state, mesh, rules, adapted))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    objective = objectives.classifier(model)

    def loss(delta, base, batch, key):
        total, count = objective.loss(METHOD.apply(base, delta, key=key), batch, key)
        return total / count

    @jax.jit
    def step(delta, state, base, batch, key):
        value, grads = jax.value_and_grad(loss)(delta, base, batch, key)
        updates, state = tx.update(grads, state, delta)
        return optax.apply_updates(delta, updates), state, value

    losses = []
    for n in range(STEPS):
        delta, state, value = step(delta, state, base, batch, jax.random.fold_in(jax.random.key(3), n))
        losses.append(float(value))
    return losses, delta


@functools.cache
def on_one_device(config: EncoderConfig) -> tuple:
    return adam_losses(config, None)


@pytest.mark.slow  # tests/distributed has a quick one
@pytest.mark.parametrize(("config", "sizes"), RUNS, ids=["roberta", "bert"])
def test_an_encoder_trains_as_on_one_device(config, sizes):
    """Sums over devices round otherwise; Adam's first steps go by the gradient's sign, however small it is."""
    expected, delta = on_one_device(config)
    losses, sharded = adam_losses(config, mesh_of(*sizes))
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(sharded)} == {8}
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(sharded), jax.tree.leaves(delta), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("config", [ROBERTA, BERT], ids=["roberta", "bert"])
def test_what_is_large_is_spread_over_all_devices_and_the_head_is_whole(config):
    mesh = mesh_of(1, 2, 4)
    model, params, _ = setup(config)
    rules = sharding.rules_for(model, mesh)
    placed = jax.device_put(params, sharding.shardings(params, mesh, rules))
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        names = [part.key for part in path]
        pieces = leaf.size // leaf.addressable_shards[0].data.size
        if names[0] in ("classifier", "pooler") or names[1] == "token_type":
            assert pieces == 1, path
        elif names[-1] in ("kernel", "embedding"):
            assert pieces == 8, path
    tokens = {"roberta": P("tensor", "fsdp"), "bert": P(None, ("fsdp", "tensor"))}[config.family]
    assert placed["embeddings"]["word"]["embedding"].sharding.spec == tokens


def test_factors_follow_their_kernels_and_the_classifier_is_on_every_device():
    mesh = mesh_of(1, 2, 4)
    model, params, _ = setup(ROBERTA)
    delta = jax.eval_shape(METHOD.init, jax.random.key(2), params)
    base = lj.without_tuned(params, delta)
    adapted = jax.eval_shape(METHOD.apply, base, delta)
    places = sharding.shardings(
        {"base": base, "delta": delta, "adam": jax.eval_shape(lj.freeze_base(optax.adam(1e-3)).init, delta)},
        mesh,
        sharding.rules_for(model, mesh),
        adapted,
    )
    specs = jax.tree.map(lambda sharding: sharding.spec, places["delta"])
    assert specs["h/attn/query/kernel"] == {"a": P(None, "fsdp", None), "b": P(None, None, "tensor")}
    assert specs["classifier/out/kernel"] == {"value": P()}
    adam = places["adam"].inner_states["trainable"].inner_state[0]
    for moment in (adam.mu, adam.nu):
        assert jax.tree.map(lambda sharding: sharding.spec, moment) == specs
