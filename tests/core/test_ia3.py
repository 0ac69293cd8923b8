"""IA3: against PEFT and dense weights, on every product and layout; what is shared, counted, undone, refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from tests.helpers.marks import diagonal
from tests.helpers.methods import SHAPES, as_dense, as_peft, as_some_layers, network, randomized, tree
from tests.helpers.networks import Stack, Tied, started
from tests.helpers.reference import close, ints, merged_params, normal, random_delta, replaced, same, sine_gradient
from tests.helpers.structural import CASES, X, slow_beyond_kinds

KEY = jax.random.key(0)


def numbers(tensor):
    """A tensor of torch as a vector."""
    return tensor.detach().numpy().ravel()


@pytest.mark.parametrize(("sizes", "kind"), diagonal(SHAPES, ["linear", "conv1d"]))
def test_peft(kind, sizes):
    peft = pytest.importorskip("peft")
    module = network(kind, sizes)
    params = tree(module)
    method = lj.ia3(lj.select("*/weight", axes="io" if kind == "conv1d" else "oi"), feedforward="l1/*")
    config = peft.IA3Config(
        target_modules=["l0", "l1", "l2"], feedforward_modules=["l1"], fan_in_fan_out=kind == "conv1d"
    )
    model = peft.get_peft_model(module, config)
    trained = randomized(model)
    keys = ["@shared/l0", "l1/weight", "@shared/l2" if kind == "conv1d" else "l2/weight"]
    names = {f"base_model.model.l{n}.ia3_l.default": (key, "l") for n, key in enumerate(keys)}
    delta = lj.Delta({key: {"l": numbers(trained[name])} for name, (key, _) in names.items()})
    assert jax.tree.map(jnp.shape, jax.eval_shape(method.init, KEY, params)) == jax.tree.map(jnp.shape, delta)
    as_peft(kind, params, model, trained, method, delta, names)


@pytest.mark.parametrize(("window", "feedforward"), diagonal([(3, 2), (1, 1)], [False, True]))
def test_convolutions_of_peft(feedforward, window):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 6, window, padding=1, stride=2))
    model = peft.get_peft_model(
        module, peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    )
    params = tree(torch.nn.Sequential(module[0].base_layer))["0"]
    (scale,) = randomized(model).values()
    x = torch.randn(2, 4, 5, 7)
    out = model(x)
    out.sin().sum().backward()
    method = lj.ia3(lj.select("weight", axes="oikk"), feedforward="weight" if feedforward else ())
    delta = lj.Delta({"weight" if feedforward else "@shared/": {"l": numbers(scale)}})

    def fn(p):
        y = lax.conv_general_dilated(x.numpy(), p["weight"], (2, 2), [(1, 1)] * 2)
        return y + p["bias"][None, :, None, None]

    y, grads, merged = sine_gradient(fn, method, params, delta)
    close(y, out.detach().numpy())
    close(jax.tree.leaves(grads), [scale.grad.numpy().ravel()], 2e-5)
    close(merged, tree(model.merge_and_unload())["0"], 1e-6)


def multiplied(axes, feedforward=False):
    """A reference: w times l, on the axes that `axes` says, and the bias of an output with it."""

    def dense(params, delta):
        (factors,) = delta.values()
        side = "iv" if feedforward else "o"
        shape = [n if x in side or x == "s" else 1 for n, x in zip(params["w"].shape, axes, strict=True)]
        scaled = {"w": params["w"] * factors["l"].reshape(shape)}
        if "bias" in params and not feedforward:
            scaled["bias"] = params["bias"] * factors["l"]
        return {**params, **scaled}

    return dense


@pytest.mark.parametrize("name", slow_beyond_kinds(CASES))
def test_structure(name):
    """Whatever is done to the axes of a weight, l follows, and nothing becomes dense."""
    fn, params, axes = CASES[name]
    allowed = "allow" if name == "einsum summing experts" else "error"
    feedforward = len(name) % 2 == 0
    method = lj.ia3(lj.select("w", axes=axes), feedforward="w" if feedforward else ())
    as_dense(fn, params, method, multiplied(axes, feedforward), X, on_dense=allowed)


W, V, BIAS = normal(8, 12, seed=1), normal(8, 3, 4, seed=2), normal(12, seed=3)
IDS = ints([[0, 7, 3], [9, -2, 7]])  # two of them are no rows
LAYOUTS = {
    # name: (function, params, axes)
    "bias": (lambda p, x: x @ p["w"] + p["bias"][None], {"w": W, "bias": BIAS}, "io"),
    "bias of heads": (
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]) + p["bias"][None],
        {"w": V, "bias": BIAS.reshape(3, 4)},
        "ioo",
    ),
    "stacked bias": (
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w["w"] + w["bias"][None]), None), x, p)[0],
        {"w": normal(3, 8, 8), "bias": normal(3, 8)},
        "sio",
    ),
    "oi": (lambda p, x: x @ p["w"].T + p["bias"][None], {"w": W.T, "bias": BIAS}, "oi"),
    "tied": (lambda p, x: jnp.tanh(p["w"][IDS % 8]) @ p["w"].T, {"w": W}, "vo"),
    "rows, clipped": (lambda p, x: jnp.take(p["w"], IDS, axis=0, mode="clip"), {"w": W}, "vo"),
    "rows, filled": (lambda p, x: jnp.take(p["w"], IDS, axis=0, mode="fill", fill_value=0.0), {"w": W}, "vo"),
    "a row": (lambda p, x: p["w"][5], {"w": W}, "vo"),
    "rows of a stack": (lambda p, x: p["w"][1][IDS % 8], {"w": normal(2, 8, 4)}, "svo"),
    "grouped convolution": (
        lambda p, x: lax.conv_general_dilated(
            normal(2, 6, 5, 4),
            p["w"],
            (1, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        ),
        {"w": normal(3, 2, 2, 6)},
        "kkio",
    ),
    "convolution, every place by itself": (
        lambda p, x: lax.conv_general_dilated(
            normal(2, 2, 9), p["w"], (2,), [(1, 1)], dimension_numbers=("NCW", "WIO", "NWC")
        ),
        {"w": normal(3, 2, 5)},
        "iio",
    ),
    "convolution as a product": (
        lambda p, x: jnp.einsum("bwi,wio->bo", normal(2, 3, 8), p["w"]) + normal(2, 24) @ p["w"].reshape(24, 5),
        {"w": normal(3, 8, 5)},
        "kio",
    ),
}


@pytest.mark.parametrize(("name", "feedforward"), diagonal(LAYOUTS, [False, True]))
def test_layouts(name, feedforward):
    fn, params, axes = LAYOUTS[name]
    method = lj.ia3(lj.select("w", axes={"w": axes}), feedforward="w" if feedforward else ())
    as_dense(fn, params, method, multiplied(axes, feedforward), X)


def test_some_layers_of_a_scanned_model():
    """The others stay as they are, and the loop gives the same."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), started(Stack(layers=3), X))  # biases too
    one = lj.ia3(lj.select("**/kernel", layers=(0, 2)), feedforward="**/down/*")
    some = lj.ia3(lj.select("**/kernel", layers=(0, 2), axes={"h/**": "sio"}), feedforward="**/down/*")
    as_some_layers(one, some, params, X)


@pytest.mark.parametrize("side", [(), "wte/*"])
def test_tied_embedding(side):
    model, ids = Tied(), ints([[1, 4, 10], [4, 4, 0]])
    params = started(model, ids)
    method = lj.ia3(lj.select("wte/embedding"), feedforward=side)
    delta = random_delta(method, params)
    scale, table = np.asarray(delta["wte/embedding"]["l"]), np.asarray(params["wte"]["embedding"])
    want = replaced(params, {"wte/embedding": table * (scale[:, None] if side else scale[None])})
    fn = lambda p: model.apply({"params": p}, ids)  # noqa: E731

    @jax.jit
    def lifted_and_dense(delta, dense):
        return lj.lift(fn, on_dense="error")(method.apply(params, delta)), fn(dense)

    close(*lifted_and_dense(delta, want))


def test_factors_stay_float32_where_a_model_computes_in_bfloat16():
    """Bit for bit: y is rounded, l is not."""
    delta = lj.Delta({"@shared/": {"l": 1 + normal(12) * 1e-3}})
    params, x = {"w": W, "bias": BIAS}, X.astype(jnp.bfloat16)
    method = lj.ia3(lj.select("w"))

    def fn(p):
        return x @ p["w"].astype(jnp.bfloat16), p["bias"].astype(jnp.bfloat16)

    # op by op: a compiler may leave roundings out
    y, bias = lj.lift(fn, on_dense="error")(method.apply(params, delta))
    plain = np.asarray(x @ W.astype(jnp.bfloat16)).astype(np.float32)
    scale = np.asarray(delta["@shared/"]["l"])
    same(y, (plain * scale[None]).astype(jnp.bfloat16))
    same(bias, (np.asarray(BIAS) * scale).astype(jnp.bfloat16))
    low = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), params)
    same(merged_params(method, low, delta)["w"], (low["w"].astype(np.float32) * scale[None]).astype(jnp.bfloat16))
    method = lj.ia3(lj.select("w"), feedforward="w")
    delta = lj.Delta({"w": {"l": 1 + normal(8) * 1e-2}})
    y, _ = lj.lift(fn, on_dense="error")(method.apply(params, delta))
    scaled = (np.asarray(x).astype(np.float32) * np.asarray(delta["w"]["l"])[None]).astype(jnp.bfloat16)
    same(y, jax.device_put(scaled) @ W.astype(jnp.bfloat16))


def test_strength_goes_from_the_base_to_the_factors():
    params = {"w": W, "bias": BIAS}
    method = lj.ia3(lj.select("w"))
    delta = random_delta(method, params)

    def plainly(p):
        return X @ p["w"] + p["bias"][None]

    fn = lj.lift(plainly, on_dense="error")
    run = jax.jit(lambda p, s: fn(method.apply(p, delta, strength=s)))
    plain = jax.jit(plainly)(params)
    same(run(params, jnp.float32(0)), plain)
    plain, factor = np.asarray(plain), np.asarray(delta["@shared/"]["l"])[None]
    close(run(params, jnp.float32(1)), plain * factor)
    close(run(params, jnp.float32(0.25)), plain * (np.float32(0.75) + np.float32(0.25) * factor))
    same(merged_params(method, params, delta, strength=0.0), params)
    start = jax.jit(method.init)(KEY, params)
    same(merged_params(method, params, start, strength=0.3), params)


def test_unmerge_divides():
    params = {"w": W, "bias": BIAS}
    method = lj.ia3(lj.select("w"))
    delta = random_delta(method, params)
    merged = merged_params(method, params, delta)
    close(lj.unmerge(merged, method, delta), params, 1e-6)
    delta["@shared/"]["l"] = np.asarray(delta["@shared/"]["l"]) * (np.arange(12) != 3)
    with pytest.raises(ValueError, match=r"(w|bias): a factor is 0, which cannot be undone"):
        lj.unmerge(merged_params(method, params, delta), method, delta)


def test_counts_and_what_trains():
    """The paper's choice: keys, values (per output) and the second matrix of the MLP (per input)."""
    attn = {"kernel": normal(8, 2, 4), "bias": normal(2, 4)}
    mlp = {"up": {"kernel": W, "bias": BIAS}, "down": {"kernel": normal(12, 8), "bias": normal(8)}}
    params = {"attn": {"query": attn, "key": attn, "value": attn}, **mlp}
    chosen = lj.select("attn/{key,value}/kernel", "down/kernel", axes={"attn/**": "ioo", "**": "io"})
    method = lj.ia3(chosen, feedforward=["down/*"])
    report = lj.check(method, jax.eval_shape(lambda: params))
    counts = {"@shared/attn/key": 8, "@shared/attn/value": 8, "down/kernel": 12}
    assert {row.path: row.trained for row in report.rows} == counts and report.trained == 28
    delta = random_delta(method, params)
    assert set(jax.tree.leaves(lj.labels(delta))) == {"trainable"}
    labels = lj.labels(method.apply(params, delta))
    assert labels["down"]["bias"] == labels["attn"]["query"]["kernel"] == "frozen"
    for w in labels["attn"]["key"].values():
        assert (w.base, w.outputs, w.inputs) == ("frozen", "trainable", None)

    def loss(params):
        fn = lj.lift(
            lambda p: jnp.einsum("bi,ihd->bhd", X, p["key"]["kernel"]) + p["key"]["bias"][None], on_dense="error"
        )
        return jnp.sum(fn(method.apply(params, delta)["attn"]))

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_shardings():
    """A factor takes the sharding of the axes that it scales: in shard_map, explicit, and by the compiler."""
    mesh = jax.make_mesh((2, 4), ("b", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"up": {"w": W}, "down": {"w": normal(12, 8, seed=2)}}
    method = lj.ia3(lj.select("*/w"), feedforward="down/*")
    delta = random_delta(method, params)
    merged = jax.tree.map(np.asarray, merged_params(method, params, delta))
    x = normal(4, 8)
    hidden = np.tanh(np.asarray(x) @ merged["up"]["w"])
    want = hidden @ merged["down"]["w"]

    def body(p, x):
        return lax.psum(jnp.tanh(x @ p["up"]["w"]) @ p["down"]["w"], "t")

    specs = {"up": {"w": P(None, "t")}, "down": {"w": P("t", None)}}
    fn = jax.shard_map(body, mesh=mesh, in_specs=(specs, P("b")), out_specs=P("b"))
    close(jax.jit(lambda d: lj.lift(fn, on_dense="error")(method.apply(params, d), x))(delta), want)

    mesh = jax.make_mesh((2, 4), ("b", "t"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), params, specs)
        fn = lj.lift(lambda p, x: jnp.tanh(x @ p["up"]["w"]), on_dense="error")
        got = jax.jit(lambda d, p, x: fn(method.apply(p, d), x))(delta, placed, jax.device_put(x, P("b", None)))
    close(np.asarray(got), hidden)


def test_a_chain_with_its_own():
    params = {"a": {"kernel": W, "bias": BIAS}, "b": {"kernel": W}}
    both = lj.chain(lj.ia3(lj.select("a/kernel")), lj.lora(lj.select("b/kernel"), rank=2))
    delta = random_delta(both, params)
    assert sorted(delta) == ["@shared/a", "b/kernel"] and lj.check(both, params).trained == 12 + 2 * (8 + 12)
    again = lj.from_spec(json.loads(json.dumps(both.spec)))
    same(again.apply(params, delta), both.apply(params, delta))
    with pytest.raises(ValueError, match="a/bias is adapted already"):
        lj.check(lj.chain(lj.tune(lj.select("a/bias")), lj.ia3(lj.select("a/kernel"))), params)


def test_a_bias_of_another_order_is_named():
    """nn.scan over the second axis of the parameters."""
    params = {"kernel": normal(4, 3, 5), "bias": normal(5, 3)}
    with pytest.raises(
        ValueError, match=r"bias has shape \(5, 3\), but its weight with axes 'iso' has outputs \(3, 5\)"
    ):
        lj.check(lj.ia3(lj.select("kernel", axes="iso")), params)
    method = lj.ia3(lj.select("kernel", axes={"kernel": "iso", "bias": "os"}))
    delta = random_delta(method, params)
    scale = np.asarray(delta["@shared/"]["l"])
    assert scale.shape == (3, 5)
    merged = merged_params(method, params, delta)
    want = {"kernel": np.asarray(params["kernel"]) * scale[None], "bias": np.asarray(params["bias"]) * scale.T}
    close(merged, want)


def test_what_cannot_be_is_said():
    params = {"a": {"kernel": W, "bias": BIAS}, "b": {"kernel": W, "other": W, "bias": BIAS}}
    method = lj.ia3(lj.select("a/kernel"))
    for wrong, message in [
        (lj.ia3(lj.select("a/*")), "a/bias with axes 'o': IA3 needs a weight with input and output axes"),
        (lj.ia3(lj.select("a/kernel"), feedforward="b/*"), r"feedforward='b/\*' matches none of the selected weights"),
        (lj.ia3(lj.select("b/{kernel,other}")), "b/other is not the only selected weight beside b/bias"),
    ]:
        with pytest.raises(ValueError, match=message):
            lj.check(wrong, params)
    delta = random_delta(method, params)
    with pytest.raises(ValueError, match=r"it lacks \[\] and has besides \['@shared/c'\]"):
        method.apply(params, lj.Delta(delta | {"@shared/c": {"l": BIAS}}))
    with pytest.raises(ValueError, match=r"a/(kernel|bias): the delta's factors are {'l': \(3,\)}"):
        method.apply(params, lj.Delta({"@shared/a": {"l": jnp.ones(3)}}))
    with pytest.raises(TypeError, match="takes a Delta"):
        method.apply(params, dict(delta))
    with pytest.raises(TypeError, match="takes the base's params"):
        method.apply(delta, delta)
    tuned = lj.tune(lj.select("a/kernel"))
    without = lj.without_tuned(params, random_delta(tuned, params))
    with pytest.raises(ValueError, match="a/kernel was taken out of these params"):
        method.apply(without, delta)
