"""Frozen weights in 8 and 4 bits: their values, by loops; what every method makes of them; what is kept in memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.core.selection import flatten
from lora_jax.core.transforms import registry
from lora_jax.methods.bias_delta import bias_delta
from lora_jax.models import gpt2
from lora_jax.quantized import from_gguf
from lora_jax.quantized.kinds import NF4, dynamic_map
from tests.helpers.gpt2 import BOTH, CONFIG, IDS, MASK, PREFIXED, PREFIXED_MASK, SITES, V
from tests.helpers.marks import slow_but
from tests.helpers.methods import LAYOUTS, USES, as_dense
from tests.helpers.networks import Stack, stacked, started
from tests.helpers.reference import close, normal, random_delta, same

KEY = jax.random.key(0)
BITS = pytest.mark.parametrize("bits", [4, 8])


def rows_of(x, axes):
    """A weight's numbers as (stack, rows, numbers): a row for an output unit, of an embedding for a word."""
    rows = "v" if "v" in axes else "o"
    order = [n for part in ("s", rows, "ivko".replace(rows, "")) for n, a in enumerate(axes) if a in part]
    stack = math.prod(n for n, a in zip(x.shape, axes, strict=True) if a == "s")
    outer = math.prod(n for n, a in zip(x.shape, axes, strict=True) if a in rows)
    return np.asarray(x).transpose(order).reshape(stack, outer, -1)


def nearest(levels, x):
    return int(np.argmin(np.abs(levels.astype(np.float64) - np.float64(x))))


def nf4_by_loops(matrix):
    """The values of a matrix in bitsandbytes' nf4 with double quantization, a number at a time."""
    levels, small_levels = np.array(NF4, np.float32), dynamic_map()
    blocks = [[row[n : n + 64] for n in range(0, len(row), 64)] for row in matrix]
    scales = np.array([[np.max(np.abs(block)) for block in row] for row in blocks], np.float32)
    offset = np.mean(scales)
    small, found = (scales - offset).reshape(-1), []
    for first in range(0, len(small), 256):
        group = small[first : first + 256]
        largest = np.max(np.abs(group))
        found += [small_levels[nearest(small_levels, x / (largest or 1))] * largest + offset for x in group]
    stored = np.array(found, np.float32).reshape(scales.shape)
    values = np.empty_like(matrix)
    for r, row in enumerate(blocks):
        for b, block in enumerate(row):
            for n, x in enumerate(block):
                values[r, 64 * b + n] = levels[nearest(levels, x / (scales[r, b] or 1))] * stored[r, b]
    return values


def int8_by_loops(matrix):
    values = np.empty_like(matrix)
    for r, row in enumerate(matrix):
        scale = np.max(np.abs(row)) * np.float32(1 / 127)
        for n, x in enumerate(row):
            values[r, n] = np.float32(np.round(x / (scale or np.float32(1)))) * scale
    return values


@BITS
@pytest.mark.parametrize("axes", slow_but(LAYOUTS, "io", "iio", "vo", "ssio"))
def test_values_are_those_of_the_definition(axes, bits):
    """int8 bit for bit; also where a row is no multiple of a block."""
    x = normal(*LAYOUTS[axes], seed=3)
    if axes == "io":
        x = normal(150, 6, seed=3).at[:64, 2].set(0.0)  # a block of zeros
    w = lj.quantize({"w": x}, lj.select("w", axes=axes), bits=bits)["w"]
    assert (w.shape, w.dtype, w.axes) == (x.shape, x.dtype, axes)
    by_loops = {4: nf4_by_loops, 8: int8_by_loops}[bits]
    want = np.stack([by_loops(matrix) for matrix in rows_of(x, axes)])
    got = rows_of(w.materialize(), axes)
    if bits == 8:
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)  # of nf4 the mean is summed in another order


def test_nf4_scales_are_in_groups_of_256_of_a_matrix():
    """Those of one layer of a stack, in the order of its rows."""
    x = normal(2, 192, 100, seed=4) * normal(1, 1, 100, seed=5)
    w = lj.quantize({"w": x}, lj.select("w", axes="sio"), bits=4)["w"]
    assert w.scale.shape == (2, 100, 3) and w.nested.shape == (2, 2) and w.offset.shape == (2,)
    want = np.stack([nf4_by_loops(matrix) for matrix in rows_of(x, "sio")])
    np.testing.assert_allclose(rows_of(w.materialize(), "sio"), want, rtol=1e-6, atol=1e-6)


def test_nf4_is_that_of_bitsandbytes():
    """Its codes are ours, and its codes have the same values here; scales near the middle of two levels may differ."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    x = np.asarray(normal(256, 300, seed=6) * normal(1, 300, seed=7))
    w = lj.quantize({"w": x}, lj.select("w"), bits=4)["w"]
    packed, state = functional.quantize_4bit(torch.from_numpy(x.T.copy()), blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state).numpy().T
    same(np.asarray(w.codes), packed.numpy().reshape(300, 4, 32))
    packed, state = functional.quantize_4bit(
        torch.from_numpy(x.T.copy()), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    theirs = functional.dequantize_4bit(packed, state).numpy().T
    small = state.absmax.numpy().reshape(300, 4)
    assert np.mean(small != np.asarray(w.scale)) < 0.01
    fields = {"scale": small, "nested": state.state2.absmax.numpy(), "offset": state.offset.numpy()}
    got = w.replace(**{name: jnp.asarray(value) for name, value in fields.items()}).materialize()
    np.testing.assert_allclose(got, theirs, rtol=0, atol=3e-7 * np.max(np.abs(theirs)))


def gguf_bytes(name, rows, numbers, seed=0):
    """Random blocks of a GGUF type, whose scales are finite."""
    rng = np.random.default_rng(seed)
    heads, body = {"Q4_0": (1, 16), "Q4_1": (2, 16), "Q8_0": (1, 32)}[name]
    scales = rng.normal(size=(rows, numbers // 32, heads)).astype(np.float16).view(np.uint8)
    codes = rng.integers(0, 256, (rows, numbers // 32, body), np.uint8)
    return np.concatenate([scales, codes], -1).reshape(rows, -1)


def gguf_by_loops(name, raw):
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[name]
    values = []
    for block in raw.reshape(-1, size):
        d = np.float32(block[:2].copy().view(np.float16)[0])
        if name == "Q8_0":
            values += [d * np.float32(q) for q in block[2:].view(np.int8)]
            continue
        low = [q & 15 for q in block[size - 16 :]] + [q >> 4 for q in block[size - 16 :]]
        m = np.float32(block[2:4].copy().view(np.float16)[0])
        values += [d * np.float32(q) + m if name == "Q4_1" else d * np.float32(int(q) - 8) for q in low]
    return np.array(values, np.float32).reshape(len(raw), -1)


GGUF = pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])


@GGUF
def test_blocks_of_a_gguf_file_have_their_values_bit_for_bit(name):
    raw = gguf_bytes(name, 10, 96)
    w = from_gguf(name, raw, (96, 10), "io")
    same(np.asarray(jax.jit(lambda w: w.materialize())(w)), gguf_by_loops(name, raw).T)
    assert sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(w)) == raw.nbytes
    heads = from_gguf(name, raw, (2, 48, 5, 2), "iioo")
    same(np.asarray(heads.materialize()), gguf_by_loops(name, raw).T.reshape(2, 48, 5, 2))
    words = from_gguf(name, raw, (10, 96), "vo")
    same(np.asarray(words.materialize()), gguf_by_loops(name, raw))
    layers = jax.tree.map(lambda *x: jnp.stack(x), w, w)
    assert layers.axes == "sio" and layers.shape == (2, 96, 10)


@GGUF
def test_blocks_of_a_gguf_file_are_what_gguf_reads(name):
    quants = pytest.importorskip("gguf.quants")
    kind = quants.GGMLQuantizationType[name]
    raw = quants.quantize(np.asarray(normal(7, 64, seed=8)), kind)
    same(np.asarray(from_gguf(name, raw, (64, 7), "io").materialize()), quants.dequantize(raw, kind).T)


@pytest.mark.parametrize(
    ("name", "raw", "shape", "message"),
    [
        ("Q6_K", gguf_bytes("Q4_0", 2, 32), (32, 2), "Q6_K is not kept as it is"),
        ("Q4_1", gguf_bytes("Q4_0", 2, 32), (32, 2), "not whole Q4_1 blocks of 20 bytes"),
        ("Q4_0", gguf_bytes("Q4_0", 2, 32), (64, 2), r"no leaf \(64, 2\)"),
    ],
)
def test_other_blocks_are_refused(name, raw, shape, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(name, raw, shape, "io")


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


def test_bytes_of_the_blocks_of_a_file():
    assert gguf_bytes("Q4_1", 4, 64).nbytes / (4 * 64 * 2) <= 0.35


def test_merging_gives_the_dtype_that_is_asked_for():
    """In float32 the values and the change as they are; in half precision rounded once."""
    params = lj.quantize({"w": normal(64, 6).astype(jnp.bfloat16)}, lj.select("w"), bits=4)
    method = lj.lora(lj.select("w"), rank=2)
    delta = random_delta(method, params, size=1e-3)
    change = np.asarray(delta["w"]["a"]) @ np.asarray(delta["w"]["b"])
    exact = np.asarray(params["w"].astype(jnp.float32)) + change
    adapted = method.apply(params, delta)
    assert lj.merge(adapted)["w"].dtype == lj.merge(params)["w"].dtype == jnp.bfloat16
    close(lj.merge(adapted, jnp.float32)["w"], exact, 1e-6)
    close(lj.merge(params, jnp.float32)["w"], params["w"].astype(jnp.float32), 0)
    got = lj.merge(adapted, jnp.bfloat16)["w"].astype(jnp.float32)
    np.testing.assert_allclose(got, exact, rtol=2**-8)
    tuned = lj.tune(lj.select("w"))
    value = random_delta(tuned, params)
    assert lj.merge(tuned.apply(params, value), jnp.float32)["w"].dtype == jnp.float32


def test_a_table_counts_the_numbers_and_not_the_bytes():
    params = {"w": normal(64, 6), "b": normal(6)}
    method = lj.lora(lj.select("w"), rank=2)
    quantized = lj.quantize(params, lj.select("w"), bits=4)
    assert str(lj.check(method, quantized)) == str(lj.check(method, params))
    assert set(jax.tree.leaves(lj.labels(method.apply(quantized, random_delta(method, params))))) == {
        "trainable",
        "frozen",
    }


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda p: lj.quantize(p, lj.select("w"), bits=3), "bits=3"),
        (lambda p: lj.quantize(p, lj.select("b")), "needs input and output axes"),
        (lambda p: lj.quantize(lj.quantize(p, lj.select("w")), lj.select("w")), "quantized or adapted already"),
        (lambda p: lj.quantize(p, lj.select("w", layers=[0])), "layers"),
        (lambda p: lj.quantize(p, lj.select("none")), "matches no parameter"),
        (
            lambda p: lj.lora(lj.select("w", axes="oi"), rank=1).init(KEY, lj.quantize(p, lj.select("w"))),
            "quantized with axes 'io', but the selection has 'oi'",
        ),
    ],
)
def test_what_cannot_be_quantized_says_so(run, message):
    with pytest.raises(ValueError, match=message):
        run({"w": normal(64, 6), "b": normal(6)})


def test_without_lift_a_quantized_weight_says_what_to_do():
    params = lj.quantize({"w": normal(64, 6)}, lj.select("w"))
    with pytest.raises(TypeError, match=r"w: wrap the function with lora_jax\.lift, or merge"):
        normal(2, 64) @ params["w"]
