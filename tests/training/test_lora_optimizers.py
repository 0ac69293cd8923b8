"""Optimizers made for LoRA, against the papers in numpy and PEFT's LoRA-FA; what a factorization may not change."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax import training
from lora_jax.training.config import OptimizerConfig
from lora_jax.training.lora_optimizers.pairs import pairs_of
from tests.helpers import lora_updates
from tests.helpers.reference import normal, random_delta

NAMES = ("riemannian", "lora_rite", "lora_fa", "lora_muon")
AXES = ("io", "oi", "vo", "sio", "iso", "ioo", "iio", "siio", "ssio", "kkio")
STEPS = 4
RATE, DECAY, CLIP, DAMPING, EPS = 0.05, 0.1, 2.0, 1e-3, 1e-6


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        yield


def made(name: str, **options: Any) -> optax.GradientTransformation:
    return lj.freeze_base(getattr(training, name)(RATE, eps=EPS, **options))


def trained(tx: Any, delta: lj.Delta, gradients: lj.Delta) -> lj.Delta:
    """The delta after steps with these gradients, which have a first axis of steps; one program."""

    def step(carry: Any, grads: Any) -> tuple[Any, None]:
        delta, state = carry
        updates, state = tx.update(grads, state, delta)
        return (optax.apply_updates(delta, updates), state), None

    return jax.jit(lambda delta, gradients: jax.lax.scan(step, (delta, tx.init(delta)), gradients)[0][0])(
        delta, gradients
    )


def first_update(tx: Any, grads: lj.Delta, delta: lj.Delta) -> tuple[lj.Delta, Any]:
    """The first update and the state after it, in one program."""
    return jax.jit(lambda grads, delta: tx.update(grads, tx.init(delta), delta))(grads, delta)


def drawn(like: Any, seed: int, *lead: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.device_put(rng.normal(size=(*lead, *x.shape)).astype(x.dtype)), like)


def matrices(factors: Any, stacked: int) -> tuple[np.ndarray, np.ndarray]:
    """x (stack, m, r) and y (stack, n, r), in float64."""
    a, b = (np.asarray(factors[name], np.float64) for name in "ab")
    count, r = math.prod(a.shape[:stacked]), a.shape[-1]
    return a.reshape(count, -1, r), b.reshape(count, r, -1).swapaxes(1, 2)


# The paper's rule, with its own options and ours besides rate, decay and eps.
PAPERS: dict[str, tuple[Callable, dict[str, Any], dict[str, Any]]] = {
    "riemannian": (lora_updates.scaled_adamw, {"damping": DAMPING}, {"damping": DAMPING}),
    "lora_fa": (lora_updates.scaled_adamw, {"damping": DAMPING, "factors": "y"}, {"damping": DAMPING}),
    "lora_rite": (lora_updates.rite, {"clip": math.inf}, {}),
    "lora_muon": (lora_updates.muon, {}, {}),
}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5)
@given(st.data())
def test_steps_are_those_of_the_paper(name: str, data: st.DataObject) -> None:
    """In float64 up to 1e-6: float32 counts the steps. What is in no pair takes AdamW. Inputs and outputs of twice the
    rank at least, as else gradients have directions of nothing but rounding."""
    axes = data.draw(st.sampled_from([x for x in AXES if name != "lora_fa" or "v" not in x]), "axes")
    rank = data.draw(st.integers(1, 3), "rank")
    shape = [data.draw(st.integers(1, 2) if x == "s" else st.integers(2 * rank, 2 * rank + 2)) for x in axes]
    params = {"w": np.zeros(shape), "bias": np.zeros(3)}
    method = lj.chain(lj.lora(lj.select("w", axes=axes), rank=rank, dtype=jnp.float64), lj.tune(lj.select("bias")))
    reference, theirs, ours = PAPERS[name]
    with jax.enable_x64(True):
        delta = random_delta(method, params, seed=data.draw(st.integers(0, 9)), size=1.0)
        gradients = drawn(delta, 1, STEPS)
        tx = made(name, weight_decay=DECAY, spec=method.spec, **ours)
        got = jax.device_get(trained(tx, delta, gradients))
    stacked = axes.count("s")
    (x, y), (gx, gy) = (
        matrices(delta["w"], stacked),
        matrices({n: g.reshape(-1, *g.shape[1 + stacked :]) for n, g in gradients["w"].items()}, 1),
    )
    gx, gy = (g.reshape(STEPS, len(x), *g.shape[1:]) for g in (gx, gy))
    options = {"rate": RATE, "decay": DECAY, "b1": 0.9, "b2": 0.999, "eps": EPS, **theirs}
    wanted = [reference(x[n], y[n], list(zip(gx[:, n], gy[:, n], strict=True)), **options) for n in range(len(x))]
    for ours_, wanted_ in zip(matrices(got["w"], stacked), map(np.stack, zip(*wanted, strict=True)), strict=True):
        np.testing.assert_allclose(ours_, wanted_, rtol=1e-6, atol=1e-6 * np.abs(wanted_).max())
    with jax.enable_x64(True):
        alone = {key: lj.Delta({"bias": tree["bias"]}) for key, tree in (("p", delta), ("g", gradients))}
        plain = trained(optax.adamw(RATE, eps=EPS, weight_decay=DECAY), alone["p"], alone["g"])
    np.testing.assert_allclose(got["bias"]["value"], plain["bias"]["value"], rtol=1e-7)


def test_lora_rite_clips_what_has_no_magnitude() -> None:
    """All pairs together: two weights as blocks of one norm; the rest by a norm of its own."""
    x, y = (np.asarray(normal(6, 2, seed=n), np.float64) for n in (0, 1))
    gradients = [
        (3 * np.asarray(normal(6, 2, seed=n), np.float64), np.asarray(normal(6, 2, seed=n + 9))) for n in (2, 3)
    ]
    options = {"rate": RATE, "decay": 0.0, "b1": 0.9, "b2": 0.999, "eps": EPS}
    clipped, free = (lora_updates.rite(x, y, gradients, **options, clip=clip) for clip in (CLIP, math.inf))
    assert np.abs(clipped[0] - free[0]).max() > 1e-3
    with jax.enable_x64(True):
        delta = lj.Delta({"w": {"a": jnp.asarray(x), "b": jnp.asarray(y.T)}, "bias": {"value": jnp.zeros(1)}})
        a, b = (np.stack([g[n] for g in gradients]) for n in (0, 1))
        grads = {
            "w": {"a": jnp.asarray(a), "b": jnp.asarray(b.swapaxes(1, 2))},
            "bias": {"value": jnp.full((2, 1), 1e6)},
        }
        got = trained(made("lora_rite", clip_norm=CLIP), delta, lj.Delta(grads))
        two = lj.Delta({"v": delta["w"], "w": delta["w"]})
        both = trained(made("lora_rite", clip_norm=CLIP * 2**0.5), two, lj.Delta({"v": grads["w"], "w": grads["w"]}))
    for of in (got["w"], both["v"], both["w"]):
        np.testing.assert_allclose(of["a"], clipped[0], rtol=1e-6)
        np.testing.assert_allclose(of["b"], clipped[1].T, rtol=1e-6)


@pytest.mark.slow
def test_lora_fa_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers, one with the scale 2, for whose square Adam does not ask; 1e-4 for an eps under the root there."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    lorafa = pytest.importorskip("peft.optimizers.lorafa")
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # else it rounds gradients to bfloat16
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    config = peft.LoraConfig(
        r=2, lora_alpha=2, alpha_pattern={"2": 4}, target_modules=["0", "2"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    theirs = lorafa.create_lorafa_optimizer(model, r=2, lora_alpha=2, lr=RATE)
    layers = {n: model.base_model.model[int(n)] for n in "02"}
    numbers = lambda n, name: jnp.asarray(getattr(layers[n], f"lora_{name}")["default"].weight.detach().numpy().T)  # noqa: E731
    delta = lj.Delta({n: {"a": numbers(n, "A"), "b": numbers(n, "B")} for n in layers})
    gradients = drawn(delta, 3, 5)
    ours = trained(lj.freeze_base(training.lora_fa(RATE, eps=1e-6)), delta, gradients)
    for t in range(5):
        for n, layer in layers.items():
            layer.lora_B["default"].weight.grad = torch.tensor(np.asarray(gradients[n]["b"][t]).T.copy())
        theirs.step()
    for n in layers:
        np.testing.assert_array_equal(ours[n]["a"], delta[n]["a"])
        assert np.abs(ours[n]["b"] - delta[n]["b"]).max() > 0.05
        np.testing.assert_allclose(ours[n]["b"], numbers(n, "B"), rtol=1e-4, atol=1e-5)


# What a factorization may not change


def product(delta: Any) -> np.ndarray:
    return np.asarray(delta["w"]["a"], np.float64) @ np.asarray(delta["w"]["b"], np.float64)


def drifts(tx: Any, steps: int) -> list[float]:
    """How far the change of A B is from that of A R and R^-1 B, over its size, after steps in float32 down the gradient
    of |tanh(A B) - target|^2 / 2; of three draws. R has singular values from 1/2 to 2."""

    def step(carry: Any, target: jax.Array) -> tuple[Any, None]:
        delta, state = carry
        loss = lambda d: jnp.sum((jnp.tanh(d["w"]["a"] @ d["w"]["b"]) - target) ** 2) / 2  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(delta), state, delta)
        return (optax.apply_updates(delta, updates), state), None

    run = jax.jit(lambda delta, targets: jax.lax.scan(step, (delta, tx.init(delta)), targets)[0][0])
    drifts = []
    for rng in map(np.random.default_rng, range(3)):
        a, b, target = rng.normal(size=(12, 3)) / 4, rng.normal(size=(3, 10)) / 4, rng.normal(size=(12, 10))
        u, v = (np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2))
        r = u @ np.diag([0.5, 1.0, 2.0]) @ v
        targets = jnp.broadcast_to(jnp.float32(target), (steps, 12, 10))
        pairs = (a, b), (a @ r, np.linalg.solve(r, b))
        deltas = [lj.Delta({"w": {"a": jnp.float32(x), "b": jnp.float32(y)}}) for x, y in pairs]
        one, other = (product(run(delta, targets)) - product(delta) for delta in deltas)
        drifts.append(float(np.linalg.norm(one - other) / np.linalg.norm(one)))
    return drifts


INVARIANT = {
    "lora_rite": training.lora_rite(0.02, weight_decay=0.1, clip_norm=1.0),
    "lora_muon": training.lora_muon(0.02, weight_decay=0.1),
    "scaled GD": optax.chain(training.scale_by_riemannian(1e-12), optax.sgd(0.02)),
}


@pytest.mark.parametrize("steps", [1, 6])
def test_another_factorization_changes_nothing(steps: int) -> None:
    """1e-5 of the change, with moments, decay and clipping, of which scaled GD has none; Adam drifts by 0.7 beside it.
    Scaled AdamW is not invariant, as Adam's second moment is one of entries."""
    with jax.default_matmul_precision("highest"):
        assert min(drifts(lj.freeze_base(optax.adam(0.02)), steps)) > 0.5
        assert min(drifts(lj.freeze_base(training.riemannian(0.02)), steps)) > 0.01
        for name, tx in INVARIANT.items():
            assert max(of_name := drifts(lj.freeze_base(tx), steps)) < 1e-5, (name, of_name)


def test_muons_step_has_equal_singular_values() -> None:
    """Of both parts of the change of A B, up to what the iteration is off by."""
    delta = lj.Delta({"w": {"a": normal(9, 3), "b": normal(3, 8, seed=1)}})
    updates, _ = first_update(training.scale_by_lora_muon(), drawn(delta, 2), delta)
    for part in ((updates["w"]["a"], delta["w"]["b"]), (delta["w"]["a"], updates["w"]["b"])):
        values = np.linalg.svd(part[0] @ part[1], compute_uv=False)
        np.testing.assert_allclose(values[:3], 0.5, rtol=5e-3)
        assert values[3] < 1e-5


def test_muons_decay_is_that_of_the_product() -> None:
    delta = lj.Delta({"w": {"a": normal(4, 2), "b": normal(2, 5, seed=1)}})
    zeros = jax.tree.map(np.zeros_like, delta)
    updates, _ = first_update(training.lora_muon(0.1, weight_decay=1e-5), zeros, delta)
    # of first order, as 1 - 1e-6 itself would have one digit
    change = np.asarray(updates["w"]["a"] @ delta["w"]["b"] + delta["w"]["a"] @ updates["w"]["b"])
    np.testing.assert_allclose(change, -1e-6 * product(delta), rtol=1e-4)
    mask = lambda tree: jax.tree.map(lambda _: False, tree)  # noqa: E731
    updates, _ = first_update(training.lora_muon(0.1, weight_decay=1e-5, mask=mask), zeros, delta)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


# Pairs


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_a_is_a_pair_with_all_its_bs(name: str) -> None:
    """As one weight of both outputs; also in a bank's second adapter, beside another in its first."""
    a, b, c = normal(6, 2), normal(2, 4, seed=1), normal(2, 5, seed=2)
    shared = {"@shared/h/attn": {"a": a}, "h/attn/query/kernel": {"b": b}, "h/attn/value/kernel": {"b": c}}
    fused = lj.Delta({"w": {"a": a, "b": jnp.concatenate([b, c], 1)}})
    gradients = drawn(lj.Delta(shared), 5, 3)
    joined = jnp.concatenate([gradients["h/attn/query/kernel"]["b"], gradients["h/attn/value/kernel"]["b"]], 2)
    wanted = trained(made(name), fused, lj.Delta({"w": {"a": gradients["@shared/h/attn"]["a"], "b": joined}}))
    banked = {f"@1/{key}": factors for key, factors in shared.items()} | {"@0/w": fused["w"]}
    of_bank = drawn(lj.Delta(banked), 6, 3) | {f"@1/{key}": factors for key, factors in gradients.items()}
    for delta, grads, head in ((shared, gradients, ""), (banked, of_bank, "@1/")):
        got = trained(made(name), lj.Delta(delta), lj.Delta(grads))
        bs = jnp.concatenate([got[f"{head}h/attn/{part}/kernel"]["b"] for part in ("query", "value")], 1)
        np.testing.assert_allclose(got[f"{head}@shared/h/attn"]["a"], wanted["w"]["a"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(bs, wanted["w"]["b"], rtol=1e-5, atol=1e-6)


def test_what_is_a_pair() -> None:
    ones = jnp.ones
    delta = lj.Delta(
        {
            "dora": {"a": ones((4, 2)), "b": ones((2, 3)), "m": ones(3), "fixed_norm": ones(3)},
            "vera": {"b": ones(3), "d": ones(2)},
            "@mlp_out/own": {"a": ones((4, 2)), "b": ones((2, 3))},
            "no product": {"a": ones((4, 2)), "b": ones((3, 3))},
            "head": {"value": ones((4, 2))},
        }
    )
    assert [pair.a for pair in pairs_of(delta)] == ["dora"]
    stacked = lj.Delta({"h/kernel": {"a": ones((2, 3, 2)), "b": ones((2, 2, 5))}})
    with pytest.raises(
        ValueError, match=r"h/kernel: a \(2, 3, 2\) and b \(2, 2, 5\) may be stacked along their first 0 or 1"
    ):
        pairs_of(stacked)
    for axes, count in (("sio", 1), ({"h/*": "iioo", "**": "io"}, 0), ({"x": "io", "**": "sio"}, 1)):
        method = lj.lora(lj.select("**/kernel", axes=axes), rank=2)
        spec = {"method": "chain", "of": [{"method": "tune", "select": ["head"]}, method.spec]}
        assert pairs_of(stacked, spec)[0].stacked == count


def test_wrong_trees_and_missing_params() -> None:
    params = {"kernel": jnp.ones((4, 3))}
    method = lj.lora(lj.select("kernel"), rank=1)
    delta = method.init(jax.random.key(0), params)
    for name in NAMES:
        tx = made(name)
        with pytest.raises(ValueError, match="a Delta, or a tree with one: there are 0 here"):
            tx.init(method.apply(params, delta))
        with pytest.raises(ValueError, match="needs paths with an A and a B"):
            tx.init(lj.Delta({"bias": {"value": jnp.ones(3)}}))
        with pytest.raises(ValueError, match="params"):
            tx.update(delta, tx.init(delta))
    for key, spec in (("wte/embedding", None), ("table", {"select": ["table"], "axes": "vo"})):
        embedding = lj.Delta({key: {"a": jnp.zeros((9, 2)), "b": jnp.ones((2, 3))}})
        with pytest.raises(ValueError, match=f"{key}: lora_fa leaves A .* zero for an embedding"):
            made("lora_fa", spec=spec).init(embedding)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_loop_of_ones_own(name: str) -> None:
    """The base beside the delta, a frozen factor, bfloat16: no state and no update for what is frozen, and dtypes that
    stay; first steps from a B that is zero."""
    params = {"kernel": normal(8, 6), "bias": normal(6, seed=1)}
    method = lj.chain(lj.pissa(lj.select("kernel"), rank=2), lj.tune(lj.select("bias")))
    delta = jax.jit(method.init)(jax.random.key(0), params)
    joint, tx = {"base": params, "delta": delta}, made(name)
    updates, state = first_update(tx, joint, joint)
    alone, of_delta = first_update(tx, delta, delta)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["base"]))
    assert not updates["delta"]["kernel"]["fixed_a"].any() and updates["delta"]["kernel"]["b"].any()
    jax.tree.map(np.testing.assert_array_equal, updates["delta"], alone)
    assert jax.tree.leaves(jax.tree.map(jnp.shape, state)) == jax.tree.leaves(jax.tree.map(jnp.shape, of_delta))

    lora = lj.lora(lj.select("kernel"), rank=2, dtype=jnp.bfloat16)
    half = lora.init(jax.random.key(0), params)
    grads = lj.Delta({"kernel": {"a": jnp.zeros_like(half["kernel"]["a"]), "b": drawn(half, 3)["kernel"]["b"]}})
    state = tx.init(half)
    updates, after = jax.jit(tx.update)(grads, state, half)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, half)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert not updates["kernel"]["a"].any() and bool(jnp.isfinite(updates["kernel"]["b"]).all())


# Configs


def test_names_and_combinations() -> None:
    with pytest.raises(
        ValueError, match=r"optimizer.name is 'lora_right', not one of \['adamw', 'riemannian', 'lora_rite'"
    ):
        OptimizerConfig(name="lora_right")
    for name in ("lora_fa", "lora_muon"):
        with pytest.raises(
            ValueError, match=rf"optimizer.loraplus_lr_ratio=4.0 does not go with optimizer.name={name!r}"
        ):
            OptimizerConfig(name=name, loraplus_lr_ratio=4.0)
    assert OptimizerConfig.of({"learning_rate": 1e-3}).name == "adamw"


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_of_a_config(name: str) -> None:
    """With its clip, its decay of B alone, and LoRA+, where it goes."""
    method = lj.lora(lj.select("w"), rank=2)
    delta = lj.Delta({"w": {"a": normal(6, 2), "b": normal(2, 5, seed=1)}})
    gradients = drawn(delta, 2, 3)
    values = {"name": name, "decay": ("w/b",), "weight_decay": DECAY, "damping": DAMPING, "clip_norm": 0.5, "eps": EPS}
    got = trained(training.optimizer(values, optax.constant_schedule(RATE), spec=method.spec), delta, gradients)
    own = {
        "weight_decay": DECAY,
        "mask": lambda tree: jax.tree.map_with_path(lambda keys, _: keys[-1].key == "b", tree),
    }
    own |= {"damping": DAMPING} if name in ("riemannian", "lora_fa") else {}
    clips = name in ("lora_fa", "lora_rite")
    own |= {"clip_norm": 0.5} if clips else {}
    wanted = getattr(training, name)(RATE, eps=EPS, **own)
    if not clips:
        wanted = optax.chain(optax.clip_by_global_norm(0.5), wanted)
    jax.tree.map(np.testing.assert_array_equal, got, trained(lj.freeze_base(wanted), delta, gradients))
    if name in ("riemannian", "lora_rite"):
        one, plus = (
            training.optimizer(values | {"loraplus_lr_ratio": x}, optax.constant_schedule(RATE), spec=method.spec)
            for x in (1.0, 4.0)
        )
        first = jax.tree.map(lambda x: x[0], gradients)
        one, plus = (first_update(tx, first, delta)[0]["w"] for tx in (one, plus))
        np.testing.assert_allclose(plus["b"], 4 * one["b"], rtol=1e-6)
        np.testing.assert_array_equal(plus["a"], one["a"])
