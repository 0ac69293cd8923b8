"""Frozen weights in 8 and 4 bits: their values, by loops; what merging makes of them, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.quantized import from_gguf
from lora_jax.quantized.kinds import NF4, dynamic_map
from tests.helpers.marks import slow_but
from tests.helpers.methods import LAYOUTS
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
    small, restored = (scales - offset).reshape(-1), []
    for first in range(0, len(small), 256):
        group = small[first : first + 256]
        largest = np.max(np.abs(group))
        restored += [small_levels[nearest(small_levels, x / (largest or 1))] * largest + offset for x in group]
    stored = np.array(restored, np.float32).reshape(scales.shape)
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


def test_a_part_of_an_nf4_weight_is_refused():
    """Inside a shard_map: of int8 each part has its scales."""
    mesh, spec = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P(None, "d")
    w, x = normal(128, 256), normal(3, 128)

    def run(p):
        return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec, check_vma=False)(
            p["w"], x
        )

    params = lj.quantize({"w": w}, lj.select("w"), bits=8)
    close(jax.jit(lj.lift(run, on_dense="error"))(params), run(lj.merge(params)))
    with pytest.raises(ValueError, match="a part of an nf4 weight"):
        lj.lift(run)(lj.quantize({"w": w}, lj.select("w"), bits=4))


def test_without_lift_a_quantized_weight_says_what_to_do():
    params = lj.quantize({"w": normal(64, 6)}, lj.select("w"))
    with pytest.raises(TypeError, match=r"w: wrap the function with lora_jax\.lift, or merge"):
        normal(2, 64) @ params["w"]
