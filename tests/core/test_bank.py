"""A bank of adapters: each row of a batch as if it were alone with its adapter."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.generation import generate
from lora_jax.methods.bank import pack, take
from lora_jax.models import gpt2
from lora_jax.planning import flops
from tests.helpers.gpt2 import CONFIG, IDS, MASK, D
from tests.helpers.networks import started
from tests.helpers.reference import ints


def lora(glob: str, rank: int, **options: Any) -> lj.ParamTransform:
    return lj.lora(lj.select(glob, axes=gpt2.AXES), rank=rank, **options)


# of other ranks, scales, targets and kinds; the embedding is the head too
METHODS = [
    lora("**/attn/{query,value}/kernel", 2, alpha=8),
    lora("**/{attn,mlp}/*/kernel", 1),
    lj.pissa(lj.select("**/attn/query/kernel", axes=gpt2.AXES), rank=3),
    lora("wte/embedding", 2, scale_rule="alpha/sqrt(r)", alpha=3),
]
BANK = lj.bank(METHODS)
MODEL = gpt2.GPT2(CONFIG)
PARAMS = jax.tree.map(lambda x: np.float32(0.3 if x.ndim > 1 else 5) * np.asarray(x), started(MODEL, IDS))
LIFTED = lj.lift(MODEL.apply)
FORWARD = jax.jit(LIFTED)


def trained(bank: lj.ParamTransform, params: Any) -> lj.Delta:
    """A delta whose factors differ from their first values."""
    rng = np.random.default_rng(1)
    first = jax.jit(bank.init)(jax.random.key(3), params)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape), x.dtype), first)


DELTA = trained(BANK, PARAMS)


@jax.jit
def mixed(strength: Any) -> jax.Array:
    """The logits of a batch with a strength for each row."""
    return LIFTED({"params": BANK.apply(PARAMS, DELTA, strength=strength)}, IDS, MASK)


def alone(k: int) -> Any:
    """The base with adapter k, or for -1 itself."""
    return PARAMS if k < 0 else METHODS[k].apply(PARAMS, take(DELTA, k))


@functools.cache
def logits_alone(k: int) -> np.ndarray:
    return np.asarray(FORWARD({"params": alone(k)}, IDS, MASK))


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Within the tolerance of the largest entry: the same products, with zeros between their terms."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(np.abs(other).max(), 1e-6))


def forms(ids: Any) -> tuple[Any, Any]:
    """Which row has which adapter: by gathered factors, and by a gate."""
    return np.int32(ids), np.float32(np.array(ids)[:, None] == np.arange(4))


@given(st.lists(st.integers(-1, 3), min_size=2, max_size=2))
def test_each_row_is_as_with_its_adapter_alone(ids: list[int]) -> None:
    for strength in forms(ids):
        got = np.asarray(mixed(strength))
        for row, k in enumerate(ids):
            close(got[row], logits_alone(k)[row])


def test_scanned() -> None:
    model = gpt2.GPT2(gpt2.GPT2Config(**{**vars(CONFIG), "scan_layers": True, "remat": True}))
    params = gpt2.to_scanned(PARAMS)
    methods = [
        lj.lora(lj.select("h/attn/{query,value}/kernel", axes=gpt2.AXES), rank=rank, alpha=alpha)
        for rank, alpha in ((2, 8), (1, 1))
    ]
    bank = lj.bank(methods)
    delta = trained(bank, params)
    forward = jax.jit(lj.lift(model.apply))
    for strength in (jnp.arange(2), jnp.eye(2)):
        got = forward({"params": bank.apply(params, delta, strength=strength)}, IDS, MASK)
        for k, method in enumerate(methods):
            close(got[k], forward({"params": method.apply(params, take(delta, k))}, IDS, MASK)[k])


def test_strengths_mix_and_are_traced() -> None:
    """Adapters with weights are their exact sum; nothing compiles anew for other rows or weights."""
    weights = np.float32([[0.5, 0.25, 0.0, 0.0], [0.0, 0.0, -1.0, 2.0]])
    got = np.asarray(mixed(weights))
    for row in range(2):
        terms = [(METHODS[k], take(DELTA, k)) for k in range(4) if weights[row, k]]
        method, delta = lj.arithmetic.add(terms, [float(w) for w in weights[row] if w])
        close(got[row], FORWARD({"params": method.apply(PARAMS, delta)}, IDS, MASK)[row])
    for strength in forms((-1, 2)) + forms((2, 0)):
        mixed(strength)
    assert mixed._cache_size() == 2  # one for ids, one for weights


def loss(adapted: Any, row: Any) -> Any:
    logits = LIFTED({"params": adapted}, IDS, MASK)
    return (optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(IDS)) * jnp.float32(MASK))[row].sum()


@functools.cache
def gradients_alone() -> dict[int, Any]:
    """Of row 0 with adapter 2 and row 1 with adapter 0, each by itself."""

    def gradient(k: int, row: int) -> Any:
        return jax.jit(jax.grad(lambda d: loss(METHODS[k].apply(PARAMS, d), row)))(take(DELTA, k))

    return {k: gradient(k, row) for row, k in enumerate((2, 0))}


@pytest.mark.parametrize("form", [0, 1], ids=["gathered", "gate"])
def test_each_row_trains_its_own_adapter(form: int) -> None:
    """The gradients of a mixed batch are those of each row alone, and of what no row has they are zero.

    Within 3e-5 of the largest entry: computed in float64 they agree within 2e-14, 80 roundings; in float32 within 2e-5
    (160 roundings), of which the gradients of one adapter alone are off by 1.7e-5, those of the bank by 9e-6.
    """
    strength = forms((2, 0))[form]
    got = jax.jit(jax.grad(lambda d: loss(BANK.apply(PARAMS, d, strength=strength), slice(None))))(DELTA)
    for k, gradient in gradients_alone().items():
        close(take(got, k), gradient, 3e-5)
    for k in (1, 3):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(take(got, k)))


def test_ids_are_those_of_the_bank_where_the_first_adapter_leaves_a_weight_alone() -> None:
    """The weight's own adapters are the bank's second and third; the first, and none, give the base's product."""
    params = {"u": jnp.eye(3), "w": jnp.eye(3)}
    bank = lj.bank([lj.lora(lj.select(glob), rank=1) for glob in ("u", "w", "w")])
    changes = {f"@{k}/w": {"a": jnp.eye(3)[:, k : k + 1], "b": jnp.full((1, 3), 10.0 * k)} for k in (1, 2)}
    delta = lj.Delta(changes | {"@0/u": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 3))}})
    product = lj.lift(lambda p: jnp.ones((4, 3)) @ p["w"])
    got = jax.jit(lambda ids: product(bank.apply(params, delta, strength=ids)))(ints([0, 1, 2, -1]))
    np.testing.assert_array_equal(got, np.array([[1.0], [11.0], [21.0], [1.0]]) * np.ones(3))


IDS_OF_A_BANK = st.lists(st.integers(-5, 6), min_size=3, max_size=3)
KINDS = st.sampled_from([np.int32, np.int64, np.int8, np.uint8, np.uint32, jnp.int32, list])


@given(IDS_OF_A_BANK, KINDS)
def test_ids_that_are_none_of_the_bank_are_an_error(ids: list[int], kind: Any) -> None:
    """Whatever holds them, where they can be seen; also 2^32 + 1, of which 32 bits are 1."""
    params = {"w": jnp.eye(3)}
    bank = lj.bank([lj.lora(lj.select("w"), rank=1)] * 2)
    delta = jax.eval_shape(bank.init, jax.random.key(0), params)
    if kind not in (list, jnp.int32):
        info = np.iinfo(kind)
        ids = [n for n in ids if info.min <= n <= info.max] + ([2**32 + 1] if kind is np.int64 and 6 in ids else [])
    strength = ids if kind is list else kind(ids) if kind is not jnp.int32 else jnp.asarray(ids, kind)
    if not ids:
        return
    wrong = next((row for row, k in enumerate(ids) if not -1 <= k < 2), None)
    apply = functools.partial(jax.eval_shape, lambda delta: bank.apply(params, delta, strength=strength))
    if wrong is None:
        apply(delta)
    else:
        with pytest.raises(ValueError, match=f"row {wrong} has the adapter {ids[wrong]}, but the bank has 2, from 0"):
            apply(delta)


@functools.cache
def two_layers() -> tuple[Any, Any, Any]:
    """Params, bank and delta: the first adapter has u alone, the second u and w."""
    params = {"u": jnp.eye(3), "w": jnp.eye(3)}
    bank = lj.bank([lj.lora(lj.select("u"), rank=1), lj.lora(lj.select("*"), rank=1)])
    return params, bank, jax.tree.map(jnp.ones_like, bank.init(jax.random.key(0), params))


@jax.jit
def two_layers_of(ids: Any, delta: Any) -> jax.Array:
    params, bank, _ = two_layers()
    adapted = bank.apply(params, delta, strength=ids)
    return lj.lift(lambda p: jnp.ones((3, 3)) @ p["u"] @ p["w"])(adapted)


ROW_BY_ROW = jax.jit(jax.vmap(lambda k, delta: two_layers_of(jnp.broadcast_to(k, 3), delta)[0], (0, None)))
GRADIENT = jax.jit(jax.grad(lambda delta, ids: two_layers_of(ids, delta).sum()))


@given(IDS_OF_A_BANK, st.sampled_from([np.int32, np.uint8]))
def test_rows_of_traced_ids_that_are_none_of_the_bank_are_nan(ids: list[int], kind: Any) -> None:
    """Under jit, and under vmap; the other rows are as ever. So is the gradient, which then is NaN as well."""
    strength = np.array(ids).astype(kind)
    got = np.asarray(two_layers_of(strength, two_layers()[2]))
    is_id = (strength.astype(int) >= -1) & (strength.astype(int) < 2)
    assert np.array_equal(np.isnan(got).all(1), ~is_id) and np.isfinite(got[is_id]).all()
    seen = {-1: 1.0, 0: 4.0, 1: 4.0 + 12.0}
    np.testing.assert_array_equal(
        got[is_id], np.array([[seen[k]] * 3 for k in strength[is_id].tolist()]).reshape(-1, 3)
    )
    np.testing.assert_array_equal(ROW_BY_ROW(strength, two_layers()[2]), got)
    gradient = jax.tree.leaves(GRADIENT(two_layers()[2], strength))
    assert all(np.isfinite(leaf).all() for leaf in gradient) == is_id.all()


def test_gradients_of_many_rows_are_summed_in_float32() -> None:
    """In bfloat16 a sum of ones stops at 256, where the next number is 258."""
    params, rows = {"w": jnp.zeros((2, 2), jnp.bfloat16)}, 1000
    x = jnp.ones((rows, 2), jnp.bfloat16)
    bank = lj.bank([lj.lora(lj.select("w"), rank=1)] * 2)
    delta = lj.Delta({f"@{k}/w": {"a": jnp.ones((2, 1), x.dtype), "b": jnp.ones((1, 2), x.dtype)} for k in (0, 1)})
    ids = jnp.ones(rows, jnp.int32)

    def loss(delta: lj.Delta) -> jax.Array:
        return lj.lift(lambda p: x @ p["w"])(bank.apply(params, delta, strength=ids)).astype(jnp.float32).sum()

    grads = jax.jit(jax.grad(loss))(delta)
    for leaf in jax.tree.leaves(take(grads, 1)):  # 2,000 is no number of bfloat16: rounded once
        np.testing.assert_array_equal(leaf, jnp.full_like(leaf, 2 * rows))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(take(grads, 0)))


@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_generation(beams: int) -> None:
    ids = ints([1, -1])
    adapted = BANK.apply(PARAMS, DELTA, strength=ids)
    how: dict[str, Any] = {"max_new_tokens": 6, "eos": 0, "num_beams": beams}
    got = generate(MODEL, adapted, IDS, MASK, **how)
    for row, k in enumerate(ids.tolist()):
        want = generate(MODEL, alone(k), IDS[row : row + 1], MASK[row : row + 1], **how)
        np.testing.assert_array_equal(got[row], want[0])


def test_all_adapters_cost_one_thin_product() -> None:
    """FLOPs: the base's, and those of one LoRA of all ranks together, whatever the rows ask for; of rows that say which
    they have, of the largest rank."""
    params = {"w": jnp.zeros((40, 30))}
    bank = lj.bank([lj.lora(lj.select("w"), rank=r) for r in (1, 2, 4)])
    delta = bank.init(jax.random.key(0), params)
    apply = lj.lift(lambda p, x: x @ p["w"])
    for strength, rank in ((jnp.ones((5, 3)), 7), (jnp.arange(5), 4)):
        cost = flops.count(
            lambda d, s, x: apply(bank.apply(params, d, strength=s), x), delta, strength, jnp.ones((5, 40))
        )
        assert cost == 2 * 5 * (40 * 30 + rank * (40 + 30))


def test_it_is_a_method() -> None:
    """From its spec; packed and taken apart; the sum of all without a strength, which merges."""
    again = lj.from_spec(json.loads(json.dumps(BANK.spec)))
    one, other = (jax.jit(method.init)(jax.random.key(0), PARAMS) for method in (BANK, again))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    parts = [take(DELTA, k) for k in range(4)]
    jax.tree.map(np.testing.assert_array_equal, pack(parts), DELTA)
    assert lj.check(BANK, PARAMS).trained == sum(lj.check(method, PARAMS).trained for method in METHODS)

    @jax.jit
    def merged(parts: list[lj.Delta], chosen: Any) -> Any:
        method, delta = lj.arithmetic.add(list(zip(METHODS, parts, strict=True)), [1.0] * 4)
        all_of_them = lj.merge(BANK.apply(PARAMS, DELTA)), lj.merge(method.apply(PARAMS, delta))
        return all_of_them, (lj.merge(BANK.apply(PARAMS, DELTA, strength=chosen)), lj.merge(alone(1)))

    for got, want in merged(parts, forms((1,))[1]):
        close(got, want)
    start = BANK.apply(PARAMS, one)
    np.testing.assert_array_equal(FORWARD({"params": start}, IDS, MASK), logits_alone(-1))


def test_what_cannot_be_is_said() -> None:
    two = jnp.eye(4)[:2]
    with pytest.raises(ValueError, match="2 rows have adapters of their own, which no one weight has"):
        lj.merge(BANK.apply(PARAMS, DELTA, strength=two))
    with pytest.raises(ValueError, match="a batch of 1 rows, but a strength of 2 rows"):
        lj.lift(MODEL.apply)({"params": BANK.apply(PARAMS, DELTA, strength=two)}, IDS[:1])
    with pytest.raises(ValueError, match="a batch of 1 rows, but ids of 2 rows"):
        lj.lift(MODEL.apply)({"params": BANK.apply(PARAMS, DELTA, strength=jnp.arange(2))}, IDS[:1])
    with pytest.raises(ValueError, match="rows have adapters of their own, which no one weight has"):
        lj.merge(BANK.apply(PARAMS, DELTA, strength=jnp.arange(2)))
    with pytest.raises(ValueError, match=r"strength \(2, 3\): a number, \(rows, 4\)"):
        BANK.apply(PARAMS, DELTA, strength=two[:, :3])
    ia3 = lj.ia3(lj.select("**/attn/key/kernel", axes=gpt2.AXES))
    taps = lj.adapter({"mlp_out": (2, D)}, rank=1)
    dora = lj.dora(lj.select("**/attn/key/kernel", axes=gpt2.AXES), rank=1)
    no_low_rank = "no change of low rank"
    for method, message in ((ia3, no_low_rank), (dora, no_low_rank), (taps, "adapter changes activations")):
        bank = lj.bank([method])
        with pytest.raises(ValueError, match=message):
            bank.apply(PARAMS, bank.init(jax.random.key(0), PARAMS))
    drops = lj.bank([lora("**/attn/query/kernel", 1, dropout=rate) for rate in (0.0, 0.5)])
    with pytest.raises(ValueError, match="one dropout"):
        drops.apply(PARAMS, drops.init(jax.random.key(0), PARAMS))
    with pytest.raises(ValueError, match="a bank of no adapters"):
        lj.bank([])
