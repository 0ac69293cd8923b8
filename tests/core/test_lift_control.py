"""lift inside and outside of JAX's transforms and control flow."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lj
from tests.helpers.marks import slow_but
from tests.helpers.reference import agree, close, densely, normal, random_delta

KEY = jax.random.key(0)
X = normal(4, 8, seed=5)
PARAMS = {"w": normal(8, 6, seed=1), "v": normal(6, 8, seed=2)}
STACK = {"w": normal(3, 8, 8, seed=3) / 3}
SIO = {"w": "sio"}


def mlp(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def layer(x, w):
    return jnp.tanh(x @ w)


FUNCTIONS = {
    "plain": mlp,
    "jit": jax.jit(mlp),
    "jit of jit": jax.jit(lambda p, x: jax.jit(mlp)(p, x) + x),
    "checkpoint": jax.checkpoint(mlp),
    "checkpoint with a policy": jax.checkpoint(mlp, policy=jax.checkpoint_policies.dots_saveable),
    "vmap": jax.vmap(mlp, (None, 0)),
    "vmap of vmap": lambda p, x: jax.vmap(jax.vmap(mlp, (None, 0)), (None, 1))(p, x.reshape(2, 2, 8)),
    "vmap out axis": jax.vmap(mlp, (None, 0), 1),
    "gradient of the input": lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(mlp(p, x))))(x),
    "jvp": lambda p, x: jax.jvp(lambda x: mlp(p, x), (x,), (x + 1,)),
    "jacobian of the input": lambda p, x: jax.jacrev(lambda x: mlp(p, x))(x[0]),
    "custom_jvp on activations": lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"],
    "stop_gradient": lambda p, x: jnp.tanh(x @ lax.stop_gradient(p["w"])) @ p["v"],
    "copies": lambda p, x: x @ jnp.array(p["w"]).astype(jnp.float32),
    "weight on the left": lambda p, x: (p["w"].T @ x.T).T,
    "precision": lambda p, x: lax.dot(x, p["w"], precision="highest"),
    "batched product": lambda p, x: jnp.matmul(x[:, None], p["w"][None]),
    "accumulating type": lambda p, x: lax.dot(x, p["w"], preferred_element_type=jnp.float32),
    "cond": lambda p, x: lax.cond(x[0, 0] > 0, mlp, lambda p, x: -x @ p["w"] @ p["v"], p, x),
    "cond closing over": lambda p, x: lax.cond(x[0, 0] < 0, lambda: mlp(p, x), lambda: x + 1.0),
    "switch": lambda p, x: lax.switch(jnp.int32(2), [lambda p: x, lambda p: 2 * mlp(p, x), lambda p: 3 * mlp(p, x)], p),
    "fori": lambda p, x: lax.fori_loop(0, 3, lambda _, x: mlp(p, x), x),
    "scan with constants": lambda p, x: lax.scan(lambda c, _: (mlp(p, c), c), x, None, length=3),
    "scan over inputs": lambda p, x: lax.scan(lambda c, x: (c + 1, mlp(p, x)), jnp.int32(0), x),
    "scan carrying the weights": lambda p, x: lax.scan(
        lambda c, _: ((c[0], mlp(c[0], c[1])), None), (p, x), None, length=2
    )[0][1],
    "map": lambda p, x: lax.map(partial(mlp, p), x),
    "scan in scan": lambda p, x: lax.scan(
        lambda c, _: (lax.scan(lambda c, _: (mlp(p, c), None), c, None, length=2)[0], None),
        x,
        None,
        length=2,
    )[0],
    "cond in scan": lambda p, x: lax.scan(
        lambda c, n: (lax.cond(n > 0, lambda c: mlp(p, c), lambda c: c, c), None), x, jnp.arange(3)
    )[0],
    "checkpoint in scan": lambda p, x: lax.scan(jax.checkpoint(lambda c, _: (mlp(p, c), None)), x, None, length=2)[0],
    "weights used in and after the scan": lambda p, x: mlp(
        p, lax.scan(lambda c, _: (mlp(p, c), None), x, None, length=2)[0]
    ),
}


SLOW = (
    "jit of jit",
    "batched product",
    "accumulating type",
    "cond closing over",
    "fori",
    "weights used in and after the scan",
    "checkpointed scan",
    "fori indexing",
    "vmap over stack and inputs",
    "experts",
    "checkpoint with a policy",
    "vmap of vmap",
    "vmap out axis",
    "jacobian of the input",
    "copies",
    "precision",
    "scan with constants",
    "map",
    "cond in scan",
    "checkpoint in scan",
    "scan of a tree",
    "reversed scan",
    "scan with indices",
    "batched experts",
)


def cases(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.mark.parametrize("name", cases(FUNCTIONS))
def test_inside(name):
    agree(FUNCTIONS[name], PARAMS, X)


STACKED = {
    "scan": lambda p, x: lax.scan(lambda x, w: (layer(x, w), x), x, p["w"]),
    "scan of a tree": lambda p, x: lax.scan(lambda x, q: (layer(x, q["w"]), None), x, p)[0],
    "reversed scan": lambda p, x: lax.scan(lambda x, w: (layer(x, w), None), x, p["w"], reverse=True)[0],
    "unrolled scan": lambda p, x: lax.scan(lambda x, w: (layer(x, w), None), x, p["w"], unroll=2)[0],
    "scan with indices": lambda p, x: lax.scan(
        lambda x, iw: (layer(x, iw[1]) * iw[0], None), x, (jnp.arange(1.0, 4.0), p["w"])
    )[0],
    "scan indexing the stack": lambda p, x: lax.scan(lambda x, i: (layer(x, p["w"][i]), None), x, jnp.arange(3))[0],
    "checkpointed scan": lambda p, x: lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None)), x, p["w"])[0],
    "fori indexing": lambda p, x: lax.fori_loop(
        0, 3, lambda i, x: layer(x, lax.dynamic_index_in_dim(p["w"], i, keepdims=False)), x
    ),
    "python loop": lambda p, x: [x := layer(x, w) for w in p["w"]][-1],
    "vmap over the stack": lambda p, x: jax.vmap(layer, (None, 0))(x, p["w"]),
    "vmap over stack and inputs": lambda p, x: jax.vmap(layer)(x[:3], p["w"]),
    "experts": lambda p, x: jnp.einsum("bi,eio->beo", x, p["w"]),
    "batched experts": lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 3), p["w"]),
    "vmapped index": lambda p, x: jax.vmap(lambda x, i: layer(x, p["w"][i]))(x, jnp.array([0, 2, 2, 1])),
    "gather of the stack": lambda p, x: jnp.einsum("bi,bio->bo", x, p["w"][jnp.array([0, 2, 2, 1])]),
}


@pytest.mark.parametrize("name", cases(STACKED))
def test_stacked(name):
    allowed = "allow" if name == "gather of the stack" else "error"
    agree(STACKED[name], STACK, X, axes=SIO, on_dense=allowed)


def test_a_scan_over_groups_of_layers():
    params = {"w": normal(2, 2, 8, 8) / 3}

    def fn(p, x):
        inner = lambda x, ws: (lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0], None)  # noqa: E731
        return lax.scan(inner, x, p["w"])[0]

    agree(fn, params, X, axes={"w": "ssio"})


def delta_of(params, axes=None):
    method = lj.lora(lj.select("**", axes=axes), rank=2, alpha=3.0)
    return method, random_delta(method, params)


def test_while_loops():
    """Reverse mode does not go through them, so values and a forward derivative."""

    def fn(p, x):
        def body(carry):
            n, p, x = carry
            return n + 1, p, mlp(p, x)

        return lax.while_loop(lambda c: (c[0] < 3) & (jnp.sum(jnp.abs(c[2])) > 0), body, (0, p, x))[2]

    def closing(p, x):
        condition = lambda c: (jnp.sum(jnp.abs(mlp(p, c[1]))) > 1e-6) & (c[0] < 3)  # noqa: E731
        return lax.while_loop(condition, lambda c: (c[0] + 1, 0.2 * mlp(p, c[1])), (0, x))[1]

    method, delta = delta_of(PARAMS)
    for f in (fn, closing):
        run = lambda d, f=f: lj.lift(f, on_dense="error")(method.apply(PARAMS, d), X)  # noqa: E731
        want = lambda d, f=f: f(densely(PARAMS, d, scale=1.5), X)  # noqa: E731
        got, expected = jax.jit(lambda d, run=run, want=want: [jax.jvp(g, (d,), (d,)) for g in (run, want)])(delta)
        close(got[0], expected[0])
        close(got[1], expected[1], 2e-5)


OUTSIDE = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, x),
    "scan": lambda f: lambda p, x: lax.scan(lambda c, x: (c, f(p, x)), 0, x)[1],
    "scan carrying adapted": lambda f: lambda p, x: lax.scan(lambda p, x: (p, f(p, x)), p, x)[1],
    "cond": lambda f: lambda p, x: lax.cond(x[0, 0] > 0, f, lambda p, x: f(p, -x), p, x),
    "fori": lambda f: lambda p, x: lax.fori_loop(0, 2, lambda _, x: f(p, x), x),
    "map": lambda f: lambda p, x: lax.map(lambda x: f(p, x), x),
    "eager": lambda f: f,
}


@pytest.mark.parametrize("name", slow_but(OUTSIDE, *(OUTSIDE.keys() - {"jit", "fori", "map"})))
def test_outside(name):
    method, delta = delta_of(PARAMS)
    outer = OUTSIDE[name]
    got_fn = outer(lj.lift(mlp, on_dense="error"))

    def loss(fn, put):
        return lambda d: (lambda out: (jnp.sum(jnp.sin(out)), out))(fn(put(d), X))

    got = jax.value_and_grad(loss(got_fn, lambda d: method.apply(PARAMS, d)), has_aux=True)
    want = jax.value_and_grad(loss(outer(mlp), lambda d: densely(PARAMS, d, scale=1.5)), has_aux=True)
    if name == "eager":
        close(got(delta), jax.jit(want)(delta), 2e-5)
    else:
        close(*jax.jit(lambda d: (got(d), want(d)))(delta), 2e-5)


def test_scan_over_adapted_stacks_from_outside():
    method, delta = delta_of(STACK, SIO)

    def got(d):
        step = lambda x, q: (lj.lift(lambda q, x: layer(x, q["w"]))(q, x), None)  # noqa: E731
        return jnp.sum(lax.scan(step, X, method.apply(STACK, d))[0])

    def want(d):
        return jnp.sum(lax.scan(lambda x, w: (layer(x, w), None), X, densely(STACK, d, SIO, scale=1.5)["w"])[0])

    close(*jax.jit(lambda d: (jax.value_and_grad(got)(d), jax.value_and_grad(want)(d)))(delta), 2e-5)


def test_hessians_and_forward_over_reverse():
    method, delta = delta_of(PARAMS)
    got = lambda d: jnp.sum(jnp.sin(lj.lift(mlp)(method.apply(PARAMS, d), X)))  # noqa: E731
    want = lambda d: jnp.sum(jnp.sin(mlp(densely(PARAMS, d, scale=1.5), X)))  # noqa: E731
    product = lambda f, d: jax.jvp(jax.grad(f), (d,), (jax.tree.map(jnp.cos, d),))[1]  # noqa: E731
    close(*jax.jit(lambda d: (product(got, d), product(want, d)))(delta), 1e-4)


def test_gradients_inside_a_lifted_function():
    """Meta-learning style: an inner step on the activations' side, by the lifted weights."""

    def fn(p, x):
        inner = lambda shift: jnp.sum(mlp(p, x + shift[None]) ** 2)  # noqa: E731
        shift = -0.01 * jax.grad(inner)(jnp.zeros(8))
        return mlp(p, x + shift[None])

    agree(fn, PARAMS, X, tol=3e-5)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("spec", [("b", None), ("b", "t")])
def test_shard_map(where, spec):
    """Rows over b; columns of w and rows of v over t, summed by hand."""
    batch, tensor = spec
    mesh = jax.make_mesh((2, 4), ("b", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"w": PartitionSpec(None, tensor), "v": PartitionSpec(tensor, None)}
    params = {"w": normal(8, 16, seed=1), "v": normal(16, 8, seed=2)}

    def body(p, x):
        out = jnp.tanh(x @ p["w"]) @ p["v"]
        return lax.psum(out, tensor) if tensor else out

    fn = jax.shard_map(body, mesh=mesh, in_specs=(specs, PartitionSpec(batch)), out_specs=PartitionSpec(batch))
    if where == "inside":
        agree(fn, params, X)
        return
    method, delta = delta_of(params)
    replicated = jax.shard_map(
        lambda p, x: lj.lift(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"])(p, x),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("b")),
        out_specs=PartitionSpec("b"),
    )
    got = jax.jit(lambda d: replicated(method.apply(params, d), X))(delta)
    merged = jax.tree.map(np.asarray, densely(params, delta, scale=1.5))
    close(got, np.tanh(np.asarray(X) @ merged["w"]) @ merged["v"])


def test_shard_map_of_a_scan_over_stacked_weights():
    mesh = jax.make_mesh((8,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(
        lambda p, x: lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])[0],
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("b")),
        out_specs=PartitionSpec("b"),
    )
    agree(fn, STACK, normal(16, 8), axes=SIO)


def test_sharded_arrays_and_sharding_constraints():
    mesh = jax.make_mesh((2, 4), ("b", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))  # noqa: E731
    params = {
        "w": jax.device_put(normal(8, 16, seed=1), place(None, "t")),
        "v": jax.device_put(normal(16, 8, seed=2), place("t", None)),
    }

    def fn(p, x):
        w = lax.with_sharding_constraint(p["w"], place(None, "t"))
        x = lax.with_sharding_constraint(x, place("b", None))
        return jnp.tanh(x @ w) @ p["v"]

    agree(fn, params, jax.device_put(X, place("b", None)))


def test_explicit_shardings():
    mesh = jax.make_mesh((2, 4), ("b", "t"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(normal(8, 16), NamedSharding(mesh, PartitionSpec(None, "t")))}
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("b", None)))
        method = lj.lora(lj.select("w"), rank=2, alpha=3.0)
        delta = random_delta(method, {"w": np.zeros((8, 16), np.float32)})
        got = jax.jit(lambda d, x: lj.lift(lambda p, x: x @ p["w"])(method.apply(params, d), x))(delta, x)
    want = np.asarray(X) @ np.asarray(densely({"w": normal(8, 16)}, delta, scale=1.5)["w"])
    close(np.asarray(got), want)


def test_stop_gradient_of_a_weight_stops_that_of_its_factors():
    method = lj.lora(lj.select("*"), rank=2)
    delta = random_delta(method, PARAMS)
    fn = lj.lift(FUNCTIONS["stop_gradient"], on_dense="error")
    grads = jax.jit(jax.grad(lambda d: jnp.sum(fn(method.apply(PARAMS, d), X))))(delta)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["w"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["v"]))


def test_a_scan_runs_as_it_did():
    """Backwards, where it did: the layers in the other order, and so the outputs of the steps."""

    def fn(p, x):
        return lax.scan(lambda x, w: (layer(x, w), x[0]), x, p["w"], reverse=True)

    method = lj.lora(lj.select("w", axes=SIO), rank=2)
    delta = random_delta(method, STACK)
    merged = densely(STACK, delta, SIO, scale=1.0)
    lifted = lj.lift(fn, on_dense="error")
    close(*jax.jit(lambda d, merged: (lifted(method.apply(STACK, d), X), fn(merged, X)))(delta, merged))


@pytest.mark.parametrize("factory", [lj.lora, lj.dora, lj.pissa, lj.vera, lj.lokr])
def test_a_scan_keeps_no_copy_of_a_frozen_weight(factory):
    """The backward pass reads the stacked weights themselves: no output of the forward scan has their shape."""
    method = factory(lj.select("w", axes=SIO), rank=2)
    lifted = lj.lift(lambda p, x: lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])[0].sum(), on_dense="error")
    delta = random_delta(method, STACK)
    jaxpr = jax.make_jaxpr(jax.grad(lambda d: lifted(method.apply(STACK, d), X)))(delta)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(scans) >= 2
    assert STACK["w"].shape not in [out.aval.shape for eqn in scans for out in eqn.outvars]


def test_remat_and_constraints_stay_what_they_are():
    """In the jaxpr: the policy, prevent_cse, and the sharding that a weight is held to."""
    policy, mesh = (
        jax.checkpoint_policies.dots_saveable,
        jax.make_mesh((8,), ("t",), axis_types=(jax.sharding.AxisType.Auto,)),
    )
    held = NamedSharding(mesh, PartitionSpec(None, "t"))

    def fn(p, x):
        return jax.checkpoint(mlp, policy=policy, prevent_cse=False)(
            p | {"v": lax.with_sharding_constraint(p["v"], held)}, x
        )

    method = lj.lora(lj.select("*"), rank=2)
    delta = random_delta(method, PARAMS)
    jaxpr = jax.make_jaxpr(lambda d: lj.lift(fn, on_dense="error")(method.apply(PARAMS, d), X))(delta).jaxpr
    eqn_params = {eqn.primitive.name: eqn.params for eqn in jaxpr.eqns}
    (remat,) = (params for name, params in eqn_params.items() if name in ("checkpoint", "remat2", "remat"))
    assert remat["policy"] is policy and remat["prevent_cse"] is False
    assert eqn_params["sharding_constraint"]["sharding"] == held


def test_the_sharding_of_an_explicit_product_is_that_of_its_result():
    """Where it is said: over axes in another order than the product's, and on another part of the mesh."""
    mesh = jax.make_mesh((2, 4), ("b", "t"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))  # noqa: E731
        params = {"w": jax.device_put(normal(8, 16), place(None, None))}
        x = jax.device_put(normal(2, 3, 8), place("b", None, None))
        method = lj.lora(lj.select("w"), rank=2)
        delta = random_delta(method, {"w": np.zeros((8, 16), np.float32)})

        def fn(p, x):
            return jnp.einsum("io,abi->oab", p["w"], x, out_sharding=place("t", "b", None))

        got = jax.jit(lambda d, p, x: lj.lift(fn)(method.apply(p, d), x))(delta, params, x)
        assert got.sharding.spec == PartitionSpec("t", "b", None)
    want = np.asarray(normal(2, 3, 8)) @ np.asarray(densely({"w": normal(8, 16)}, delta, scale=1.0)["w"])
    close(np.asarray(got), np.moveaxis(want, -1, 0))
