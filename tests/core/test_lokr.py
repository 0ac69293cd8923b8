"""LoKr: against PEFT and dense weights, on every product and layout; what becomes dense, is counted and refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.methods.lokr import factorization
from lora_jax.planning.flops import equations
from tests.helpers.marks import diagonal, slow_but
from tests.helpers.methods import SHAPES, as_dense, as_peft, as_some_layers, network, randomized, tree
from tests.helpers.networks import Stack, Tied, started
from tests.helpers.reference import close, ints, merged_params, normal, random_delta, replaced, same, sine_gradient
from tests.helpers.structural import CASES, X, slow_beyond_kinds

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "sizes, rank, options",
    [
        (SHAPES[0], 1, {}),
        (SHAPES[1], 4, {}),
        (SHAPES[2], 2, {"decompose_both": True}),
        ((15, 21, 36, 27), 1, {"decompose_both": True, "decompose_factor": 3}),
        ((15, 21, 36, 27), 3, {"decompose_factor": 4}),
    ],
)
def test_peft(sizes, rank, options):
    peft = pytest.importorskip("peft")
    module = network("linear", sizes)
    params = tree(module)
    method = lj.lokr(lj.select("*/weight"), rank=rank, alpha=3, **options)
    config = peft.LoKrConfig(r=rank, alpha=3, target_modules=["l0", "l1", "l2"], **options)
    model = peft.get_peft_model(module, config)
    start = jax.jit(method.init)(KEY, params)
    like_theirs(start, model)
    trained = randomized(model)
    names, delta = {}, {}
    for name, tensor in trained.items():
        _, _, layer, factor, _ = name.split(".")
        names[name] = f"{layer}/weight", factor.removeprefix("lokr_")
        delta.setdefault(f"{layer}/weight", {})[names[name][1]] = jax.device_put(tensor.detach().numpy().copy())
    delta = lj.Delta(delta)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, delta)
    assert lj.check(method, params).trained == sum(tensor.numel() for tensor in trained.values())
    as_peft("linear", params, model, trained, method, delta, names)


def like_theirs(start, model):
    """The first factors: zero where PEFT's are, else uniform within the same bound."""
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        _, _, layer, factor, _ = name.split(".")
        ours, bound = start[f"{layer}/weight"][factor.removeprefix("lokr_")], 1 / math.sqrt(tensor.shape[1])
        largest = float(np.max(np.abs(ours)))
        for most in (largest, float(tensor.detach().abs().max())):
            assert (most == 0) == ("w1" in factor and "b" not in factor.split("_")) and most <= bound * 1.00001
        assert ours.size < 30 or largest in (0.0, pytest.approx(bound, rel=0.3))


def test_factorization_is_peft_s():
    theirs = pytest.importorskip("peft.tuners.lokr.layer").factorization
    sizes = (*range(1, 130), 768, 1000, 1024, 2304, 3072, 50257)
    for size in sizes:
        for factor in (-1, 1, 2, 3, 5, 8, 16, 100):
            assert factorization(size, factor) == theirs(size, factor), (size, factor)


@pytest.mark.parametrize(("rank", "window"), diagonal([1, 4], [(3, 2), (1, 1)]))
def test_convolutions_of_peft(window, rank):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 12, window, padding=1, stride=2))
    model = peft.get_peft_model(module, peft.LoKrConfig(r=rank, alpha=3, target_modules=["0"], decompose_both=True))
    params = {"weight": jax.device_put(module[0].base_layer.weight.detach().numpy().copy())}
    bias = module[0].base_layer.bias.detach()
    trained = {name.split("lokr_")[1].split(".")[0]: tensor for name, tensor in randomized(model).items()}
    x = torch.randn(2, 4, 5, 7)
    out = model(x) - bias[:, None, None]
    out.sin().sum().backward()
    method = lj.lokr(lj.select("weight", axes="oikk"), rank=rank, alpha=3, decompose_both=True)
    delta = lj.Delta(
        {"weight": {name: jax.device_put(tensor.detach().numpy().copy()) for name, tensor in trained.items()}}
    )
    assert jax.tree.map(jnp.shape, jax.eval_shape(method.init, KEY, params)) == jax.tree.map(jnp.shape, delta)

    def fn(p):
        return lax.conv_general_dilated(x.numpy(), p["weight"], (2, 2), [(1, 1)] * 2)

    y, grads, merged = sine_gradient(fn, method, params, delta)
    close(y, out.detach().numpy())
    close(grads["weight"], {name: tensor.grad.numpy() for name, tensor in trained.items()}, 2e-5)
    close(merged["weight"], model.merge_and_unload()[0].weight.detach().numpy(), 1e-6)


def added(axes, scale):
    """A reference: w + scale * kron(w1, w2), layer by layer, in the (out, in) orientation of PEFT."""

    def matrix(factors, name, n):
        if name in factors:
            return factors[name].reshape(-1, *factors[name].shape[axes.count("s") :])[n]
        down, up = (
            factors[name + end].reshape(-1, *factors[name + end].shape[axes.count("s") :])[n] for end in ("_b", "_a")
        )
        return up @ down

    def dense(params, delta):
        w, factors = params["w"], delta["w"]
        size = {c: [n for n, x in zip(w.shape, axes, strict=True) if x in c] for c in ("s", "o", "iv", "k")}
        layers = []
        for n in range(math.prod(size["s"])):
            w1, w2 = matrix(factors, "w1", n), matrix(factors, "w2", n)
            w2 = w2.reshape(w2.shape[0], -1, math.prod(size["k"]))
            places = [jnp.kron(w1, w2[:, :, k]) for k in range(w2.shape[2])]
            layers.append(jnp.stack(places, -1))
        change = jnp.stack(layers).reshape([n for c in size for n in size[c]])
        now = [j for c in size for j, letter in enumerate(axes) if letter in c]
        return {"w": w + scale * change.transpose([now.index(j) for j in range(len(axes))])}

    return dense


SPACE = normal(2, 6, 5, 4)
TURNED = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 1, 0), (0, 3, 1, 2))  # a kernel (width, height, in, out)
DENSE = {
    "turned window": (
        lambda p, x: lax.conv_general_dilated(SPACE, p["w"], (1, 1), "SAME", dimension_numbers=TURNED),
        {"w": normal(2, 3, 4, 6)},
        "kkio",
    ),
    "window joined with the input": (lambda p, x: normal(2, 24) @ p["w"].reshape(24, 5), {"w": normal(3, 8, 5)}, "kio"),
    "turned convolution": (lambda p, x: jnp.einsum("bo,wio->bwi", normal(2, 5), p["w"]), {"w": normal(3, 8, 5)}, "kio"),
    "heads joined the other way": (
        lambda p, x: x @ p["w"].swapaxes(1, 2).reshape(8, 12),
        {"w": normal(8, 2, 6)},
        "ioo",
    ),
}
CUTS = {  # what changes the order of input or output axes, or leaves some entries out
    *("slice of outputs", "slice of inputs", "slice of both, transposed", "split in three", "split of inputs"),
    *("dynamic slice", "head of a head", "part of each head", "swapped heads", "the first rows (positions)"),
    *("one row", "a traced row", "head of the first rows", "einsum with several free axes", "vdot of a column", *DENSE),
}


FOLLOWED = (
    *("transpose", "transpose twice", "reshape of outputs to heads", "reshape of heads to outputs"),
    *("reshape of joined inputs", "reshape of inputs apart", "w[i] traced", "for w in stack", "moved stack"),
    *("expand and squeeze", "broadcast to a stack", "flattened stack of one", "rows by vmap", "einsum to heads"),
    *("einsum from heads, other order", "einsum of experts", "tensordot", "batch axis from vmap"),
)


@pytest.mark.parametrize("name", slow_beyond_kinds(FOLLOWED))
def test_what_is_followed(name):
    fn, params, axes = CASES[name]
    as_dense(fn, params, lj.lokr(lj.select("w", axes=axes), rank=1, decompose_both=True), added(axes, 1.0), X)


REPEATED = {"split of inputs", "head of a head", "part of each head", "a traced row", "head of the first rows"}


@pytest.mark.parametrize("name", slow_but(sorted(CUTS), *(CUTS - REPEATED)))
def test_what_becomes_dense_with_a_report(name):
    """And is right."""
    fn, params, axes = (CASES | DENSE)[name]
    method = lj.lokr(lj.select("w", axes=axes), rank=1, alpha=1.5)
    delta = random_delta(method, params)
    with pytest.raises(ValueError, match="adapted array at w is made dense"):
        lj.lift(fn, on_dense="error")(method.apply(params, delta), X)
    lifted = lj.lift(fn, on_dense="allow")
    got, want = jax.jit(lambda d: (lifted(method.apply(params, d), X), fn(added(axes, 1.5)(params, d), X)))(delta)
    close(got, want)


W, IDS = normal(8, 12, seed=1), ints([[0, 7, 3], [9, -2, 7]])  # two of them are no rows
LAYOUTS = {
    # name: (function, params, axes)
    "oi": (lambda p, x: x @ p["w"].T, {"w": W.T}, "oi"),
    "tied": (lambda p, x: jnp.tanh(p["w"][IDS % 8]) @ p["w"].T, {"w": W}, "vo"),
    "rows, clipped": (lambda p, x: jnp.take(p["w"], IDS, axis=0, mode="clip"), {"w": W}, "vo"),
    "rows, filled": (lambda p, x: jnp.take(p["w"], IDS, axis=0, mode="fill", fill_value=0.0), {"w": W}, "vo"),
    "sorted rows": (
        lambda p, x: p["w"].at[jnp.array([1, 2, 3, 6])].get(indices_are_sorted=True, unique_indices=True),
        {"w": W},
        "vo",
    ),
    "rows of a stack": (lambda p, x: p["w"][1][IDS % 8], {"w": normal(2, 8, 4)}, "svo"),
    "stack": (lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], {"w": normal(3, 8, 8)}, "sio"),
    "stack on another axis": (lambda p, x: jnp.einsum("bi,iso->sbo", x, p["w"][:, 1:]), {"w": normal(8, 3, 9)}, "iso"),
    "grouped convolution": (
        lambda p, x: lax.conv_general_dilated(
            SPACE, p["w"], (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        ),
        {"w": normal(3, 2, 2, 6)},
        "kkio",
    ),
    "convolution, every place by itself": (
        lambda p, x: lax.conv_general_dilated(
            SPACE, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        {"w": normal(3, 2, 4, 6)},
        "iiio",
    ),
    "convolution as an einsum": (
        lambda p, x: jnp.einsum("bwi,wio->bo", normal(2, 3, 8), p["w"]),
        {"w": normal(3, 8, 5)},
        "kio",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    fn, params, axes = LAYOUTS[name]
    as_dense(fn, params, lj.lokr(lj.select("w", axes={"w": axes}), rank=1, alpha=1.5), added(axes, 1.5), X)


def test_nothing_dense_is_formed():
    """In a forward and backward pass of a product, of heads and of look-ups no result is as large as the weight."""
    params = {"w": normal(36, 6, 10), "e": normal(91, 36)}
    method = lj.lokr(lj.select("*", axes={"w": "ioo", "e": "vo"}), rank=2, decompose_both=True)

    def loss(delta, ids):
        fn = lj.lift(lambda p: jnp.einsum("bi,ihd->bhd", p["e"][ids], p["w"].reshape(36, 60).reshape(36, 6, 10)))
        return jnp.sum(fn(method.apply(params, delta)))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(random_delta(method, params), ints([3, 90]))
    sizes = {eqn.primitive.name: [v.aval.size for v in eqn.outvars] for eqn in equations(jaxpr.jaxpr)}
    made = {name for name, sizes in sizes.items() if max(sizes, default=0) >= 36 * 60} - {"reshape", "stop_gradient"}
    assert not made


@pytest.mark.parametrize("axes, shape", {"io": (60, 63), "sio": (3, 60, 63), "ssio": (2, 2, 60, 63)}.items())
def test_the_first_factors_of_a_stack_have_the_bounds_of_one_layer(axes, shape):
    """60 = 6 * 10 inputs, 63 = 7 * 9 outputs: w2_a (9, 2), w2_b (2, 10); or w2 (9, 10)."""
    for rank, bounds in ((2, {"w2_a": 2, "w2_b": 10}), (9, {"w2": 10})):
        method, params = lj.lokr(lj.select("w", axes=axes), rank=rank), {"w": np.zeros(shape, np.float32)}
        start = jax.jit(method.init)(KEY, params)["w"]
        assert set(start) == {"w1", *bounds} and not np.any(start["w1"])
        for name, n in bounds.items():
            assert 0.8 / math.sqrt(n) < np.max(np.abs(start[name])) <= 1 / math.sqrt(n), name


def test_the_scale_gets_no_gradient():
    method, params, ids = lj.lokr(lj.select("w", axes="vo"), rank=1), {"w": W}, jnp.arange(3)
    delta = random_delta(method, params)
    fn = lj.lift(lambda p: jnp.sum(jnp.tanh(p["w"][ids]) @ p["w"].T), on_dense="error")
    of_strength, of_delta = jax.jit(jax.grad(lambda s, d: fn(method.apply(params, d, strength=s)), (0, 1)))(1.0, delta)
    assert of_strength == 0.0 and all(np.any(leaf) for leaf in jax.tree.leaves(of_delta))


@pytest.mark.parametrize("options, scale", [({}, 1.0), ({"alpha": 3}, 1.0), ({"alpha": {"w": 6}}, 2.0)])
def test_the_scale_is_alpha_over_the_rank(options, scale):
    """Also where no side is low-rank, and 1 without an alpha."""
    method, params = lj.lokr(lj.select("w"), rank=3, **options), {"w": W}
    delta = random_delta(method, params)
    assert set(delta["w"]) == {"w1", "w2"}
    assert method.apply(params, delta)["w"].scale == scale
    assert method.apply(params, delta, strength=0.25)["w"].scale == 0.25 * scale


def test_some_layers_of_a_scanned_model():
    """The others stay as they are, and the loop gives the same."""
    params = started(Stack(layers=3), X)
    one = lj.lokr(lj.select("**/kernel", layers=(0, 2)), rank=1, alpha=2)
    some = lj.lokr(lj.select("**/kernel", layers=(0, 2), axes={"h/**": "sio"}), rank=1, alpha=2)
    as_some_layers(one, some, params, X)


def test_tied_embedding():
    model, ids = Tied(vocab=15), ints([[1, 4, 14], [4, 4, 0]])
    params = started(model, ids)
    method = lj.lokr(lj.select("wte/embedding"), rank=1)
    delta = random_delta(method, params)
    fn = lambda p: model.apply({"params": p}, ids)  # noqa: E731

    @jax.jit
    def lifted_and_dense(delta):
        dense = added("vo", 1.0)({"w": params["wte"]["embedding"]}, {"w": delta["wte/embedding"]})["w"]
        lifted = lj.lift(fn, on_dense="error")(method.apply(params, delta))
        return lifted, fn(replaced(params, {"wte/embedding": dense}))

    close(*lifted_and_dense(delta))


def test_counts_and_what_trains():
    """GPT-2's up kernel: 768 = 24 * 32 inputs, 3072 = 48 * 64 outputs."""
    params = {"up": {"kernel": jax.ShapeDtypeStruct((768, 3072), jnp.float32)}}
    for options, trained in [
        ({"rank": 8}, 48 * 24 + 8 * (64 + 32)),
        ({"rank": 8, "decompose_both": True}, 8 * (48 + 24 + 64 + 32)),
        ({"rank": 32}, 48 * 24 + 64 * 32),
        ({"rank": 8, "decompose_factor": 16}, 16 * 16 + 8 * (192 + 48)),
        ({"rank": {"up/*": 2}, "alpha": {"**": 7}}, 48 * 24 + 2 * (64 + 32)),
    ]:
        method = lj.lokr(lj.select("**/kernel"), **options)
        assert lj.check(method, params).trained == trained
        assert lj.check(lj.from_spec(json.loads(json.dumps(method.spec))), params).trained == trained
    method, params = lj.lokr(lj.select("w"), rank=1), {"w": W}
    delta = random_delta(method, params)
    assert set(jax.tree.leaves(lj.labels(delta))) == {"trainable"}
    labels = lj.labels(method.apply(params, delta))["w"]
    assert (labels.base, labels.scale, labels.w1, labels.w2_a) == ("frozen", "frozen", "trainable", "trainable")

    def loss(params):
        return jnp.sum(lj.lift(lambda p: X @ p["w"])(method.apply(params, delta)))

    assert not np.any(jax.jit(jax.grad(loss))(params)["w"])


def test_strength_and_unmerge():
    params = {"w": W}
    method = lj.lokr(lj.select("w"), rank=1, alpha=3)
    delta = random_delta(method, params)
    run = jax.jit(lambda s: lj.merge(method.apply(params, delta, strength=s)))
    full_strength, half, base = jax.jit(
        lambda merged, d: (added("io", 3.0)(params, d), added("io", 1.5)(params, d), lj.unmerge(merged, method, d))
    )(run(jnp.float32(1)), delta)
    same(run(jnp.float32(0)), params)
    close(run(jnp.float32(1)), full_strength)
    close(run(jnp.float32(0.5)), half)
    close(base, params, 1e-6)


def test_bfloat16():
    """A base and a model of low precision; the merged weights are rounded once."""
    method = lj.lokr(lj.select("w"), rank=1, decompose_both=True)
    low = {"w": np.asarray(W).astype(jnp.bfloat16)}
    delta = random_delta(method, low)
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype("float32")}
    exact = np.asarray(merged_params(method, {"w": low["w"].astype(np.float32)}, delta)["w"])
    same(merged_params(method, low, delta)["w"], exact.astype(jnp.bfloat16))
    for params in (low, {"w": W}):
        fn = lj.lift(lambda p: X.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), on_dense="error")
        got = jax.jit(lambda d, params=params, fn=fn: fn(method.apply(params, d)))(delta)
        assert got.dtype == jnp.bfloat16
        close(
            np.asarray(got).astype(np.float32), np.asarray(X) @ exact, 2e-2
        )  # 8 bits of mantissa, in x, factors and result


def test_shardings():
    """Sharded by the compiler or explicitly it is the same; a shard_map that cuts the weight is refused, others not."""
    mesh = jax.make_mesh((2, 4), ("b", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params, x = {"w": W}, normal(4, 8)
    method = lj.lokr(lj.select("w"), rank=1)
    delta = random_delta(method, params)
    want = jax.jit(lambda d: x @ added("io", 1.0)(params, d)["w"])(delta)
    fn = lj.lift(lambda p, x: x @ p["w"], on_dense="error")
    place = lambda *names: jax.NamedSharding(mesh, P(*names))  # noqa: E731
    placed = {"w": jax.device_put(W, place(None, "t"))}
    close(jax.jit(lambda d, p: fn(method.apply(p, d), jax.device_put(x, place("b"))))(delta, placed), want)
    uncut = jax.shard_map(lambda p, x: x @ p["w"], mesh=mesh, in_specs=(P(), P("b")), out_specs=P("b"))
    close(jax.jit(lambda d: lj.lift(uncut, on_dense="error")(method.apply(params, d), x))(delta), want)
    cut = jax.shard_map(lambda p, x: x @ p["w"], mesh=mesh, in_specs=(P(None, "t"), P("b")), out_specs=P("b", "t"))
    with pytest.raises(ValueError, match=r"w: \(8, 3\) is a part of a weight"):
        lj.lift(cut)(method.apply(params, delta), x)
    mesh = jax.make_mesh((2, 4), ("b", "t"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = {"w": jax.device_put(W, place(None, "t"))}
        got = jax.jit(lambda d, p, x: fn(method.apply(p, d), x))(delta, placed, jax.device_put(x, place("b", None)))
    close(np.asarray(got), np.asarray(want))


def test_what_cannot_be_is_said():
    params = {"w": W, "b": normal(3)}
    for rank in (0, 1.0, True):
        with pytest.raises(ValueError, match=f"^rank={rank} must be a whole number from 1"):
            lj.check(lj.lokr(lj.select("w"), rank=rank), params)
    for factor in (0, -2):
        with pytest.raises(ValueError, match=f"decompose_factor={factor} must be a whole number from 1, or -1"):
            lj.lokr(lj.select("w"), rank=1, decompose_factor=factor)
    with pytest.raises(ValueError, match="b with axes 'o': LoKr needs a weight with input and output axes"):
        lj.check(lj.lokr(lj.select("*"), rank=1), params)
    method = lj.lokr(lj.select("w"), rank=1)
    with pytest.raises(ValueError, match=r"w: the delta's factors are {'w1': \(3, 2\)}, but .* 'w2_b': \(1, 4\)"):
        method.apply(params, lj.Delta({"w": {"w1": jnp.ones((3, 2))}}))
