"""VeRA: against PEFT and dense weights, on every product and layout; what trains, what is frozen, what is refused."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.checkpoints import load_adapter, save_adapter
from lora_jax.models.layouts import to_scanned
from tests.helpers.marks import diagonal
from tests.helpers.methods import SHAPES, as_dense, as_peft, as_some_layers, network, randomized, tree
from tests.helpers.networks import Stack, Tied, started
from tests.helpers.reference import (
    close,
    dense_delta,
    filled,
    ints,
    merged_params,
    normal,
    random_delta,
    replaced,
    same,
)
from tests.helpers.structural import CASES, X

KEY = jax.random.key(0)
SHARED = "@shared/vera"


@pytest.mark.parametrize(("sizes", "kind"), diagonal(SHAPES, ["linear", "conv1d"]))
def test_peft(kind, sizes):
    peft = pytest.importorskip("peft")
    module = network(kind, sizes)
    params = tree(module)
    method = lj.vera(lj.select("*/weight", axes="io" if kind == "conv1d" else "oi"), rank=4)
    config = peft.VeraConfig(r=4, target_modules=["l0", "l1", "l2"], fan_in_fan_out=kind == "conv1d")
    model = peft.get_peft_model(module, config)
    projections = {"fixed_a": model.base_model.vera_A["default"], "fixed_b": model.base_model.vera_B["default"]}
    start = jax.jit(method.init)(KEY, params)
    for n in range(3):
        same(
            start[f"l{n}/weight"]["d"],
            jax.device_put(model.base_model.model[2 * n].vera_lambda_d["default"].detach().numpy().copy()),
        )
    trained = randomized(model)
    names = {
        f"base_model.model.l{n}.vera_lambda_{factor}.default": (f"l{n}/weight", factor)
        for n in range(3)
        for factor in "bd"
    }
    delta = {SHARED: {name: jax.device_put(tensor.numpy().copy()) for name, tensor in projections.items()}}
    for name, (path, factor) in names.items():
        delta.setdefault(path, {})[factor] = jax.device_put(trained[name].detach().numpy().copy())
    delta = lj.Delta(delta)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, delta)
    for name, tensor in start[SHARED].items():  # uniform, within the same bound
        bound = math.sqrt(6 / tensor.shape[1])
        assert 0.5 * bound < np.max(np.abs(tensor)) <= bound and float(projections[name].abs().max()) <= bound
    as_peft(kind, params, model, trained, method, delta, names)


def summed(axes):
    """A reference: w + A diag(d) B diag(b), from PEFT's (out, in) matrices, layer by layer."""

    def dense(params, delta):
        w, factors, shared = params["w"], delta["w"], delta[SHARED]
        size = {c: [n for n, x in zip(w.shape, axes, strict=True) if x in c] for c in ("s", "ivk", "o")}
        inner, outer = math.prod(size["ivk"]), math.prod(size["o"])
        d, b = factors["d"].reshape(-1, factors["d"].shape[-1]), factors["b"].reshape(-1, outer)
        down = jnp.stack([(row[:, None] * shared["fixed_a"][:, :inner]).T for row in d])
        up = jnp.stack([(row[:, None] * shared["fixed_b"][:outer]).T for row in b])
        down, up = down.reshape(*size["s"], *size["ivk"], -1), up.reshape(*size["s"], up.shape[1], *size["o"])
        return {"w": w + dense_delta(down, up, axes, 1.0)}

    return dense


W, IDS = normal(8, 12, seed=1), ints([[0, 7, 3], [5, 2, 7]])
LAYOUTS = {
    # name: (function, params, axes)
    "oi": (lambda p, x: x @ p["w"].T, {"w": W.T}, "oi"),
    "tied": (lambda p, x: jnp.tanh(p["w"][IDS]) @ p["w"].T, {"w": W}, "vo"),
    "stack": (lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], {"w": normal(3, 8, 8)}, "sio"),
    "stack on another axis": (lambda p, x: jnp.einsum("bi,iso->sbo", x, p["w"][:, 1:]), {"w": normal(8, 3, 5)}, "iso"),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            normal(2, 6, 5, 4), p["w"], (1, 2), "SAME", None, None, ("NHWC", "HWIO", "NHWC")
        ),
        {"w": normal(3, 2, 4, 6)},
        "kkio",
    ),
} | {
    name: CASES[name] for name in ("split in three", "reshape of outputs to heads", "w[i] traced", "einsum from heads")
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    fn, params, axes = LAYOUTS[name]
    method = lj.vera(lj.select("w", axes={"w": axes}), rank=3)
    as_dense(fn, params, method, summed(axes), X)


def test_some_layers_of_a_scanned_model():
    """The others stay as they are, and the loop gives the same."""
    params = started(Stack(layers=3), X)
    one = lj.vera(lj.select("**/kernel", layers=(0, 2)), rank=5)
    some = lj.vera(lj.select("**/kernel", layers=(0, 2), axes={"h/**": "sio"}), rank=5)
    as_some_layers(one, some, params, X)


def test_an_adapted_stack_is_sliced_like_any_other():
    """Layer by layer, by the user's own scan: the frozen matrices go with every layer."""
    params = {"w": normal(3, 8, 8)}
    method = lj.vera(lj.select("w", axes="sio"), rank=3)
    delta = random_delta(method, params)
    one = lj.lift(lambda w, x: jnp.tanh(x @ w), on_dense="error")

    @jax.jit
    def scanned_and_dense(delta):
        got, _ = lax.scan(lambda x, w: (one(w, x), None), X, method.apply(params, delta)["w"])
        want = X
        for w in summed("sio")(params, delta)["w"]:
            want = jnp.tanh(want @ w)
        return got, want

    close(*scanned_and_dense(delta))


LAYERS = {"small": {"kernel": normal(3, 2), "bias": normal(2)}, "large": {"kernel": normal(5, 4, seed=1)}}
METHOD = lj.vera(lj.select("*/kernel"), rank=6)


@functools.cache
def initial():
    return jax.jit(METHOD.init)(KEY, LAYERS)


def test_counts_and_what_trains():
    report = lj.check(METHOD, jax.eval_shape(lambda: LAYERS))
    assert {row.path: row.trained for row in report.rows} == {"small/kernel": 2 + 6, "large/kernel": 4 + 6, SHARED: 0}
    assert report.trained == 18 and report.total == 6 + 2 + 20
    delta = initial()
    assert jax.tree.map(jnp.shape, delta[SHARED]) == {"fixed_a": (6, 5), "fixed_b": (4, 6)}
    assert lj.labels(delta)[SHARED] == {"fixed_a": "frozen", "fixed_b": "frozen"}
    assert lj.labels(delta)["small/kernel"] == {"b": "trainable", "d": "trainable"}
    w = lj.labels(METHOD.apply(LAYERS, delta))["small"]["kernel"]
    assert (w.base, w.scale, w.fixed_a, w.fixed_b, w.b, w.d) == ("frozen",) * 4 + ("trainable",) * 2


def test_training_moves_the_vectors_alone():
    delta = random_delta(METHOD, LAYERS)

    def loss(params, delta):
        fn = lj.lift(lambda p: normal(4, 3) @ p["small"]["kernel"], on_dense="error")
        return jnp.sum(fn(METHOD.apply(params, delta)) ** 2)

    of_base, grads = jax.jit(jax.grad(loss, (0, 1)))(LAYERS, delta)
    assert not any(
        np.any(leaf) for leaf in jax.tree.leaves((of_base["small"]["kernel"], grads[SHARED], grads["large/kernel"]))
    )
    tx = lj.freeze_base(optax.adam(0.1))
    state = jax.jit(tx.init)(delta)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert kept == 2 * 18  # two moments of what trains, none of the rest

    @jax.jit
    def step(delta, state, grads):
        updates, _ = tx.update(grads, state, delta)
        return updates, optax.apply_updates(delta, updates)

    updates, after = step(delta, state, grads)
    same(after[SHARED], delta[SHARED])
    assert np.all(updates["small/kernel"]["b"]) and np.all(updates["small/kernel"]["d"])


def test_it_begins_as_the_base_and_keeps_its_matrices_in_a_file(tmp_path):
    delta = initial()
    assert not np.any(delta["small/kernel"]["b"]) and np.all(delta["small/kernel"]["d"] == np.float32(0.1))
    same(merged_params(METHOD, LAYERS, delta), LAYERS)
    other = lj.vera(lj.select("*/kernel"), rank=6, d_initial=1.0)
    assert np.all(other.init(KEY, LAYERS)["large/kernel"]["d"] == 1)
    delta = filled(delta)
    save_adapter(tmp_path, METHOD, delta, {"source": "-", "shapes": "-", "content": "-"})
    method, again, _ = load_adapter(tmp_path)
    same(again, delta)
    same(merged_params(method, LAYERS, again), merged_params(METHOD, LAYERS, delta))
    close(lj.unmerge(merged_params(METHOD, LAYERS, delta), METHOD, delta), LAYERS, 1e-6)


def test_strength_scales_the_change():
    delta = random_delta(METHOD, LAYERS)
    run = jax.jit(lambda s: lj.merge(METHOD.apply(LAYERS, delta, strength=s)))
    same(run(jnp.float32(0)), LAYERS)
    close(run(jnp.float32(1)), merged_params(METHOD, LAYERS, delta), 1e-7)
    base = np.asarray(LAYERS["large"]["kernel"])
    change, half = (np.asarray(run(jnp.float32(s))["large"]["kernel"]) - base for s in (1, 0.5))
    close(half, np.float32(0.5) * change)


def test_bfloat16():
    """A base and a model of low precision; the merged weights are rounded once."""
    delta = random_delta(METHOD, LAYERS, size=0.2)
    low = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), LAYERS)
    exact = merged_params(METHOD, jax.tree.map(lambda leaf: leaf.astype(np.float32), low), delta)
    exact = jax.tree.map(np.asarray, exact)
    merged = merged_params(METHOD, low, delta)
    same(merged["large"]["kernel"], exact["large"]["kernel"].astype(jnp.bfloat16))
    x = np.asarray(normal(4, 5))
    want = x @ exact["large"]["kernel"]
    for params in (low, LAYERS):
        fn = lj.lift(lambda p: x.astype(jnp.bfloat16) @ p["large"]["kernel"].astype(jnp.bfloat16), on_dense="error")
        got = jax.jit(lambda d, params=params, fn=fn: fn(METHOD.apply(params, d)))(delta)
        assert got.dtype == jnp.bfloat16
        close(np.asarray(got).astype(np.float32), want, 2e-2)  # 8 bits of mantissa, in x, factors and result


def test_tied_embedding():
    model, ids = Tied(), ints([[1, 4, 10], [4, 4, 0]])
    params = started(model, ids)
    method = lj.vera(lj.select("wte/embedding", "mix/kernel"), rank=3)
    delta = random_delta(method, params)
    merged = merged_params(method, params, delta)
    alone = lj.Delta({"w": delta["wte/embedding"], SHARED: delta[SHARED]})
    want = jax.jit(lambda w, d: summed("vo")({"w": w}, d)["w"])(params["wte"]["embedding"], alone)
    close(merged["wte"]["embedding"], want)
    fn = lambda p: model.apply({"params": p}, ids)  # noqa: E731

    @jax.jit
    def lifted_and_dense(delta, dense):
        return lj.lift(fn, on_dense="error")(method.apply(params, delta)), fn(dense)

    close(*lifted_and_dense(delta, replaced(merged, {"wte/embedding": want})))


def test_shard_map():
    mesh = jax.make_mesh((2, 4), ("b", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"up": {"w": W}, "down": {"w": normal(12, 8, seed=2)}}
    method = lj.vera(lj.select("*/w"), rank=3)
    delta = random_delta(method, params)
    merged = merged_params(method, params, delta)
    specs = {"up": {"w": P(None, "t")}, "down": {"w": P("t", None)}}
    body = lambda p, x: lax.psum(jnp.tanh(x @ p["up"]["w"]) @ p["down"]["w"], "t")  # noqa: E731
    fn = jax.shard_map(body, mesh=mesh, in_specs=(specs, P("b")), out_specs=P("b"))
    x = normal(4, 8)
    got = jax.jit(lambda d: lj.lift(fn, on_dense="error")(method.apply(params, d), x))(delta)
    close(got, np.tanh(np.asarray(x) @ np.asarray(merged["up"]["w"])) @ np.asarray(merged["down"]["w"]))


def test_what_cannot_be_is_said():
    for rank in (0, 1.0, True):
        with pytest.raises(ValueError, match=f"rank={rank} must be a whole number from 1"):
            lj.vera(lj.select("*/kernel"), rank=rank)
    with pytest.raises(ValueError, match="small/bias with axes 'o': VeRA needs a weight with input and output axes"):
        lj.check(lj.vera(lj.select("small/*"), rank=2), LAYERS)
    two = lj.chain(lj.vera(lj.select("small/kernel"), rank=2), lj.vera(lj.select("large/kernel"), rank=2))
    with pytest.raises(ValueError, match="@shared/vera is the target of two transforms of the chain"):
        two.init(KEY, LAYERS)
    delta = random_delta(METHOD, LAYERS)
    without = lj.Delta({path: factors for path, factors in delta.items() if path != SHARED})
    with pytest.raises(ValueError, match=r"it lacks \['@shared/vera'\] and has besides \[\]"):
        METHOD.apply(LAYERS, without)
    narrow = lj.Delta(delta | {SHARED: {name: np.asarray(x)[:, :-1] for name, x in delta[SHARED].items()}})
    with pytest.raises(ValueError, match=r"@shared/vera: the delta's factors are .* need {'fixed_a': \(6, 5\)"):
        METHOD.apply(LAYERS, narrow)
    swapped = lj.Delta(delta | {"small/kernel": delta["large/kernel"]})
    with pytest.raises(ValueError, match=r"small/kernel: the delta's factors are {'b': \(4,\)"):
        METHOD.apply(LAYERS, swapped)
    with pytest.raises(TypeError, match="takes a Delta"):
        METHOD.apply(LAYERS, dict(delta))
    with pytest.raises(TypeError, match="takes the base's params"):
        METHOD.apply(delta, delta)


def test_a_chain_with_another_method():
    both = lj.chain(lj.vera(lj.select("large/kernel"), rank=2), lj.tune(lj.select("small/bias")))
    delta = random_delta(both, LAYERS)
    assert sorted(delta) == [SHARED, "large/kernel", "small/bias"] and lj.check(both, LAYERS).trained == 4 + 2 + 2
    again = lj.from_spec(json.loads(json.dumps(both.spec)))
    same(again.apply(LAYERS, delta), both.apply(LAYERS, delta))


FUSED = {"attn": {name: {"kernel": normal(5, size, seed=size)} for name, size in (("k", 4), ("q", 3), ("v", 2))}}
FUSED |= {"up": {"kernel": normal(4, 7)}}


def test_a_fused_layer_of_peft_s_is_weights_of_one_d():
    """q, k and v are one Conv1D there: d is one, b and B's columns are split, in that order."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(9, 5)
    order = "qkv"
    kernel = np.concatenate([FUSED["attn"][name]["kernel"] for name in order], 1)
    conv.weight.data = torch.tensor(kernel)
    net = torch.nn.Sequential(conv)
    made = peft.get_peft_model(net, peft.VeraConfig(r=6, target_modules=["0"], fan_in_fan_out=True))
    trained = {name.split(".")[3]: x for name, x in randomized(made).items()}
    method = lj.vera(lj.select("attn/*/kernel"), rank=6, fused="attn/{q,k,v}/kernel")
    assert lj.check(method, FUSED).trained == 9 + 6
    parts = np.split(trained["vera_lambda_b"].detach().numpy(), [3, 7])
    delta = lj.Delta({f"attn/{name}/kernel": {"b": part} for name, part in zip(order, parts, strict=True)})
    delta["@shared/attn"] = {"d": jax.device_put(trained["vera_lambda_d"].detach().numpy().copy())}
    projections = {"fixed_a": made.base_model.vera_A["default"], "fixed_b": made.base_model.vera_B["default"]}
    delta[SHARED] = {name: jax.device_put(x.numpy().copy()) for name, x in projections.items()}
    assert jax.tree.map(jnp.shape, jax.eval_shape(method.init, KEY, FUSED)) == jax.tree.map(jnp.shape, delta)
    x = normal(4, 5, seed=9)

    def loss(delta):
        run = lj.lift(lambda p: jnp.concatenate([x @ p["attn"][n]["kernel"] for n in order], -1), on_dense="error")
        out = run(method.apply(FUSED, delta))
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(delta)
    want = made(torch.tensor(np.asarray(x))) - conv.bias
    torch.sin(want).sum().backward()
    close(out, want.detach().numpy())
    close(grads["@shared/attn"]["d"], trained["vera_lambda_d"].grad.numpy(), 2e-5)
    of_b = np.concatenate([grads[f"attn/{name}/kernel"]["b"] for name in order])
    close(of_b, trained["vera_lambda_b"].grad.numpy(), 2e-5)


def test_fused_weights_beside_others_and_in_a_stack():
    method = lj.vera(lj.select("**/kernel"), rank=3, fused="**/{q,k,v}/kernel")
    delta = random_delta(method, FUSED)
    assert jax.tree.map(jnp.shape, delta[SHARED]) == {"fixed_a": (3, 5), "fixed_b": (9, 3)}
    merged = merged_params(method, FUSED, delta)
    base, factors = jax.tree.map(np.asarray, (FUSED, dict(delta)))
    shared = factors[SHARED]
    for name, start in (("q", 0), ("k", 3), ("v", 7)):
        w, b = base["attn"][name]["kernel"], factors[f"attn/{name}/kernel"]["b"]
        change = (shared["fixed_a"].T * factors["@shared/attn"]["d"][None]) @ shared["fixed_b"][
            start : start + len(b)
        ].T
        close(merged["attn"][name]["kernel"], w + change * b[None])
    again = lj.from_spec(json.loads(json.dumps(method.spec)))
    same(again.apply(FUSED, delta), method.apply(FUSED, delta))
    layers = {f"h_{n}": FUSED for n in range(2)}
    loop = lj.vera(lj.select("**/kernel"), rank=3, fused="**/{q,k,v}/kernel")
    scan = lj.vera(lj.select("**/kernel", axes="sio"), rank=3, fused="**/{q,k,v}/kernel")
    delta = random_delta(loop, layers)
    close(
        merged_params(scan, to_scanned(layers), to_scanned(delta)),
        to_scanned(merged_params(loop, layers, delta)),
        1e-6,
    )


def test_what_cannot_be_fused_is_said():
    with pytest.raises(ValueError, match=r"fused='attn/{q,k,v}/kernel': not all of q,k,v are selected in attn"):
        lj.vera(lj.select("attn/{q,v}/kernel"), rank=2, fused="attn/{q,k,v}/kernel").init(KEY, FUSED)
    for glob in ("attn/{x,y}/kernel", "up/kernel"):
        with pytest.raises(ValueError, match="names no parts in braces, or none of the selected"):
            lj.vera(lj.select("**/kernel"), rank=2, fused=glob).init(KEY, FUSED)
    method = lj.vera(lj.select("attn/*/kernel"), rank=2, fused="attn/{q,k,v}/kernel")
    delta = random_delta(method, FUSED)
    lacking = lj.Delta({path: factors for path, factors in delta.items() if path != "@shared/attn"})
    with pytest.raises(ValueError, match=r"it lacks \['@shared/attn'\] and has besides \[\]"):
        method.apply(FUSED, lacking)
    unshared = lj.Delta(delta | {"attn/k/kernel": delta["attn/k/kernel"] | {"d": jnp.ones(2)}})
    with pytest.raises(ValueError, match="attn/k/kernel has a factor 'd' of its own, but it is that of @shared/attn"):
        method.apply(FUSED, unshared)
