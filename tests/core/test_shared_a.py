"""One A for several kernels of a module, as in a fused layer: training, layouts, chains, files, counts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.checkpoints import load_adapter, save_adapter
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.models.layouts import to_loop, to_scanned
from tests.helpers.networks import started
from tests.helpers.reference import close, leaves, normal, random_delta, same

KEY = jax.random.key(0)
CONFIG = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2)
MODEL = GPT2(CONFIG)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 6)), jnp.int32)
PARAMS = started(MODEL, TOKENS)
QKV = "**/attn/{query,key,value}/kernel"
METHOD = lj.lora(lj.select(QKV, axes={"h/**": "sio"}), rank=2, alpha=3, shared=[QKV])
lifted = lj.lift(MODEL.apply, on_dense="error")


def logits(params, delta, method=METHOD, **kwargs):
    return jax.jit(lambda d: lifted({"params": method.apply(params, d, **kwargs)}, TOKENS))(delta)


def test_one_a_stands_in_the_delta_for_all_of_a_module():
    delta = METHOD.init(KEY, PARAMS)
    kernels = [f"h_{n}/attn/{part}/kernel" for n in (0, 1) for part in ("query", "key", "value")]
    assert sorted(delta) == sorted(["@shared/h_0/attn", "@shared/h_1/attn", *kernels])
    assert jax.tree.map(jnp.shape, delta["@shared/h_0/attn"]) == {"a": (8, 2)}
    assert all(jax.tree.map(jnp.shape, delta[path]) == {"b": (2, 8)} for path in kernels)
    assert np.ptp(delta["@shared/h_0/attn"]["a"]) > 0
    assert np.any(delta["@shared/h_0/attn"]["a"] != delta["@shared/h_1/attn"]["a"])  # layers draw apart


def test_it_is_the_function_of_three_kernels_with_that_a():
    delta = random_delta(METHOD, PARAMS)
    alone = lj.lora(lj.select(QKV), rank=2, alpha=3)
    copied = lj.Delta(
        {
            path: {"a": delta["@shared/" + path.rsplit("/", 2)[0]]["a"], **factors}
            for path, factors in delta.items()
            if not path.startswith("@")
        }
    )

    def loss(delta, method):
        out = lifted({"params": method.apply(PARAMS, delta)}, TOKENS)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(lambda d, e: [jax.grad(loss, has_aux=True)(*args) for args in ((d, METHOD), (e, alone))])
    (got, out), (each, want) = run(delta, copied)
    close(out, want)
    assert np.max(np.abs(out - jax.jit(MODEL.apply)({"params": PARAMS}, TOKENS))) > 0.01
    for n in (0, 1):
        summed = sum(each[f"h_{n}/attn/{part}/kernel"]["a"] for part in ("query", "key", "value"))
        close(got[f"@shared/h_{n}/attn"]["a"], summed, 2e-5)


def test_the_paths_of_a_module_see_one_dropout_mask():
    dropping = lj.lora(lj.select(QKV), rank=2, dropout=0.5, shared=[QKV])
    adapted = leaves(dropping.apply(PARAMS, dropping.init(KEY, PARAMS), key=jax.random.key(7)))
    key = lambda path: np.asarray(jax.random.key_data(adapted[path + "/key"]))  # noqa: E731
    assert np.all(key("h_0/attn/query/kernel") == key("h_0/attn/value/kernel"))
    assert np.any(key("h_0/attn/query/kernel") != key("h_1/attn/query/kernel"))


def test_loop_and_scanned_layouts_are_one_function():
    delta = random_delta(METHOD, PARAMS)
    params, other = to_scanned(PARAMS), to_scanned(delta)
    assert sorted(other) == ["@shared/h/attn", *(f"h/attn/{part}/kernel" for part in ("key", "query", "value"))]
    same(to_loop(other), delta)
    assert jax.tree.map(jnp.shape, METHOD.init(KEY, params)) == jax.tree.map(jnp.shape, other)
    model = GPT2(GPT2Config(**{**CONFIG.__dict__, "scan_layers": True}))
    scanned = lj.lift(model.apply, on_dense="error")
    close(jax.jit(scanned)({"params": METHOD.apply(params, other)}, TOKENS), logits(PARAMS, delta))


def test_a_chain_gives_each_transform_its_own():
    both = lj.chain(
        lj.lora(lj.select("h_0/attn/{query,value}/kernel"), rank=2, shared=[QKV]),
        lj.lora(lj.select("h_1/attn/query/kernel"), rank=1),
        lj.tune(lj.select("ln_f/**")),
    )
    delta = random_delta(both, PARAMS)
    report = lj.check(both, PARAMS)
    assert report.trained == 8 * 2 + 2 * 2 * 8 + 8 + 8 + 16
    assert [row.factors for row in report.rows if row.path == "@shared/h_0/attn"] == ["a (8, 2)"]
    assert {row.path: row.method for row in report.rows}["@shared/h_0/attn"] == "lora"
    assert all(label == "trainable" for label in jax.tree.leaves(lj.labels(delta)))
    again = lj.from_spec(json.loads(json.dumps(both.spec)))
    same(again.apply(PARAMS, delta), both.apply(PARAMS, delta))


def test_it_survives_an_adapter_file(tmp_path):
    delta = random_delta(METHOD, PARAMS)
    save_adapter(tmp_path, METHOD, delta, {"source": "-", "shapes": "-", "content": "-"})
    method, again, _ = load_adapter(tmp_path)
    same(again, delta)
    same(method.apply(PARAMS, again), METHOD.apply(PARAMS, delta))
    assert "shared" not in lj.lora(lj.select(QKV), rank=2).spec


def test_what_cannot_be_shared_is_said():
    uneven = lj.lora(lj.select(QKV), rank={"**/query/*": 3, "**": 2}, shared=[QKV])
    with pytest.raises(ValueError, match=r"h_0/attn/.*\(8, [23]\), but \(8, [23]\) in @shared/h_0/attn"):
        uneven.init(KEY, PARAMS)
    delta = METHOD.init(KEY, PARAMS)
    lacking = lj.Delta({path: factors for path, factors in delta.items() if path != "@shared/h_1/attn"})
    with pytest.raises(ValueError, match="@shared/h_1/attn"):
        METHOD.apply(PARAMS, lacking)
    with pytest.raises(ValueError, match="@shared/h_9/attn"):
        METHOD.apply(PARAMS, lj.Delta(delta | {"@shared/h_9/attn": {"a": jnp.ones((8, 2))}}))
    unshared = lj.Delta(delta | {"h_0/attn/key/kernel": {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))}})
    with pytest.raises(ValueError, match="key/kernel has a factor 'a' of its own, but it is that of @shared/h_0/attn"):
        METHOD.apply(PARAMS, unshared)
    with pytest.raises(TypeError, match="takes a Delta"):
        METHOD.apply(PARAMS, dict(delta))


def test_a_rank_above_the_smaller_side_is_allowed_on_request_only():
    params = {"kernel": normal(3, 2)}
    with pytest.raises(ValueError, match=r"rank=4 must be .* min\(in, out\) = 2"):
        lj.lora(lj.select("kernel"), rank=4).init(KEY, params)
    loose = lj.lora(lj.select("kernel"), rank=4, strict=False)
    assert loose.spec["strict"] is False
    delta = random_delta(loose, params)
    merged = lj.merge(loose.apply(params, delta))["kernel"]
    close(merged, params["kernel"] + delta["kernel"]["a"] @ delta["kernel"]["b"])
    with pytest.raises(ValueError, match="rank=0"):
        lj.lora(lj.select("kernel"), rank=0, strict=False).init(KEY, params)
