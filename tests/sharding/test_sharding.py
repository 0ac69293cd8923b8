"""Rules, the shardings that follow from them, and training on meshes of eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import sharding
from lora_jax.models import gpt2
from lora_jax.training import new_state, state_shardings
from tests.helpers.meshes import CONFIG, SCANNED, mesh_of

METHOD = lj.lora(
    lj.select("**/{query,value,down}/kernel", "wte/embedding", axes=gpt2.AXES),
    rank=2,
    alpha=8,
    a_init="gaussian",
)
MESHES = [(8, 1, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2)]
RUNS = [
    *(pytest.param(SCANNED, sizes, marks=pytest.mark.slow) for sizes in MESHES),
    (dataclasses.replace(CONFIG, n_layer=1), (2, 2, 2)),
]


@functools.cache
def setup(config: gpt2.GPT2Config) -> tuple:
    model = gpt2.GPT2(config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (8, 12)), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    return model, params, tokens


@functools.cache
def delta_of(config: gpt2.GPT2Config) -> lj.Delta:
    return jax.jit(METHOD.init)(jax.random.key(2), setup(config)[1])


def adam_losses(config: gpt2.GPT2Config, mesh: jax.sharding.Mesh | None, bits: int = 0) -> tuple[list, dict]:
    """The losses of ten Adam steps, and the delta after them; of a base in so many bits."""
    model, params, tokens = setup(config)
    if bits:
        params = lj.quantize(params, lj.select("**/kernel", "wte/embedding", axes=gpt2.AXES), bits=bits)
    delta = delta_of(config)
    tx = lj.freeze_base(optax.adam(1e-2))
    state = jax.jit(tx.init)(delta)
    if mesh is not None:
        rules = sharding.gpt2_rules(config.vocab_size, mesh)
        adapted = jax.eval_shape(METHOD.apply, params, delta)
        params = jax.device_put(params, sharding.shardings(params, mesh, rules))
        delta = jax.device_put(delta, sharding.shardings(delta, mesh, rules, adapted))
        state = jax.device_put(state, sharding.shardings(state, mesh, rules, adapted))
        tokens = jax.device_put(tokens, sharding.batch_sharding(mesh))
    forward = lj.lift(model.apply)

    def loss(delta, params, tokens):
        logits = forward({"params": METHOD.apply(params, delta)}, tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(delta, state, params, tokens):
        value, grads = jax.value_and_grad(loss)(delta, params, tokens)
        updates, state = tx.update(grads, state, delta)
        return optax.apply_updates(delta, updates), state, value

    losses = []
    for _ in range(10):
        delta, state, value = step(delta, state, params, tokens)
        losses.append(float(value))
    return losses, delta


@functools.cache
def on_one_device(config: gpt2.GPT2Config) -> tuple:
    return adam_losses(config, None)


@pytest.mark.parametrize(("config", "sizes"), RUNS, ids=range(len(RUNS)))
def test_losses_agree_with_one_device(config, sizes):
    expected, delta = on_one_device(config)
    losses, sharded = adam_losses(config, mesh_of(*sizes))
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(sharded), jax.tree.leaves(delta), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4, err_msg=jax.tree_util.keystr(path))


QUANTIZED = [
    (8, dataclasses.replace(CONFIG, n_layer=1), (2, 2, 2)),
    *(pytest.param(4, SCANNED, sizes, marks=pytest.mark.slow) for sizes in MESHES),
    *(pytest.param(8, SCANNED, sizes, marks=pytest.mark.slow) for sizes in MESHES[:2]),
]


@pytest.mark.parametrize(("bits", "config", "sizes"), QUANTIZED)
def test_losses_of_a_quantized_base_agree_with_one_device(bits, config, sizes):
    expected, _ = adam_losses(config, None, bits)
    losses, _ = adam_losses(config, mesh_of(*sizes), bits)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_codes_follow_the_axes_of_their_weight():
    """Rows as the outputs go, and blocks along a row as the inputs go, where their number divides."""
    mesh, rules = mesh_of(1, 2, 4), {"**": P("fsdp", "tensor")}
    params = {"w": jax.ShapeDtypeStruct((256, 8), jnp.float32), "odd": jax.ShapeDtypeStruct((192, 8), jnp.float32)}
    params = lj.quantize(params, lj.select("*"), bits=4)
    method = lj.lora(lj.select("*"), rank=2)
    adapted = jax.eval_shape(method.apply, params, jax.eval_shape(method.init, jax.random.key(0), params))
    alone, under = (sharding.shardings(tree, mesh, rules) for tree in (params, adapted))
    for w in (alone["w"], under["w"].base):
        assert (w.codes.spec, w.scale.spec) == (P("tensor", "fsdp", None), P("tensor", "fsdp"))
        assert (w.nested.spec, w.offset.spec) == (P(None), P())
    assert alone["odd"].codes.spec == P("tensor", None, None)
    assert under["w"].a.spec == P("fsdp", None)


def test_factors_follow_their_kernels_and_the_optimizer_the_factors():
    mesh = mesh_of(1, 2, 4)
    _, params, _ = setup(CONFIG)
    delta = delta_of(CONFIG)
    adapted = jax.eval_shape(METHOD.apply, params, delta)
    rules = sharding.gpt2_rules(CONFIG.vocab_size, mesh)
    specs = jax.tree.map(lambda sharding: sharding.spec, sharding.shardings(delta, mesh, rules, adapted))
    assert specs["h_0/attn/query/kernel"] == {"a": P("fsdp", None), "b": P(None, "tensor")}
    assert specs["h_1/mlp/down/kernel"] == {"a": P("tensor", None), "b": P(None, "fsdp")}
    assert specs["wte/embedding"] == {"a": P(None, None), "b": P(None, ("fsdp", "tensor"))}

    placed = jax.device_put(delta, sharding.shardings(delta, mesh, rules, adapted))
    factors = placed["h_0/attn/value/kernel"]
    assert {shard.data.shape for shard in factors["a"].addressable_shards} == {(8, 2)}
    assert {shard.data.shape for shard in factors["b"].addressable_shards} == {(2, 4)}

    state = jax.eval_shape(lj.freeze_base(optax.adam(1e-3)).init, delta)
    adam = sharding.shardings(state, mesh, rules, adapted).inner_states["trainable"].inner_state[0]
    for moment in (adam.mu, adam.nu):
        assert jax.tree.map(lambda sharding: sharding.spec, moment) == specs
    assert adam.count.spec == P()


def test_scanned_factors_follow_too():
    mesh = mesh_of(1, 2, 4)
    _, params, _ = setup(SCANNED)
    delta = jax.eval_shape(METHOD.init, jax.random.key(2), params)
    adapted = jax.eval_shape(METHOD.apply, params, delta)
    rules = sharding.gpt2_rules(SCANNED.vocab_size, mesh)
    places = sharding.shardings(delta, mesh, rules, adapted)
    query, table = places["h/attn/query/kernel"], places["wte/embedding"]
    assert (query["a"].spec, query["b"].spec) == (P(None, "fsdp", None), P(None, None, "tensor"))
    # 52 rows divide over 4 devices
    assert (table["a"].spec, table["b"].spec) == (P("tensor", None), P(None, "fsdp"))


def test_a_tuned_leaf_is_sharded_as_the_weight_it_stands_for():
    mesh = mesh_of(1, 2, 4)
    _, params, _ = setup(CONFIG)
    method = lj.tune(lj.select("**/kernel"))
    delta = jax.jit(method.init)(jax.random.key(0), params)
    base = lj.without_tuned(params, delta)
    adapted = jax.eval_shape(method.apply, params, delta)
    rules = sharding.gpt2_rules(CONFIG.vocab_size, mesh)
    places = sharding.shardings({"base": base, "delta": delta}, mesh, rules, adapted)
    assert places["delta"]["h_0/attn/query/kernel"]["value"].spec == P("fsdp", "tensor")
    assert jax.tree.structure(places) == jax.tree.structure({"base": base, "delta": delta})
    placed = jax.device_put({"base": base, "delta": delta}, places)
    assert placed["base"]["wte"]["embedding"].sharding.spec == P(None, ("fsdp", "tensor"))


@pytest.mark.parametrize("config", [CONFIG, SCANNED], ids=["loop", "scanned"])
def test_every_matrix_of_gpt2_is_spread_over_all_devices(config):
    mesh = mesh_of(1, 2, 4)
    _, params, _ = setup(config)
    rules = sharding.gpt2_rules(config.vocab_size, mesh)
    placed = jax.device_put(params, sharding.shardings(params, mesh, rules))
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        if path[-1].key in ("kernel", "embedding"):
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, path
    assert sharding.gpt2_rules(50257, mesh)["**/wte/embedding"] == P(None, ("fsdp", "tensor"))
    assert sharding.gpt2_rules(50304, mesh)["**/wte/embedding"] == P("tensor", "fsdp")


def test_adapted_params_keep_their_structure():
    mesh = mesh_of(2, 2, 2)
    _, params, _ = setup(CONFIG)
    adapted = METHOD.apply(params, delta_of(CONFIG))
    rules = sharding.gpt2_rules(CONFIG.vocab_size, mesh)
    placed = jax.device_put(adapted, sharding.shardings(adapted, mesh, rules))
    query = placed["h_0"]["attn"]["query"]["kernel"]
    assert isinstance(query, lj.LowRank)
    assert query.base.sharding == NamedSharding(mesh, P("fsdp", "tensor"))
    assert query.a.sharding.spec == P("fsdp", None)


def test_batches_are_spread_over_data_and_fsdp():
    batch = jax.device_put(jnp.zeros((8, 3)), sharding.batch_sharding(mesh_of(2, 2, 2)))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


def test_the_first_matching_rule_wins():
    mesh = mesh_of(2, 2, 2)
    rules = {"b/**": P("data"), "**": P("fsdp")}
    places = sharding.shardings({"a": jnp.zeros(2), "b": {"c": jnp.zeros(2)}}, mesh, rules)
    assert places["a"].spec == P("fsdp") and places["b"]["c"].spec == P("data")


def test_what_cannot_be_placed_is_said():
    mesh = mesh_of(1, 2, 4)
    tree = {"h": {"kernel": jnp.zeros((6, 5))}}
    with pytest.raises(ValueError, match=r"h/kernel has shape \(6, 5\): 5 does not divide over the 4"):
        sharding.shardings(tree, mesh, {"**": P("fsdp", "tensor")})
    with pytest.raises(ValueError, match="names 3 axes"):
        sharding.shardings(tree, mesh, {"**": P(None, None, "tensor")})
    with pytest.raises(ValueError, match=r"no glob of .* matches 'h/kernel'"):
        sharding.shardings(tree, mesh, {"g/**": P()})


def test_what_does_not_divide_may_stay_whole(caplog):
    tree = {"h": {"kernel": jnp.zeros((6, 5))}}
    places = sharding.shardings(tree, mesh_of(1, 2, 4), {"**": P("fsdp", "tensor")}, misfits="replicate")
    assert places["h"]["kernel"].spec == P("fsdp", None)
    assert "h/kernel has shape (6, 5): 5 does not divide over the 4 devices of tensor" in caplog.text


def test_adapters_are_spread_over_fsdp():
    mesh = mesh_of(1, 4, 2)
    _, params, _ = setup(SCANNED)
    method = lj.adapter({"mlp_out": gpt2.sites(SCANNED)["mlp_out"]}, rank=3)
    delta = jax.eval_shape(method.init, jax.random.key(0), params)
    rules = sharding.gpt2_rules(SCANNED.vocab_size, mesh)
    places = sharding.shardings(delta, mesh, rules, jax.eval_shape(method.apply, params, delta))["@mlp_out/adapter"]
    assert places["down"].spec == P(None, "fsdp") and places["up"].spec == P(None, None, "fsdp")
    assert places["down_bias"].spec == P()


FACTORED = {
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "factored_rms": lambda: optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.scale(-1e-2)),
    "sm3": lambda: optax.sm3(1e-2),
}


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4)])
@pytest.mark.parametrize("name", FACTORED)
def test_the_state_of_a_factored_optimizer_is_placed_and_steps_as_on_one_device(name, sizes):
    """With fewer axes than a factor it follows those that are left, or is replicated."""
    config = dataclasses.replace(CONFIG, n_layer=1)
    mesh, (_, params, _) = mesh_of(*sizes), setup(config)
    method = lj.chain(METHOD, lj.tune(lj.select("**/up/kernel", "ln_f/*")))
    tx = lj.freeze_base(FACTORED[name]())
    placement = sharding.Placement(mesh, sharding.gpt2_rules(config.vocab_size, mesh))
    delta = jax.jit(method.init)(jax.random.key(2), params)
    start = functools.partial(new_state, method, tx)
    shapes = jax.eval_shape(start, params, jax.random.key(0))
    places = state_shardings(shapes, placement, jax.eval_shape(method.apply, params, shapes.delta))
    if name == "adafactor":
        factored = places.optimizer.inner_states["trainable"].inner_state[0]
        up = [moment["h_0/mlp/up/kernel"]["value"].spec for moment in (factored.v_row, factored.v_col, factored.v)]
        assert up == [P("fsdp"), P("tensor"), P()]

    def stepped(delta, state):
        grads = jax.tree.map(lambda x: jnp.cos(3 * x), delta)
        return optax.apply_updates(delta, tx.update(grads, state, delta)[0])

    state = jax.jit(tx.init, out_shardings=places.optimizer)(jax.device_put(delta, places.delta))
    got = jax.jit(stepped)(jax.device_put(delta, places.delta), state)
    want = jax.jit(stepped)(delta, tx.init(delta))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_table_says_where_each_array_lies():
    mesh = mesh_of(1, 2, 4)
    _, params, _ = setup(CONFIG)
    places = sharding.shardings(params, mesh, sharding.gpt2_rules(CONFIG.vocab_size, mesh))
    lines = sharding.table(params, places).splitlines()
    query = next(line for line in lines if line.startswith("h_0/attn/query/kernel"))
    assert "float32(16, 16)" in query and "('fsdp', 'tensor')" in query and query.endswith(" 128")
    placed = jax.device_put(params, places)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert lines[-1].split() == ["all", f"{held:,}"]


@pytest.mark.parametrize("config", [CONFIG, SCANNED], ids=["loop", "scanned"])
def test_activations_between_layers_are_spread_over_the_whole_mesh(config):
    mesh = mesh_of(2, 2, 2)
    model, params, tokens = setup(config)
    placed = jax.device_put(params, sharding.shardings(params, mesh, sharding.gpt2_rules(config.vocab_size, mesh)))
    spread = sharding.on_mesh(model, mesh)
    assert sharding.on_mesh(model, mesh_of(1, 1, 1)) is model
    inputs = jax.device_put(tokens, sharding.batch_sharding(mesh))
    lowered = jax.jit(spread.apply).lower({"params": placed}, inputs)
    logits = lowered.compile()({"params": placed}, inputs)
    np.testing.assert_allclose(logits, jax.jit(model.apply)({"params": params}, tokens), atol=1e-5)
    assert lowered.as_text().count("sharding_constraint") >= 2  # of the embeddings, and of the layers


def test_impossible_meshes_are_said():
    with pytest.raises(ValueError, match="needs 16 devices, there are 8"):
        sharding.make_mesh({"data": 16})
    with pytest.raises(ValueError, match="mesh axes are data, fsdp, tensor, not model"):
        sharding.make_mesh({"model": 2})
    with pytest.raises(ValueError, match="'fsdp': 0"):
        sharding.make_mesh({"fsdp": 0})
