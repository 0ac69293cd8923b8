"""PiSSA: the principal part trains, the change begins as exactly nothing (against PEFT: test_dora_pissa_peft)."""

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
from tests.helpers.marks import slow_but
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
    replaced,
    same,
)

KEY = jax.random.key(0)
X = normal(3, 8, seed=5)


def densely(params, delta, axes=None, *, scale):
    """params with W + scale * (A B - A0 B0)."""
    flat = leaves(params)

    def whole(path, f):
        letters = axes_at(path, axes)
        change = dense_delta(f["a"], f["b"], letters, scale)
        return flat[path] + change - dense_delta(f["fixed_a"], f["fixed_b"], letters, scale)

    return replaced(params, {path: whole(path, factors) for path, factors in delta.items()})


def trained(delta, size=0.3):
    """The delta after some training: A and B moved, A0 and B0 as they were."""
    steps = filled(delta, size=size)

    def moved(path, f, name):
        return jax.device_put(np.asarray(f[name]) + np.asarray(steps[path][name]))

    return lj.Delta({path: f | {name: moved(path, f, name) for name in ("a", "b")} for path, f in delta.items()})


def initial(method, params):
    return jax.jit(method.init)(KEY, params)


def matrices(w, axes):
    """Every `(in, out)` matrix of a weight, in numpy's float64."""
    order = [j for kind in "sio" for j, letter in enumerate(axes) if CLASS[letter] == kind]
    size = {kind: [n for n, x in zip(w.shape, axes, strict=True) if CLASS[x] == kind] for kind in "sio"}
    return np.asarray(w, np.float64).transpose(order).reshape(-1, int(np.prod(size["i"])), int(np.prod(size["o"])))


def test_every_layout_begins_with_the_largest_singular_triples_and_as_the_base_bit_for_bit():
    params = {axes: normal(*shape) for axes, shape in LAYOUTS.items()}
    axes = {name: name for name in LAYOUTS}
    method = lj.pissa(lj.select("*", axes=axes), rank=2, alpha=3)
    delta = jax.jit(method.init)(KEY, params)
    for name, f in delta.items():
        same(f["a"], f["fixed_a"])
        same(f["b"], f["fixed_b"])
        part = matrices(dense_delta(f["a"], f["b"], name, 1.5), name)
        u, values, v = np.linalg.svd(matrices(params[name], name), full_matrices=False)
        want = np.einsum("sir,sr,sro->sio", u[..., :2], values[:, :2], v[:, :2])
        np.testing.assert_allclose(part, want, rtol=0, atol=2e-6 * np.abs(want).max())
        a, b = np.asarray(f["a"]).reshape(len(u), -1, 2), np.asarray(f["b"]).reshape(len(u), 2, -1)
        root = np.sqrt(values[:, :2] / 1.5)  # shared evenly between A and B
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), root, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(b, axis=2), root, rtol=1e-5)
        assert np.all(np.max(a, 1) == np.max(np.abs(a), 1))  # the sign of every triple

    def merged_and_dense(delta):
        return lj.merge(method.apply(params, delta)), densely(params, delta, axes, scale=1.5)

    same(jax.jit(merged_and_dense)(delta)[0], params)
    merged, want = jax.jit(merged_and_dense)(trained(delta))
    for name in LAYOUTS:
        close(merged[name], want[name], 2e-6)


def test_the_sign_does_not_depend_on_what_the_decomposition_chose():
    params = {"w": normal(8, 6)}
    method = lj.pissa(lj.select("w"), rank=2)
    one, turned = (initial(method, {"w": sign * np.asarray(params["w"])})["w"] for sign in (1, -1))
    close(turned, one | {name: -np.asarray(one[name]) for name in ("b", "fixed_b")})


CASES = USES | {
    "slice of both": (lambda p, x: x[:, :5] @ p["w"][3:, 2:7], (8, 12), "io"),
}


@pytest.mark.parametrize("name", CASES)
def test_products_and_gradients_are_those_of_the_dense_formula(name):
    fn, shape, axes = CASES[name]
    params = {"w": normal(*shape)}
    method = lj.pissa(lj.select("w", axes=axes), rank=2, alpha=3)
    first = jax.jit(method.init)(KEY, params)
    delta = trained(first)
    lifted = lj.lift(fn, on_dense="error")

    def got(delta):
        return lifted(method.apply(params, delta), X)

    def want(delta):
        fixed = {name: lax.stop_gradient(delta["w"][name]) for name in ("fixed_a", "fixed_b")}
        return fn(densely(params, {"w": delta["w"] | fixed}, {"w": axes}, scale=1.5), X)

    (out, grads), (dense, dense_grads) = both(got, want, delta)
    close(out, dense)
    close(grads, dense_grads, 3e-5)
    same(*jax.jit(lambda params, delta: (lifted(method.apply(params, delta), X), fn(params, X)))(params, first))


@pytest.mark.parametrize("name", slow_but(CASES, "product", "rows"))
def test_the_beginning_is_the_base_bit_for_bit_op_by_op(name):
    fn, shape, axes = CASES[name]
    params = {"w": normal(*shape)}
    method = lj.pissa(lj.select("w", axes=axes), rank=2, alpha=3)
    same(lj.lift(fn, on_dense="error")(method.apply(params, initial(method, params)), X), fn(params, X))


def test_look_up_and_tied_head_follow():
    ids = ints([[1, 4, 10], [4, 4, 0]])
    model = Tied()
    params = started(model, ids)
    method = lj.pissa(lj.select("wte/embedding"), rank=2)
    delta = trained(jax.jit(method.init)(KEY, params))
    run = lj.lift(model.apply, on_dense="error")

    @jax.jit
    def lifted_and_dense(d):
        return run({"params": method.apply(params, d)}, ids), model.apply(
            {"params": densely(params, d, scale=1.0)}, ids
        )

    close(*lifted_and_dense(delta))


def test_it_is_a_lora_of_twice_the_rank_and_can_be_undone():
    """(a | fixed_a, b | -fixed_b) with twice the alpha, as PEFT converts it."""
    params = {"w": normal(8, 6)}
    method = lj.pissa(lj.select("w"), rank=2, alpha=3)
    delta = trained(initial(method, params))
    merged = merged_params(method, params, delta)
    f = jax.tree.map(np.asarray, dict(delta["w"]))
    joined = {"a": np.concatenate([f["a"], f["fixed_a"]], 1), "b": np.concatenate([f["b"], -f["fixed_b"]], 0)}
    twice = lj.lora(lj.select("w"), rank=4, alpha=6)
    close(lj.merge(twice.apply(params, lj.Delta({"w": joined}))), merged, 2e-6)
    close(lj.unmerge(merged, method, delta), params, 1e-6)
    half = merged_params(method, params, delta, strength=0.5)["w"]
    close(half, np.float32(0.5) * (np.asarray(params["w"]) + np.asarray(merged["w"])), 1e-6)
    same(merged_params(method, params, delta, strength=0.0), params)


def test_a_low_precision_product_sees_small_steps():
    """The change after a small step, within a few roundings of its own size: a difference of x A B and x A0 B0, each of
    the size of x W, would err by more than itself."""
    params = {"w": normal(64, 48).astype(jnp.bfloat16)}
    method = lj.pissa(lj.select("w"), rank=4)
    first = initial(method, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype("float32")}
    delta, x = trained(first, size=1e-4), normal(3, 64).astype(jnp.bfloat16)
    f = {name: np.asarray(leaf, np.float64) for name, leaf in delta["w"].items()}
    exact = np.asarray(x, np.float64) @ (f["a"] @ f["b"] - f["fixed_a"] @ f["fixed_b"])

    def product(p, x):
        return x @ p["w"]

    run = jax.jit(lj.lift(product, on_dense="error"))
    same(run(method.apply(params, first), x), jax.jit(product)(params, x))
    zero = {"w": np.zeros_like(params["w"])}  # so that the sum with x W rounds nothing
    got = np.asarray(run(method.apply(zero, delta), x), np.float64)
    assert np.max(np.abs(got - exact)) < 0.02 * np.max(np.abs(exact))


def test_layers_of_a_stack_leave_the_others():
    model, params = Stack(layers=3, scan=True), stacked(started(Stack(layers=3), X), 3)
    kernels = {path: "sio" for path in leaves(params) if "kernel" in path}
    method = lj.pissa(lj.select("**/kernel", axes=kernels, layers=[0, 2]), rank=2)
    first = jax.jit(method.init)(KEY, params)
    assert first["h/up/kernel"]["a"].shape == (2, 8, 2) and first["h/up/kernel"]["fixed_b"].shape == (2, 2, 16)
    one = initial(lj.pissa(lj.select("w"), rank=2), {"w": np.asarray(params["h"]["up"]["kernel"])[2]})["w"]
    close({name: np.asarray(leaf)[1] for name, leaf in first["h/up/kernel"].items()}, one)

    @jax.jit
    def run(delta):
        adapted = method.apply(params, delta)
        merged = lj.merge(adapted)
        out = lj.lift(model.apply, on_dense="error")({"params": adapted}, X)
        return merged, out, model.apply({"params": merged}, X)

    merged, got, want = jax.tree.map(np.asarray, run(trained(first)))
    for name in ("up", "down"):
        base = np.asarray(params["h"][name]["kernel"])
        same(merged["h"][name]["kernel"][1], base[1])
        assert np.any(merged["h"][name]["kernel"][0] != base[0])
    close(got, want)


def test_what_trains_and_how_much():
    params = {"w": normal(8, 6), "b": normal(6)}
    method = lj.pissa(lj.select("w"), rank=2)
    delta = initial(method, params)
    labels = {"a": "trainable", "b": "trainable", "fixed_a": "frozen", "fixed_b": "frozen"}
    assert dict(lj.labels(delta)["w"]) == labels
    labelled = lj.labels(method.apply(params, delta))["w"]
    assert {name: getattr(labelled, name) for name in labels} == labels and labelled.base == labelled.scale == "frozen"
    assert lj.check(method, params).trained == 8 * 2 + 2 * 6
    tx = lj.freeze_base(optax.adamw(0.1, weight_decay=0.1))
    run = lj.lift(lambda p: X @ p["w"], on_dense="error")

    @jax.jit
    def step(delta):
        grads = jax.grad(lambda d: jnp.sum(run(method.apply(params, d)) ** 2))(delta)
        return optax.apply_updates(delta, tx.update(grads, tx.init(delta), delta)[0])

    after = step(delta)
    same({name: after["w"][name] for name in labels if "fixed" in name}, {n: delta["w"][n] for n in labels if "f" in n})
    assert all(np.all(np.asarray(after["w"][name]) != np.asarray(delta["w"][name])) for name in "ab")


def test_init_works_on_shapes_in_vmap_and_on_a_mesh():
    params = {"w": normal(32, 16)}
    method = lj.pissa(lj.select("w"), rank=2)
    delta = initial(method, params)
    shapes = jax.eval_shape(method.init, KEY, jax.eval_shape(lambda: params))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), delta
    )
    many = jax.jit(lambda keys, params: jax.vmap(method.init, (0, None))(keys, params))(
        jax.random.split(KEY, 2), params
    )
    close(jax.tree.map(lambda leaf: np.asarray(leaf)[1], many), delta)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    close(jax.jit(method.init)(KEY, placed), delta)
    run = jax.jit(lambda p, d: lj.lift(lambda p, x: x @ p["w"], on_dense="error")(method.apply(p, d), normal(3, 32)))
    close(run(placed, trained(delta)), run(params, trained(delta)))


def test_its_spec_is_json_and_what_cannot_be_is_said():
    params = {"w": normal(8, 6)}
    method = lj.pissa(lj.select("w"), rank=2, alpha=3, scale_rule="alpha/sqrt(r)")
    again = lj.from_spec(json.loads(json.dumps(method.spec)))
    delta = initial(method, params)
    same(initial(again, params), delta)
    same(again.apply(params, trained(delta)), method.apply(params, trained(delta)))
    for alpha in (0, -1.5):
        with pytest.raises(ValueError, match="w: PiSSA divides singular values by scale"):
            lj.pissa(lj.select("w"), rank=2, alpha=alpha).init(KEY, params)
    with pytest.raises(ValueError, match="w: rank=7"):
        lj.pissa(lj.select("w"), rank=7).init(KEY, params)
    with pytest.raises(ValueError, match=r"w: the delta's factors are .* need .*fixed_a"):
        method.apply(params, lj.lora(lj.select("w"), rank=2).init(KEY, params))
