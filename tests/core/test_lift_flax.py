"""lift on Flax models: towers as loops and scans, attention, embeddings, convolutions, nnx."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from tests.helpers.networks import Stack, Tied, stacked, started
from tests.helpers.reference import agree, close, ints, leaves, normal, random_delta

X = normal(3, 5, 8, seed=5)


def axes_of(params, axes):
    """The same axes for every kernel."""
    return {path: axes for path in leaves(params) if path.endswith("kernel")}


@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        (False, False),
        (True, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_towers(scan, remat):
    model = Stack(scan=scan, remat=remat)
    params = started(model, X)
    axes = axes_of(params, "sio" if scan else "io")
    agree(lambda p, x: model.apply({"params": p}, x), params, X, globs="**/kernel", axes=axes)


def test_scan_over_another_axis_of_the_parameters():
    model = Stack(scan=True, axis=1)
    params = started(model, X)
    assert params["h"]["up"]["kernel"].shape == (8, 3, 16)
    axes = axes_of(params, "iso")
    agree(lambda p, x: model.apply({"params": p}, x), params, X, globs="**/kernel", axes=axes)


@pytest.mark.parametrize("scan", [False, True])
def test_some_layers_only(scan):
    model = Stack(scan=scan, remat=True)
    loop = started(Stack(), X)
    params = stacked(loop, 3) if scan else loop
    axes = axes_of(params, "sio" if scan else "io")
    method = lj.lora(lj.select("**/up/kernel", axes=axes, layers=[0, 2]), rank=2)
    delta = random_delta(method, params)

    @jax.jit
    def run(delta):
        adapted = method.apply(params, delta)
        merged = lj.merge(adapted)
        return (
            merged,
            lj.lift(model.apply, on_dense="error")({"params": adapted}, X),
            model.apply({"params": merged}, X),
        )

    merged, out, want = jax.tree.map(np.asarray, run(delta))
    close(out, want)
    untouched = merged["h"]["up"]["kernel"][1] if scan else merged["h_1"]["up"]["kernel"]
    assert np.array_equal(untouched, loop["h_1"]["up"]["kernel"])
    touched = merged["h"]["up"]["kernel"][2] if scan else merged["h_2"]["up"]["kernel"]
    assert not np.allclose(touched, loop["h_2"]["up"]["kernel"], atol=1e-3)


def test_bfloat16_compute_on_float32_parameters():
    model, exact = Stack(dtype=jnp.bfloat16), Stack()
    x = X.astype(jnp.bfloat16)
    params = started(model, x)
    assert params["h_0"]["up"]["kernel"].dtype == jnp.float32
    method = lj.lora(lj.select("**/kernel"), rank=2)
    delta = random_delta(method, params, size=0.1)

    def run(model, x, delta):
        out = lj.lift(model.apply, on_dense="error")({"params": method.apply(params, delta)}, x)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    @jax.jit
    def both(delta):
        return [
            jax.value_and_grad(lambda d, model=model, x=x: run(model, x, d), has_aux=True)(delta)
            for model, x in ((model, x), (exact, X))
        ]

    ((_, out), grads), ((_, want), exact_grads) = both(delta)
    assert out.dtype == jnp.bfloat16
    close(np.asarray(out).astype(np.float32), want, 3e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    close(grads, exact_grads, 3e-2)
    dots = [str(v.aval.dtype) for v in _dot_inputs(lambda d: run(model, x, d)[1], delta)]
    assert set(dots) == {"bfloat16"}, dots  # no product runs in float32


def _dot_inputs(fn, *args):
    from lora_jax.planning.flops import equations

    for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        if eqn.primitive.name == "dot_general":
            yield from eqn.invars


def test_attention_with_three_axis_kernels():
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    params = started(model, X)
    axes = {f"{name}/kernel": "ioo" for name in ("query", "key", "value")} | {"out/kernel": "iio"}
    mask = nn.make_causal_mask(jnp.ones((3, 5)))
    agree(lambda p, x: model.apply({"params": p}, x, mask=mask), params, X, globs="**/kernel", axes=axes)


def test_dense_general_and_einsum():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 4), name="split")(x)
            x = nn.DenseGeneral(6, axis=(-2, -1), name="join")(x)
            x = nn.Einsum((6, 3), "bli,io->blo", name="einsum")(x)
            return x

    params = started(Net(), X)
    axes = {"split/kernel": "ioo", "join/kernel": "iio"}
    agree(lambda p, x: Net().apply({"params": p}, x), params, X, globs="**/kernel", axes=axes)


@pytest.mark.parametrize("globs", ["**", "wte/*", pytest.param("mix/*", marks=pytest.mark.slow)])
def test_embedding_looked_up_and_tied_as_the_head(globs):
    ids = ints([[1, 5, 10], [0, 0, 7]])
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), started(Tied(), ids))
    globs = globs.replace("**", "{wte/*,mix/kernel}").replace("mix/*", "mix/kernel")
    agree(lambda p, ids: Tied().apply({"params": p}, ids), params, ids, globs=globs)


def test_embedding_of_ids_beyond_the_vocabulary_is_as_before():
    """nn.Embed fills with NaN; plain indexing clamps; negative ids count from the end."""
    params = {"embedding": normal(7, 4)}
    ids = ints([0, 6, 7, 100, -1])
    method = lj.lora(lj.select("**"), rank=2)
    adapted = method.apply(params, random_delta(method, params))
    look_ups = (
        lambda p, ids: p["embedding"][ids],
        lambda p, ids: jnp.take(p["embedding"], ids, axis=0),
        lambda p, ids: jnp.take(p["embedding"], ids, axis=0, mode="clip"),
        lambda p, ids: p["embedding"].at[ids].get(mode="fill", fill_value=0.0),
    )

    @jax.jit
    def run(adapted):
        merged = lj.merge(adapted)
        return [(lj.lift(fn, on_dense="error")(adapted, ids), fn(merged, ids)) for fn in look_ups]

    for got, want in run(adapted):
        assert np.array_equal(np.isnan(got), np.isnan(want))
        close(np.nan_to_num(got), np.nan_to_num(want))


@pytest.mark.parametrize(
    "conv, shape, axes",
    [
        pytest.param(nn.Conv(5, (3,)), (2, 7, 4), "kio", marks=pytest.mark.slow),
        (nn.Conv(5, (3,), strides=2, padding="VALID"), (2, 7, 4), "kio"),
        (nn.Conv(5, (3,), padding="CAUSAL", kernel_dilation=2), (2, 7, 4), "kio"),
        pytest.param(nn.Conv(5, (3, 2)), (2, 5, 6, 4), "kkio", marks=pytest.mark.slow),
        (nn.Conv(5, (3, 2), strides=(2, 1), padding=((1, 1), (0, 2)), input_dilation=(1, 2)), (2, 5, 6, 4), "kkio"),
        (nn.Conv(5, (1, 1), use_bias=False), (2, 5, 6, 4), "kkio"),
    ],
)
def test_convolutions(conv, shape, axes):
    x = normal(*shape)
    params = started(conv, x)
    agree(lambda p, x: conv.apply({"params": p}, x), params, x, globs="kernel", axes={"kernel": axes})


@pytest.mark.parametrize("groups, features", [(2, 6), (4, 4), pytest.param(4, 8, marks=pytest.mark.slow)])
def test_grouped_convolutions_are_exact_or_a_clear_error(groups, features):
    conv = nn.Conv(features, (3,), feature_group_count=groups)
    x = normal(2, 7, 4)
    params = started(conv, x)
    try:
        agree(
            lambda p, x: conv.apply({"params": p}, x),
            params,
            x,
            globs="kernel",
            axes={"kernel": "kio"},
            on_dense="allow",
        )
    except (ValueError, NotImplementedError) as error:
        assert "kernel" in str(error) and "group" in str(error)


def test_transposed_convolution():
    conv = nn.ConvTranspose(5, (3,), strides=(2,))
    x = normal(2, 7, 4)
    agree(
        lambda p, x: conv.apply({"params": p}, x),
        started(conv, x),
        x,
        globs="kernel",
        axes={"kernel": "kio"},
    )


def test_nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 6, rngs=rngs)
            self.norm = nnx.LayerNorm(6, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.down = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.down(self.drop(self.norm(nnx.gelu(self.up(x))), deterministic=True))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    agree(lambda s, x: nnx.merge(graph, s)(x), state, X, globs="**/kernel")


def test_nnx_attention():
    net = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False)
    graph, state = nnx.split(net)
    axes = {f"{name}/kernel": "ioo" for name in ("query", "key", "value")} | {"out/kernel": "iio"}
    agree(lambda s, x: nnx.merge(graph, s)(x), state, X, globs="**/kernel", axes=axes)


def test_mutable_collections_and_dropout_rngs_pass_through():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(6)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dropout(0.5, deterministic=not train)(x)

    variables = jax.jit(Net().init, static_argnums=2)(jax.random.key(0), X, False)
    method = lj.lora(lj.select("**/kernel"), rank=2)
    adapted = method.apply(variables["params"], random_delta(method, variables["params"]))

    @jax.jit
    def run(adapted):
        def outputs(apply, params):
            variables_ = {**variables, "params": params}
            return apply(variables_, X, True, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"])

        return outputs(lj.lift(Net().apply), adapted), outputs(Net().apply, lj.merge(adapted))

    close(*run(adapted))
