"""DoRA against dense arithmetic over every layout (against PEFT: test_dora_pissa_peft)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.core.selection import CLASS
from lora_jax.planning.flops import equations
from tests.helpers.methods import LAYOUTS, USES, both
from tests.helpers.networks import Stack, Tied, stacked, started
from tests.helpers.reference import (
    axes_at,
    close,
    dense_delta,
    filled,
    ints,
    leaves,
    merged_params,
    normal,
    numpy_of,
    replaced,
    same,
)

KEY = jax.random.key(0)
X = normal(3, 8, seed=5)


def norms(w, axes):
    """The norm over the input axes, in the order of `so`, by hand."""
    inputs = tuple(j for j, letter in enumerate(axes) if CLASS[letter] == "i")
    kept = [letter for letter in axes if CLASS[letter] != "i"]
    order = sorted(range(len(kept)), key=lambda j: kept[j] != "s")
    xp = numpy_of(w)
    w = xp.asarray(w)
    return xp.sqrt(xp.sum(w * w, inputs)).transpose(order)


def as_units(m, w, axes):
    """What has the layout `so`, in the axes of the base with ones for the input axes."""
    order = sorted((j for j, letter in enumerate(axes) if CLASS[letter] != "i"), key=lambda j: axes[j] != "s")
    rank = np.argsort(order)
    shape = [1 if CLASS[letter] == "i" else n for letter, n in zip(axes, w.shape, strict=True)]
    return m.transpose(rank).reshape(shape)


def densely(params, delta, axes=None, *, scale):
    """params with m V / ||V||, the norm without a gradient."""
    flat = leaves(params)

    def whole(path, f):
        letters = axes_at(path, axes)
        v = flat[path] + dense_delta(f["a"], f["b"], letters, scale)
        return v * as_units(f["m"], v, letters) / as_units(lax.stop_gradient(norms(v, letters)), v, letters)

    return replaced(params, {path: whole(path, factors) for path, factors in delta.items()})


def trained(delta, seed=1, size=0.3):
    """The delta after some training: factors that are not zero, m not far from the norm."""
    new = filled(delta, seed, size)

    def moved(path, norm):
        return jax.device_put(np.asarray(norm) * (1 + np.asarray(new[path]["m"])))

    return lj.Delta(
        {
            path: {**new[path], "m": moved(path, f["fixed_norm"]), "fixed_norm": f["fixed_norm"]}
            for path, f in delta.items()
        }
    )


def initial(method, params):
    return jax.jit(method.init)(KEY, params)


def test_every_layout_begins_as_the_base_bit_for_bit_and_merges_as_the_dense_formula():
    params = {axes: normal(*shape) for axes, shape in LAYOUTS.items()}
    axes = {name: name for name in LAYOUTS}
    method = lj.dora(lj.select("*", axes=axes), rank=2, alpha=3)
    delta = jax.jit(method.init)(KEY, params)
    for name, factors in delta.items():
        same(factors["m"], factors["fixed_norm"])
        close(factors["m"], norms(params[name], name), 1e-6)

    def merged_and_dense(delta):
        return lj.merge(method.apply(params, delta)), densely(params, delta, axes, scale=1.5)

    same(jax.jit(merged_and_dense)(delta)[0], params)
    merged, want = jax.jit(merged_and_dense)(trained(delta))
    for name in LAYOUTS:
        close(merged[name], want[name], 2e-6)


@pytest.mark.parametrize("axes", ["io", "vo"])
def test_the_beginning_is_the_base_bit_for_bit_op_by_op(axes):
    params = {"w": normal(*LAYOUTS[axes])}
    method = lj.dora(lj.select("w", axes=axes), rank=2, alpha=3)
    same(lj.merge(method.apply(params, method.init(KEY, params))), params)


CASES = USES | {
    "heads": (lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]), (8, 3, 4), "ioo"),
    "reshaped to heads": (lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(8, 3, 4)), (8, 12), "io"),
    "slice of outputs": (lambda p, x: x @ p["w"][:, 2:7], (8, 12), "io"),
    "slice of inputs": (lambda p, x: x[:, :5] @ p["w"][3:], (8, 12), "io"),  # the norm is that of the whole
    "split": (lambda p, x: [x @ part for part in jnp.split(p["w"], 3, axis=1)], (8, 12), "io"),
    "experts": (lambda p, x: jnp.einsum("sio,bsi->bso", p["w"], normal(2, 3, 8)), (3, 8, 5), "sio"),
    "a layer by a traced index": (lambda p, x: x @ p["w"][jnp.argmax(x[0]) % 3], (3, 8, 5), "sio"),
    "grouped convolution": (
        lambda p, x: lax.conv_general_dilated(
            normal(2, 6, 8), p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2
        ),
        (3, 4, 6),
        "kio",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_products_and_gradients_are_those_of_the_dense_formula(name):
    """Gradients of a, b and m with the norm detached; nothing dense is formed."""
    fn, shape, axes = CASES[name]
    params = {"w": normal(*shape)}
    method = lj.dora(lj.select("w", axes=axes), rank=2, alpha=3)
    first = initial(method, params)
    lifted = lj.lift(fn, on_dense="error")

    def got(delta):
        return lifted(method.apply(params, delta), X)

    def want(delta):
        return fn(densely(params, delta, {"w": axes}, scale=1.5), X)

    (out, grads), (dense, dense_grads) = both(got, want, trained(first))
    close(out, dense)
    close(grads, dense_grads, 3e-5)
    assert not np.any(grads["w"]["fixed_norm"]) and all(np.any(grads["w"][name]) for name in ("a", "b", "m"))
    same(*jax.jit(lambda params, delta: (lifted(method.apply(params, delta), X), fn(params, X)))(params, first))


def test_nothing_of_the_size_of_the_weight_is_made_beside_it():
    """The norm comes from the factors: besides the base itself and its squares, no (in, out) array, no dense A B."""
    params = {"w": normal(40, 30)}
    method = lj.dora(lj.select("w"), rank=2)
    delta = trained(initial(method, params))
    run = lj.lift(lambda p, x: x @ p["w"], on_dense="error")
    jaxpr = jax.make_jaxpr(lambda d: run(method.apply(params, d), normal(3, 40)))(delta).jaxpr
    big = [e.primitive.name for e in equations(jaxpr) if any(v.aval.shape == (40, 30) for v in e.outvars)]
    assert set(big) <= {"mul", "stop_gradient", "convert_element_type"} and big.count("mul") <= 1, big


def test_a_unit_without_weights_begins_as_it_is_and_learns():
    """||V|| is 0 there: m / ||V|| has no value, and no step may give NaN."""
    params = {"w": jax.device_put(np.asarray(normal(8, 6)) * np.float32([1, 1, 0, 1, 1, 1]))}
    method = lj.dora(lj.select("w"), rank=2)
    delta = initial(method, params)
    run = lj.lift(lambda p, x: x @ p["w"], on_dense="error")
    tx = lj.freeze_base(optax.sgd(0.1))

    @jax.jit
    def step(delta):
        def loss(delta):
            out = run(method.apply(params, delta), X)
            return jnp.mean((out - 1.0) ** 2), out

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(delta)
        return optax.apply_updates(delta, tx.update(grads, tx.init(delta), delta)[0]), value, out

    losses = []
    for n in range(4):
        delta, value, out = step(delta)
        losses.append(value)
        if n == 0:
            same(out, X @ params["w"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(delta)) and losses[-1] < losses[0]


def test_strength_goes_from_the_base_to_the_adapter():
    params = {"w": normal(8, 6), "stack": normal(2, 8, 6)}
    method = lj.dora(lj.select("**", axes={"stack": "sio", "w": "io"}), rank=2)
    delta = trained(initial(method, params))
    at = jax.jit(lambda s: lj.merge(method.apply(params, delta, strength=s)))
    same(at(jnp.float32(0)), params)
    merged = merged_params(method, params, delta)
    close(at(jnp.float32(1)), merged, 1e-6)
    between = jax.tree.map(lambda w, v: np.asarray(w) + np.float32(0.25) * np.asarray(v - w), params, merged)
    close(at(jnp.float32(0.25)), between, 1e-6)


def test_layers_of_a_stack_leave_the_others():
    model, params = Stack(layers=3, scan=True), stacked(started(Stack(layers=3), X), 3)
    kernels = {path: "sio" for path in leaves(params) if "kernel" in path}
    method = lj.dora(lj.select("**/kernel", axes=kernels, layers=[0, 2]), rank=2)
    delta = trained(initial(method, params))
    assert jax.tree.map(jnp.shape, delta["h/up/kernel"]) == {
        "a": (2, 8, 2),
        "b": (2, 2, 16),
        "m": (2, 16),
        "fixed_norm": (2, 16),
    }
    kernel = params["h"]["up"]["kernel"]
    kernel = np.asarray(kernel)
    close(delta["h/up/kernel"]["fixed_norm"], norms(kernel[[0, 2]], "sio"), 1e-6)

    @jax.jit
    def run(delta):
        adapted = method.apply(params, delta)
        merged = lj.merge(adapted)
        out = lj.lift(model.apply, on_dense="error")({"params": adapted}, X)
        return merged, out, model.apply({"params": merged}, X)

    merged, got, want = jax.tree.map(np.asarray, run(delta))
    for name in ("up", "down"):
        base = np.asarray(params["h"][name]["kernel"])
        same(merged["h"][name]["kernel"][1], base[1])
        assert np.all(merged["h"][name]["kernel"][0] != base[0])
    close(got, want)
    one = lj.dora(lj.select("w"), rank=2)
    alone = lj.Delta({"w": {name: np.asarray(leaf)[1] for name, leaf in delta["h/up/kernel"].items()}})
    close(merged_params(one, {"w": kernel[2]}, alone)["w"], merged["h"]["up"]["kernel"][2], 1e-6)


def test_what_trains_and_how_much():
    params = {"w": normal(8, 6), "b": normal(6)}
    method = lj.dora(lj.select("w"), rank=2, dropout=0.5)
    delta = method.init(KEY, params)
    assert dict(lj.labels(delta)["w"]) == {
        "a": "trainable",
        "b": "trainable",
        "m": "trainable",
        "fixed_norm": "frozen",
    }
    adapted = method.apply(params, delta, key=KEY)
    labels = lj.labels(adapted)["w"]
    assert (labels.a, labels.b, labels.m) == ("trainable",) * 3
    assert (labels.base, labels.fixed_norm, labels.scale, labels.strength, labels.key) == ("frozen",) * 5
    assert lj.check(method, params).trained == 8 * 2 + 2 * 6 + 6
    with pytest.raises(ValueError, match="w: Dora cannot be unmerged; keep the base"):
        lj.unmerge(lj.merge(adapted), method, delta)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_low_precision_base_begins_as_it_is_and_merges_with_one_rounding(dtype):
    params = {"w": normal(64, 48).astype(dtype)}
    method = lj.dora(lj.select("w"), rank=2, alpha=3)
    delta = initial(method, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype("float32")}
    run = lj.lift(lambda p, x: x @ p["w"], on_dense="error")
    x = normal(3, 64).astype(dtype)
    same(*jax.jit(lambda p, d: (run(method.apply(p, d), x), x @ p["w"]))(params, delta))
    wide = jax.tree.map(lambda w: np.asarray(w).astype(np.float32), params)
    close(delta["w"]["m"], norms(wide["w"], "io"), 1e-6)

    @jax.jit
    def merged_and_dense(delta):
        return lj.merge(method.apply(params, delta)), densely(wide, delta, scale=1.5)["w"].astype(dtype)

    same(merged_and_dense(delta)[0], params)
    merged, want = merged_and_dense(trained(delta))
    got = merged["w"]
    assert got.dtype == dtype
    assert np.mean(np.asarray(got != want)) < 0.005  # float32 sums in another order move few roundings


def test_the_norm_of_a_low_precision_base_is_in_float32():
    """Under promotion that mixes dtypes, so that the numbers tell: rounded to 8 bits, the gain is off by up to 4e-3."""
    params = {"w": normal(64, 48).astype(jnp.bfloat16)}
    method = lj.dora(lj.select("w"), rank=2, alpha=3)
    delta = trained(initial(method, params))
    with jax.numpy_dtype_promotion("standard"):
        outputs = method.apply(params, delta)["w"].ready().outputs
    v = np.asarray(params["w"]).astype(np.float32) + dense_delta(delta["w"]["a"], delta["w"]["b"], "io", 1.5)
    close(1 + np.asarray(outputs).astype(np.float32), np.asarray(delta["w"]["m"]) / norms(v, "io"), 1e-5)


def test_the_gain_keeps_its_precision_in_a_low_precision_product():
    """Weights cast to bfloat16, sums in float32: the ratio to the base is the float32 gain, not one of 8 bits."""
    params = {"w": normal(64, 48)}
    method = lj.dora(lj.select("w"), rank=2)
    delta = initial(method, params)
    gain = 1 + np.float32(0.3) * np.asarray(normal(48, seed=3))
    delta["w"]["m"] = np.asarray(delta["w"]["m"]) * gain
    x = normal(3, 64).astype(jnp.bfloat16)

    def product(p, x):
        return lax.dot(x, p["w"].astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    lifted = lj.lift(product, on_dense="error")
    out, base = jax.jit(lambda d: (lifted(method.apply(params, d), x), product(params, x)))(delta)
    close(out, np.asarray(base) * gain[None], 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_look_up_and_tied_head_follow(dtype):
    """The gain of a feature scales the head's input."""
    ids = ints([[1, 4, 10], [4, 4, 0]])
    model = Tied()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), started(model, ids))
    method = lj.dora(lj.select("wte/embedding"), rank=2)
    first = initial(method, params)
    delta = trained(first)

    def run(delta):
        return lj.lift(model.apply, on_dense="error")({"params": method.apply(params, delta)}, ids)

    def dense(delta):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return model.apply({"params": densely(wide, delta, scale=1.0)}, ids)

    # op by op: at the tests' level of optimization the bits of a compiled tanh depend on what it is fused with
    same(run(first), model.apply({"params": params}, ids))
    (out, got), (wide_out, want) = both(run, dense, delta)
    close(np.asarray(out).astype(np.float32), wide_out, 1e-5 if dtype == jnp.float32 else 0.02)
    if dtype == jnp.float32:
        close(got, want, 3e-5)


def test_a_sharded_base_gives_the_same():
    """8 devices: the norm sums over a sharded axis; the beginning is the base's product bit for bit there too."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"w": normal(32, 16)}
    method = lj.dora(lj.select("w"), rank=2)
    first = initial(method, params)
    delta, x = trained(first), normal(3, 32)
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    run = jax.jit(lambda p, d: lj.lift(lambda p, x: x @ p["w"], on_dense="error")(method.apply(p, d), x))
    close(run(placed, delta), run(params, delta))
    same(run(placed, first), jax.jit(lambda p: x @ p["w"])(placed))


def test_its_spec_is_json_and_what_cannot_be_is_said():
    params = {"w": normal(8, 6)}
    method = lj.dora(lj.select("w"), rank=2, alpha=3, dropout=0.1, a_init="gaussian", scale_rule="alpha/sqrt(r)")
    again = lj.from_spec(json.loads(json.dumps(method.spec)))
    lora = lj.lora(lj.select("w"), rank=2, a_init="gaussian")
    delta, from_spec, low = jax.jit(lambda: [m.init(KEY, params) for m in (method, again, lora)])()
    same(from_spec, delta)
    same({name: delta["w"][name] for name in "ab"}, dict(low["w"]))  # LoRA's own draws
    with pytest.raises(ValueError, match="w: rank=7"):
        lj.dora(lj.select("w"), rank=7).init(KEY, params)
    with pytest.raises(ValueError, match=r"w: the delta's factors .*'m': \(5,\).* need .*'m': \(6,\)"):
        method.apply(params, lj.Delta({"w": {**delta["w"], "m": np.ones(5, np.float32)}}))
    with pytest.raises(ValueError, match="a_init='pissa'"):
        lj.dora(lj.select("w"), rank=2, a_init="pissa")
