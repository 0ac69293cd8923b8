"""Parameter counts: the check report, by hand and against the paper's formulas."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from tests.helpers.reference import normal

KEY = jax.random.key(0)


def gpt2_shapes(layers, width, vocab=50257, positions=1024, dtype=jnp.float32):
    """The shapes of GPT-2, written out by hand."""
    s = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    dense = lambda i, o: {"kernel": s(i, o), "bias": s(o)}  # noqa: E731
    norm = lambda: {"scale": s(width), "bias": s(width)}  # noqa: E731
    block = lambda: {  # noqa: E731
        "ln_1": norm(),
        "attn": {name: dense(width, width) for name in ("query", "key", "value", "out")},
        "ln_2": norm(),
        "mlp": {"up": dense(width, 4 * width), "down": dense(4 * width, width)},
    }
    blocks = {f"h_{n}": block() for n in range(layers)}
    embeddings = {"wte": {"embedding": s(vocab, width)}, "wpe": {"embedding": s(positions, width)}}
    return {**blocks, **embeddings, "ln_f": norm()}


QV = "**/attn/{query,value}/kernel"


@pytest.mark.parametrize(
    "layers, width, positions, rank, trained, total",
    [
        (24, 1024, 1024, 4, 393_216, 354_823_168),  # GPT-2 medium: "0.35M" (tables 3, 13, 14)
        pytest.param(36, 1280, 1024, 4, 737_280, 774_030_080, marks=pytest.mark.slow),  # GPT-2 large: "0.77M"
        (12, 768, 1024, 8, 294_912, 124_439_808),
        (96, 12288, 2048, 1, 4_718_592, 174_604_259_328),  # GPT-3: "4.7M" (table 4)
        pytest.param(96, 12288, 2048, 4, 18_874_368, 174_604_259_328, marks=pytest.mark.slow),  # "18M" (tables 5, 6)
        pytest.param(96, 12288, 2048, 8, 37_748_736, 174_604_259_328, marks=pytest.mark.slow),  # "37.7M"
    ],
)
def test_lora_on_query_and_value_counts_as_the_paper_says(layers, width, positions, rank, trained, total):
    params = gpt2_shapes(layers, width, positions=positions, dtype=jnp.bfloat16)
    report = lj.check(lj.lora(lj.select(QV), rank=rank), params)
    assert report.trained == trained == 2 * (2 * layers) * width * rank
    assert report.total == total
    assert len(report.rows) == 2 * layers


@pytest.mark.parametrize(
    "globs, rank, kinds",
    [  # table 5: one budget of 18M over different weights
        ("**/attn/query/kernel", 8, 1),
        ("**/attn/{query,key}/kernel", 4, 2),
        pytest.param("**/attn/out/kernel", 8, 1, marks=pytest.mark.slow),
        pytest.param("**/attn/{query,key,value,out}/kernel", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_table_five_has_one_budget(globs, rank, kinds):
    report = lj.check(lj.lora(lj.select(globs), rank=rank), gpt2_shapes(96, 12288, positions=2048))
    assert report.trained == 18_874_368 and len(report.rows) == 96 * kinds


def test_full_fine_tuning_and_bitfit():
    params = gpt2_shapes(24, 1024)
    assert lj.check(lj.tune(lj.select("**")), params).trained == 354_823_168
    top2 = lj.tune(lj.select("h_*/**", layers=(22, 23)))
    assert lj.check(top2, params).trained == 25_192_448  # FT-Top2: "25.19M"
    biases = lj.check(lj.tune(lj.select("**/bias")), params).trained
    assert biases == 24 * 11 * 1024 + 1024  # 4 + 4 + 1 in the products, 2 in the norms; the last norm


def test_scanned_and_looped_layouts_count_alike():
    loop = gpt2_shapes(4, 16, vocab=50, positions=8)
    one = loop["h_0"]
    rest = {name: loop[name] for name in ("wte", "wpe", "ln_f")}
    scanned = {**rest, "h": jax.tree.map(lambda s: jax.ShapeDtypeStruct((4, *s.shape), s.dtype), one)}
    axes = {"**/kernel": "sio"}
    looped = lj.check(lj.lora(lj.select(QV), rank=2), loop)
    stacked = lj.check(lj.lora(lj.select(QV, axes=axes), rank=2), scanned)
    assert looped.trained == stacked.trained == 2 * 4 * 2 * (16 + 16)
    assert looped.total == stacked.total
    some = lj.check(lj.lora(lj.select(QV, axes=axes, layers=(1, 3)), rank=2), scanned)
    assert some.trained == looped.trained // 2


def test_the_table():
    params = {"up": {"kernel": normal(100, 70), "bias": normal(70)}, "ids": jnp.zeros(5, jnp.int32)}
    method = lj.chain(lj.lora(lj.select("**/kernel"), rank=2), lj.tune(lj.select("**/bias")))
    report = lj.check(method, params)
    assert report.trained == 340 + 70
    text = str(report)
    for part in ("up/kernel", "(100, 70)", "io", "lora", "340", "up/bias", "tune", "70", "410"):
        assert part in text, (part, text)
    row = next(line for line in text.splitlines() if line.startswith("up/kernel"))
    assert all(part in row for part in ("(100, 70)", "io", "lora", "340", "%"))
    rows = {row.path: row for row in report.rows}
    assert (rows["up/kernel"].trained, rows["up/bias"].trained) == (340, 70)
    assert tuple(rows["up/bias"].shape) == (70,)


def test_check_touches_no_weight():
    deleted = normal(4, 4)
    deleted.delete()
    assert lj.check(lj.lora(lj.select("w"), rank=1), {"w": deleted}).trained == 8


@pytest.mark.parametrize(
    "method, message",
    [
        (lj.lora(lj.select("**/kernal"), rank=1), "kernel"),
        (lj.lora(lj.select("**/kernel"), rank=9), "rank"),
        (lj.lora(lj.select("conv"), rank=1), "conv"),
        (lj.lora(lj.select("**/bias"), rank=1), "bias"),
    ],
)
def test_check_raises_on_what_cannot_work(method, message):
    params = {"up": {"kernel": normal(4, 8), "bias": normal(8)}, "conv": normal(3, 4, 5)}
    with pytest.raises(ValueError, match=message):
        lj.check(method, params)


def test_fixed_factors_are_shown_and_not_counted():
    report = lj.check(lj.pissa(lj.select("w"), rank=2), {"w": normal(8, 6)})
    assert report.trained == report.rows[0].trained == 2 * (8 + 6)
    assert "fixed_a (8, 2)" in str(report)
