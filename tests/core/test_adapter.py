"""Adapters: what always holds, identity, precision, counts, generation, Kronecker sums."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods.adapter import Bottleneck
from lora_jax.models import encoder, gpt2
from lora_jax.planning.flops import equations
from tests.helpers.gpt2 import ADAPTERS, BOTH, CONFIG, IDS, MASK, continued_without_a_cache
from tests.helpers.marks import slow_but
from tests.helpers.networks import started
from tests.helpers.reference import close, normal, random_delta, same
from tests.helpers.sites import LAYERS, PARAMS, TOKENS, TOWERS, WIDTH, invariants, tower

KEY = jax.random.key(0)


def tower_sites(*names):
    return dict.fromkeys(names, (LAYERS, WIDTH))


ON_THE_TOWER = {
    "H": lj.adapter(tower_sites("block_out", "mlp_out"), rank=2),
    "L": lj.adapter(tower_sites("mlp_out"), rank=3, norm=True, activation="tanh"),
    "D": lj.adapter(tower_sites("mlp_out", "block_out"), rank=2, layers=[1, 3]),
    "compacter": lj.compacter(tower_sites("block_out", "mlp_out"), rank=4, n=2),
    "compacter, some layers": lj.compacter(tower_sites("mlp_out"), rank=2, n=2, layers=[2, 0], activation="tanh"),
    "LoRA + H + tune": lj.chain(
        lj.lora(lj.select("w", axes="sio"), rank=2),
        lj.adapter(tower_sites("mlp_out"), rank=2),
        lj.tune(lj.select("wte")),
    ),
}


def some(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


@pytest.mark.parametrize("name", some(ON_THE_TOWER, slow=["D", "compacter, some layers"]))
def test_what_is_always_true(name):
    invariants(ON_THE_TOWER[name])


def apart(params: Any) -> Any:
    """Parameters that differ from zero and one, so that none is without effect."""
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x) + rng.normal(0, 0.2, x.shape).astype(x.dtype)), params)


@functools.cache
def gpt2_params() -> Any:
    return apart(started(gpt2.GPT2(CONFIG), IDS))


@functools.cache
def gpt2_logits() -> Any:
    return jax.jit(gpt2.GPT2(CONFIG).apply)({"params": gpt2_params()}, IDS, MASK)


def fresh(kind: str, **changes: Any) -> lj.ParamTransform:
    return lj.adapter(**(ADAPTERS[kind] | changes))


STARTS = {kind: fresh(kind) for kind in ADAPTERS} | {"compacter": lj.compacter(BOTH, rank=4, n=2)}


@pytest.mark.parametrize("name", some(STARTS, slow=["P", "D"]))
def test_a_model_begins_as_the_base_bit_for_bit(name):
    """And strength 0 is the base with any factors, 1 the adapter."""
    method, model, params = STARTS[name], gpt2.GPT2(CONFIG), gpt2_params()
    delta, trained, base = jax.jit(method.init)(KEY, params), random_delta(method, params, size=0.5), gpt2_logits()

    @jax.jit
    def run(params, delta, strength):
        return lj.lift(model.apply)({"params": method.apply(params, delta, strength=strength)}, IDS, MASK)

    same(run(params, delta, 1.0), base)
    same(run(params, trained, 0.0), base)
    adapted = np.asarray(run(params, trained, 1.0))
    assert np.max(np.abs(adapted - base)) > 0.1
    if name == "H":
        without_strength = jax.jit(lambda p, d: lj.lift(model.apply)({"params": method.apply(p, d)}, IDS, MASK))
        same(without_strength(params, delta), base)
        same(without_strength(params, trained), adapted)


@pytest.mark.parametrize("name", slow_but(ON_THE_TOWER, "L", "compacter", "LoRA + H + tune"))
def test_it_begins_as_the_base_out_of_jit_too(name):
    method = ON_THE_TOWER[name]
    got = lj.lift(tower("loop"))(method.apply(PARAMS, jax.jit(method.init)(KEY, PARAMS)), TOKENS)
    same(got, tower("loop")(PARAMS, TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["encoder", "gpt2"])
def test_a_model_begins_as_the_base_out_of_jit_too(family):
    """The loop, since a scan is compiled. (Compiled, the last bits of an encoder may be others: its LayerNorms follow
    the sums at once, and the compiler joins them.)"""
    config: Any = encoder.EncoderConfig(vocab_size=20, max_positions=9, hidden=8, layers=2, heads=2)
    model, module = (gpt2.GPT2(CONFIG), gpt2) if family == "gpt2" else (encoder.Encoder(config), encoder)
    sites = {name: module.sites(model.config)[name] for name in BOTH}
    params = apart(started(model, IDS[:1, :3]))
    method = lj.chain(lj.adapter(sites, rank=3, norm=True), lj.compacter(sites, rank=4, n=2))
    adapted = method.apply(params, method.init(KEY, params))
    same(lj.lift(model.apply)({"params": adapted}, IDS[:1, :3]), model.apply({"params": params}, IDS[:1, :3]))


def test_layouts_of_a_model_have_one_delta():
    method, params = fresh("D", layers=[0]), gpt2_params()
    delta = random_delta(method, params, size=0.5)
    scanned = dataclasses.replace(CONFIG, scan_layers=True, remat=True)
    run = lambda config, p: jax.jit(lj.lift(gpt2.GPT2(config).apply))({"params": method.apply(p, delta)}, IDS)  # noqa: E731
    close(run(scanned, gpt2.to_scanned(params)), run(CONFIG, params))


def test_bfloat16_compute_with_float32_factors():
    """bfloat16 has 8 bits: a few products stay within 3% of the largest entry; the gradients are float32."""
    method = lj.chain(*(ON_THE_TOWER[name] for name in ("L", "compacter")))
    delta = random_delta(method, PARAMS, size=0.3)

    def forward(delta, dtype):
        x = PARAMS["wte"][TOKENS].astype(dtype)
        run = lj.lift(lambda p, x: TOWERS["loop"](p, x))
        return run(method.apply({"w": PARAMS["w"].astype(dtype)}, delta), x)

    def loss(delta, dtype):
        out = forward(delta, dtype)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    @jax.jit
    def run(delta):
        return [jax.value_and_grad(loss, has_aux=True)(delta, dtype) for dtype in (jnp.bfloat16, jnp.float32)]

    ((_, got), grads), ((_, want), want_grads) = run(delta)
    assert got.dtype == jnp.bfloat16
    close(np.asarray(got).astype(np.float32), want, 3e-2)
    close(grads, want_grads, 3e-2)

    method = ON_THE_TOWER["L"]
    delta = random_delta(method, PARAMS)
    eqns = equations(jax.make_jaxpr(functools.partial(forward, dtype=jnp.bfloat16))(delta).jaxpr)
    dots = [str(v.aval.dtype) for eqn in eqns if eqn.primitive.name == "dot_general" for v in eqn.invars]
    assert set(dots) == {"bfloat16"}  # no product runs in float32


def test_the_norm_keeps_its_digits_far_from_zero():
    """Against numpy in float64. Some features of GPT-2 are like that; float32 rounds x by 6e-5 here."""
    method, x = ON_THE_TOWER["L"], np.float32(1000) + np.asarray(normal(3, WIDTH))
    factors = random_delta(method, PARAMS)["@mlp_out/adapter"]
    (tap,) = method.apply(PARAMS, lj.Delta({"@mlp_out/adapter": factors})).taps
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], factors)
    f, h = ({name: np.asarray(v, np.float64) for name, v in first.items()}, np.asarray(x, np.float64))
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * f["scale"] + f["shift"]
    h = np.tanh(h @ f["down"] + f["down_bias"]) @ f["up"] + f["up_bias"]
    np.testing.assert_allclose(jax.jit(lambda x: tap.fn(first, x, {}))(x) - x, h, atol=2e-4)


def test_the_norm_is_in_float32_where_a_model_computes_in_bfloat16():
    """Features of 64.0 and 64.5, two neighbours in bfloat16: their mean is none of its numbers. Under promotion that
    mixes dtypes, so that the numbers tell. out - x is -1 and 1, whose sums with x are rounded to steps of 0.5."""
    eye, zeros = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    factors = {"down": eye, "up": 8 * eye, "scale": zeros + 1, "shift": zeros, "down_bias": zeros, "up_bias": zeros}
    x = np.array([[64.0, 64.5, 64.5, 64.5]], jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        out = jax.jit(lambda f, x: Bottleneck("relu", norm=True)(f, x, {}))(factors, x)
    y = np.asarray(out, np.float32) - np.asarray(x, np.float32)
    h = np.array([-3.0, 1.0, 1.0, 1.0]) / np.sqrt(3 + 16 * 4e-5)  # (x - mean) * 8 over the root of its variance
    np.testing.assert_allclose(y[0], 8 * np.maximum(h, 0), atol=0.25)


def test_first_values():
    """Standard deviations within 4 standard errors of as many draws; up begins as zero."""
    (first,) = jax.tree.map(np.asarray, lj.adapter({"mlp_out": (1, 200)}, rank=40).init(KEY, {})).values()
    np.testing.assert_allclose(first["down"].std(), 0.02, rtol=4 / math.sqrt(2 * 8000))
    assert not any(np.any(first[name]) for name in ("up", "up_bias", "down_bias"))
    delta = jax.tree.map(np.asarray, lj.compacter({"mlp_out": (20, 400)}, rank=400, n=20).init(KEY, {}))
    kronecker = delta["@mlp_out/compacter"]
    for name in ("down_left", "down_right", "up_left"):
        np.testing.assert_allclose(kronecker[name].std(), math.sqrt(2 / 401), rtol=4 / math.sqrt(2 * 8000))
    np.testing.assert_allclose(delta["@shared/compacter"]["rule"].std(), 20**-0.5, rtol=4 / math.sqrt(2 * 8000))
    assert not np.any(kronecker["up_right"])


def test_factors_of_another_dtype():
    method = fresh("P", dtype=jnp.bfloat16)
    delta = random_delta(method, {})
    assert {x.dtype.name for x in jax.tree.leaves(delta)} == {"bfloat16"} and method.spec["dtype"] == "bfloat16"
    out = jax.jit(lj.lift(gpt2.GPT2(CONFIG).apply))({"params": method.apply(gpt2_params(), delta)}, IDS)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("size", ["medium", pytest.param("large", marks=pytest.mark.slow)])
def test_counted_by_the_papers_formula(size):
    """n_adpt (2 d r + r + d) + 2 n_LN d, from shapes alone (Hu et al. 2021, section 5.1)."""
    config = gpt2.SIZES[size]
    d, layers = config.n_embd, config.n_layer
    shapes = jax.eval_shape(gpt2.GPT2(config).init, KEY, jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    sites = gpt2.sites(config)
    both = {name: sites[name] for name in BOTH}

    def formula(n, r, norms=0):
        return n * (2 * d * r + r + d) + 2 * norms * d

    def trained(sites, **options):
        return lj.check(lj.adapter(sites, **options), shapes).trained

    assert trained(both, rank=64) == formula(2 * layers, 64)
    assert trained({"mlp_out": both["mlp_out"]}, rank=16, norm=True) == formula(layers, 16, layers)
    assert trained(both, rank=8, layers=range(3, layers)) == formula(2 * (layers - 3), 8)
    report = lj.check(lj.compacter(both, rank=64, n=4), shapes)
    assert report.trained == 2 * layers * (2 * (d + 64) + 64 + d) + 4**3
    assert {row.path for row in report.rows} == {"@shared/compacter", *(f"@{site}/compacter" for site in both)}


def test_generation_with_a_cache_equals_the_loop_without():
    from lora_jax.generation import generate

    config = dataclasses.replace(CONFIG, n_positions=24)
    model = gpt2.GPT2(config)
    params = started(model, IDS)
    method = fresh("H")
    adapted = method.apply(params, random_delta(method, params, size=1.0))
    new = np.asarray(generate(model, adapted, IDS, MASK, max_new_tokens=6, eos=0))
    continued_without_a_cache(model, adapted, IDS, MASK, new)


@pytest.mark.parametrize("layers", [pytest.param(None, marks=pytest.mark.slow), [3, 1]])
def test_compacter_is_an_adapter_of_kronecker_sums(layers):
    """Against numpy's kron: output, and the gradient of every factor through the dense matrices' gradients."""
    n, sites = 2, tower_sites("mlp_out")
    method = lj.compacter(sites, rank=4, n=n, layers=layers)
    dense = lj.adapter(sites, rank=4, layers=layers)
    delta = random_delta(method, PARAMS, size=0.6)
    site_factors, rule = delta["@mlp_out/compacter"], np.asarray(delta["@shared/compacter"]["rule"], np.float64)
    count = len(layers or range(LAYERS))
    thin = {}
    for name in ("down", "up"):
        left, right = (
            np.asarray(site_factors[f"{name}_left"], np.float64),
            np.asarray(site_factors[f"{name}_right"], np.float64),
        )
        thin[name] = np.array([[left[k, i] @ right[k, i] for i in range(n)] for k in range(count)])
    matrices = {
        name: np.array([sum(np.kron(rule[i], thin[name][k, i]) for i in range(n)) for k in range(count)])
        for name in thin
    }
    assert matrices["down"].shape == (count, WIDTH, 4) and matrices["up"].shape == (count, 4, WIDTH)
    factors = {name: x.astype(np.float32) for name, x in matrices.items()}
    factors |= {name: site_factors[name] for name in ("down_bias", "up_bias")}

    def loss(method, delta):
        out = lj.lift(tower("scan"))(method.apply(PARAMS, delta), TOKENS)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(loss, 1, has_aux=True), static_argnums=0)
    (_, got), grads = run(Hashable(method), delta)
    (_, want), dense_grads = run(Hashable(dense), lj.Delta({"@mlp_out/adapter": factors}))
    close(got, want)

    # d loss / d rule and so on: the dense gradient in blocks, contracted with the other factors
    wanted: dict[str, Any] = {"rule": np.zeros_like(rule)}
    for name in ("down", "up"):
        g = np.asarray(dense_grads["@mlp_out/adapter"][name], np.float64)
        _, i, o = g.shape
        blocks = g.reshape(count, n, i // n, n, o // n)
        wanted["rule"] += np.einsum("kaibo,knio->nab", blocks, thin[name])
        of_thin = np.einsum("kaibo,nab->knio", blocks, rule)
        left, right = np.asarray(site_factors[f"{name}_left"]), np.asarray(site_factors[f"{name}_right"])
        wanted[f"{name}_left"] = np.einsum("knio,knro->knir", of_thin, right)
        wanted[f"{name}_right"] = np.einsum("knio,knir->knro", of_thin, left)
        wanted[f"{name}_bias"] = np.asarray(dense_grads["@mlp_out/adapter"][f"{name}_bias"])
    factor_grads = grads["@mlp_out/compacter"] | grads["@shared/compacter"]
    assert set(factor_grads) == set(wanted)
    for name, want in wanted.items():
        close(factor_grads[name], want.astype(np.float32), 2e-5)


class Hashable:
    """A method as a static argument of jit."""

    def __init__(self, method):
        self.apply = method.apply


@pytest.mark.slow
def test_saved_reloaded_and_gone_on_with(tmp_path):
    """Three steps are two, a file, and one more, bit for bit."""
    from lora_jax import checkpoints

    method = lj.chain(ON_THE_TOWER["D"], lj.compacter(tower_sites("mlp_out"), rank=2, n=2))

    def step(method, delta):
        loss = lambda d: jnp.sum(lj.lift(tower("scan"))(method.apply(PARAMS, d), TOKENS) ** 2)  # noqa: E731
        return jax.tree.map(lambda x, g: x - 0.01 * g, delta, jax.grad(loss)(delta))

    run = jax.jit(step, static_argnums=0)
    two = run(Hashable(method), run(Hashable(method), random_delta(method, PARAMS)))
    file = checkpoints.save_adapter(tmp_path, method, two, checkpoints.identity(PARAMS, "random"))
    again, reloaded, _ = checkpoints.load_adapter(file)
    same(reloaded, two)
    assert again.spec == method.spec
    same(run(Hashable(again), reloaded), run(Hashable(method), two))


def test_equal_specs_compile_once():
    run = jax.jit(lj.lift(tower("scan")))
    for seed in range(2):
        for make in (lambda: lj.adapter(tower_sites("mlp_out"), rank=2), lambda: ON_THE_TOWER["compacter"]):
            method = make()
            run(method.apply(PARAMS, random_delta(method, PARAMS, seed)), TOKENS)
    assert run._cache_size() == 2


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="activation='swish': choose one of"):
        lj.adapter(BOTH, rank=2, activation="swish")
    with pytest.raises(ValueError, match="activation='swish': choose one of"):
        lj.compacter(BOTH, rank=4, activation="swish")
    for rank in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"rank={rank} must be a whole number from 1"):
            lj.adapter(BOTH, rank=rank)
    with pytest.raises(ValueError, match="name a site at least"):
        lj.adapter({}, rank=2)
    for rank, n in ((0, 2), (4, 0)):
        with pytest.raises(ValueError, match=r"(rank|n)=0 must be a whole number from 1"):
            lj.compacter(BOTH, rank=rank, n=n)
    for rank, n in ((3, 2), (4, 3)):
        with pytest.raises(ValueError, match=f"n={n} must be a whole number that divides rank={rank}"):
            lj.compacter(BOTH, rank=rank, n=n)
    with pytest.raises(ValueError, match=r"layers=\[2\]: name some of the 2 of the site"):
        fresh("D", layers=[2])
    params, method = gpt2_params(), fresh("H")
    delta = random_delta(method, params)
    compact = random_delta(STARTS["compacter"], params)
    for other, given in ((fresh("H", rank=4), delta), (fresh("L"), delta), (method, compact)):
        with pytest.raises(ValueError, match="the delta"):
            other.apply(params, given)
    with pytest.raises(ValueError, match="the delta is not this method's"):
        STARTS["compacter"].apply(params, delta)
    with pytest.raises(ValueError, match="has no weight to go into"):
        lj.merge(method.apply(params, delta))
    with pytest.raises(ValueError, match=r"@attention_out/adapter is the target of two transforms"):
        lj.chain(method, fresh("D")).init(KEY, params)
    wide = lj.adapter({"mlp_out": (2, 9)}, rank=2)
    with pytest.raises(TypeError, match="dot_general"):
        lj.lift(gpt2.GPT2(CONFIG).apply)({"params": wide.apply(params, random_delta(wide, params))}, IDS)
