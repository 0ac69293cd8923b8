"""Every method, and every use of a weight, on a quantized base; what of it a compiled step keeps in memory."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.core.selection import flatten
from lora_jax.core.transforms import registry
from lora_jax.methods.bias_delta import bias_delta
from lora_jax.models import gpt2
from tests.helpers.gpt2 import BOTH, CONFIG, IDS, MASK, PREFIXED, PREFIXED_MASK, SITES, V
from tests.helpers.marks import slow_but
from tests.helpers.methods import USES, as_dense
from tests.helpers.networks import Stack, stacked, started
from tests.helpers.reference import close, normal, random_delta

KEY = jax.random.key(0)

# every registered method, on the leaves that it is for
KERNELS = lj.select("**/kernel", axes=gpt2.AXES)
WTE = lj.select("wte/embedding")
METHODS = {
    "lora": lj.lora(KERNELS, rank=2, alpha=3),
    "dora": lj.dora(KERNELS, rank=2, alpha=3),
    "pissa": lj.pissa(KERNELS, rank=2, alpha=3),
    "vera": lj.vera(KERNELS, rank=5),
    "lokr": lj.lokr(KERNELS, rank=1, alpha=3, decompose_both=True),
    "ia3": lj.ia3(KERNELS, feedforward="**/down/*"),
    "tune": lj.tune(lj.select("**/query/kernel", "**/bias")),
    "bias_delta": bias_delta(lj.select("**/bias"), scale=2.0),
    "token_rows": lj.token_rows(WTE, indices=(3, 12)),
    "chain": lj.chain(lj.lora(lj.select("**/up/kernel"), rank=2), lj.tune(lj.select("**/bias"))),
    "adapter": lj.adapter({name: (n, shape[-1]) for name, (n, shape, _) in BOTH.items()}, rank=3),
    "compacter": lj.compacter({name: (n, shape[-1]) for name, (n, shape, _) in BOTH.items()}, rank=2, n=2),
    "prefix_embedding": lj.prefix_embedding(WTE, prefix=2, infix=1),
    "prefix_layer": lj.prefix_layer(
        {"block_out": (SITES["block_out"][0], SITES["block_out"][1][-1])}, vocabulary=V, prefix=2, infix=1
    ),
    "bank": lj.bank([lj.lora(KERNELS, rank=2), lj.lora(lj.select("**/up/kernel"), rank=1)]),
}


@functools.cache
def gpt2_pieces(bits, **options):
    """The model, its params with every matrix in so many bits, the embeddings too, and the same dense."""
    model = gpt2.GPT2(gpt2.GPT2Config(**{**CONFIG.__dict__, **options}))
    params = started(model, IDS)
    chosen = lj.select("**/kernel", "wte/embedding", axes=gpt2.AXES)
    params = lj.quantize(params, chosen, bits=bits)
    return model, params, jax.jit(lj.merge)(params)


def test_every_method_is_tried():
    assert set(METHODS) == {name for name, method in registry._METHODS.items() if name not in ("rows", "shift")} - {
        name for name in registry._METHODS if name not in lj.__all__ and name != "bias_delta"
    }


@pytest.mark.parametrize("name", slow_but(METHODS, "lora", "ia3", "prefix_embedding"))
def test_a_method_on_a_quantized_base_is_that_on_its_values(name):
    """Outputs, and gradients of what trains; an embedding that is looked up and the head is quantized too."""
    method = METHODS[name]
    model, params, dense = gpt2_pieces(4)
    ids, mask = (PREFIXED, PREFIXED_MASK) if "prefix" in name else (IDS, MASK)
    delta = random_delta(method, dense, size=0.1)
    assert jax.tree.map(jnp.shape, jax.eval_shape(method.init, KEY, params)) == jax.tree.map(jnp.shape, delta)

    def run(params, delta):
        def loss(delta):
            out = lj.lift(model.apply, on_dense="error")({"params": method.apply(params, delta)}, ids, mask)
            out = jnp.where(mask[..., None], out, 0.0)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, has_aux=True)(delta)

    grads, out = jax.jit(run)(params, delta)
    want_grads, want = jax.jit(run)(dense, delta)
    close(out, want)
    close(lj.partition(grads)[0], lj.partition(want_grads)[0], 2e-5)


@pytest.mark.parametrize(
    "name", slow_but(["lora", "dora", "pissa", "vera", "lokr", "ia3", "tune", "chain", "token_rows"], "dora", "tune")
)
def test_first_values_and_merged_weights_are_those_on_its_values(name):
    method = METHODS[name]
    _, params, dense = gpt2_pieces(8)
    first = jax.jit(method.init)
    close(first(KEY, params), first(KEY, dense), 1e-6)
    delta = random_delta(method, dense, size=0.1)
    merged = jax.jit(lambda p, d: lj.merge(method.apply(p, d)))
    close(merged(params, delta), merged(dense, delta), 1e-6)


@pytest.mark.parametrize("bits", slow_but([4, 8], 4))
@pytest.mark.parametrize("use", slow_but(USES, "product", "scan, remat", "rows"))
def test_each_use_of_a_weight(use, bits):
    """Alone, and under LoRA."""
    fn, shape, axes = USES[use]
    params = lj.quantize({"w": normal(*shape)}, lj.select("w", axes=axes), bits=bits)
    method = lj.lora(lj.select("w", axes=axes), rank=2)
    as_dense(fn, params, method, lambda p, d: lj.merge(method.apply(lj.merge(p), d)), normal(3, 8, seed=1))
    lifted = lj.lift(fn, on_dense="error")
    close(lifted(params, normal(3, 8, seed=1)), fn(lj.merge(params), normal(3, 8, seed=1)))


STRUCTURES = {
    "transposed": (lambda w, x: x @ w.T.T, "io"),
    "a stack by index": (lambda w, x: x @ w[1], "sio"),
    "a stack by ids": (lambda w, x: jnp.einsum("bi,bio->bo", x, w[jnp.array([2, 0, 2])]), "sio"),
    "batched": (lambda w, x: jnp.einsum("bi,sio->sbo", x, w), "sio"),
    "inputs joined": (lambda w, x: x @ w.reshape(8, 6), "iio"),
    "inputs split": (lambda w, x: jnp.einsum("bhd,hdo->bo", x.reshape(3, 2, 4), w.reshape(2, 4, 6)), "io"),
    "outputs in another order": (lambda w, x: jnp.einsum("bi,ipq->bqp", x, w), "ioo"),
    "from the left": (lambda w, x: (w.T @ x.T).T, "io"),
    "outputs contracted": (lambda w, x: x @ w.T, "oi"),
    "in half precision": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), "io"),
    "a loop": (lambda w, x: lax.fori_loop(0, 3, lambda n, x: jnp.tanh(x @ w), x), "io"),
    "a branch": (lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x @ -w, w), "io"),
}
SHAPES = {"io": (8, 6), "sio": (3, 8, 6), "iio": (2, 4, 6), "ioo": (8, 3, 2), "oi": (6, 8)}


@pytest.mark.parametrize("name", slow_but(STRUCTURES, "outputs in another order", "a loop", "in half precision"))
def test_operations_on_the_axes_of_a_quantized_weight(name):
    fn, axes = STRUCTURES[name]
    w = normal(*(SHAPES[axes] if name != "a loop" else (8, 8)))
    params = lj.quantize({"w": w}, lj.select("w", axes=axes), bits=8)
    x, dense = normal(3, 8, seed=2), lj.merge(params)
    on_dense = "allow" if name == "a branch" else "error"  # -w has no rule
    lifted = lj.lift(lambda p, x: fn(p["w"], x), on_dense=on_dense)
    got = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(lifted(params, x)).astype(jnp.float32))))(x)
    want = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(fn(dense["w"], x)).astype(jnp.float32)))(x)
    close(got, want, 1e-2 if name == "in half precision" else 1e-5)


def test_what_cuts_a_quantized_weight_is_reported_and_right():
    params = lj.quantize({"w": normal(8, 6)}, lj.select("w"), bits=8)
    fn = lambda p, x: x @ p["w"][:, :3]  # noqa: E731
    with pytest.warns(lj.DenseWeight, match="'slice'|made dense"):
        got = lj.lift(fn)(params, normal(3, 8))
    close(got, fn(lj.merge(params), normal(3, 8)))


@pytest.mark.parametrize(
    ("scan", "remat"),
    [(True, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(True, False), (False, True)])],
)
def test_scanned_and_rematerialized_layers(scan, remat):
    loop = started(Stack(layers=3), normal(4, 8, seed=5))
    axes = "sio" if scan else "io"
    params = lj.quantize(stacked(loop, 3) if scan else loop, lj.select("**/kernel", axes={"**/kernel": axes}), bits=4)
    dense, model = lj.merge(params), Stack(layers=3, scan=scan, remat=remat)
    method = lj.dora(lj.select("**/kernel", axes=axes), rank=2)
    delta, x = random_delta(method, dense), normal(4, 8, seed=6)

    def run(params, delta):
        return jnp.sum(lj.lift(model.apply, on_dense="error")({"params": method.apply(params, delta)}, x) ** 2)

    step = jax.jit(jax.value_and_grad(run, 1))
    close(step(params, delta), step(dense, delta), 2e-5)


def test_deltas_that_are_vmapped_share_one_quantized_base():
    params = lj.quantize({"w": normal(128, 6)}, lj.select("w"), bits=4)
    method = lj.lora(lj.select("w"), rank=2)
    deltas = [random_delta(method, params, seed) for seed in range(3)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *deltas)
    x = normal(5, 128)

    def loss(params, delta):
        return jnp.sum(jnp.sin(lj.lift(lambda p, x: x @ p["w"])(method.apply(params, delta), x)))

    got = jax.jit(jax.vmap(jax.value_and_grad(loss, 1), (None, 0)))(params, together)
    want = [jax.value_and_grad(loss, 1)(lj.merge(params), delta) for delta in deltas]
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), 2e-5)


def step_memory(layers, bits, *, scan=False, remat=False, width=512):
    """(argument bytes of the base's kernels, temporary bytes) of a compiled step of LoRA on a tower of blocks."""
    model = Stack(layers=layers, width=width, scan=scan, remat=remat)
    x = jax.ShapeDtypeStruct((2, width), jnp.float32)
    params = jax.eval_shape(model.init, KEY, x)["params"]
    kernels = lj.select("**/kernel", axes="sio" if scan else "io")
    method = lj.lora(kernels, rank=2)
    params = lj.quantize(params, kernels, bits=bits)
    delta = jax.eval_shape(method.init, KEY, params)

    def step(delta, params, x):
        return jax.grad(lambda d: jnp.sum(lj.lift(model.apply)({"params": method.apply(params, d)}, x) ** 2))(delta)

    analysis = jax.jit(step).lower(delta, params, x).compile().memory_analysis()
    biases = [leaf for path, leaf in flatten(params)[0] if path.endswith("bias")]
    rest = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((delta, x, biases)))
    return analysis.argument_size_in_bytes - rest, analysis.temp_size_in_bytes


@pytest.mark.parametrize(
    ("scan", "remat"),
    [(False, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(True, True), (True, False)])],
)
def test_no_dense_copy_of_a_weight_outlives_its_product(scan, remat):
    """Four more layers have eight more weights of 2 MiB; what their step keeps more are small arrays."""
    one_weight = 512 * 1024 * 4
    _, few = step_memory(2, 4, scan=scan, remat=remat)
    _, more = step_memory(6, 4, scan=scan, remat=remat)
    assert more - few < one_weight / 4
    assert few < 3 * one_weight


@pytest.mark.parametrize(("bits", "most"), [(4, 0.30), (8, 0.55)])
def test_bytes_of_the_frozen_base_in_a_compiled_step(bits, most):
    """Over those of bfloat16."""
    assert step_memory(1, bits)[0] <= most * (2 * 512 * 1024 * 2)
