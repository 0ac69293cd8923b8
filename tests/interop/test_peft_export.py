"""Methods of this library written for PEFT: query, key and value as one layer, heads, biases, rows (conformance 7)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("peft")


import lora_jax as lj
from lora_jax.interop import peft
from lora_jax.methods.bias_delta import bias_delta
from lora_jax.methods.token_rows import token_rows
from lora_jax.models.layouts import to_scanned
from tests.helpers.peft_files import QKV, QV, filled, out
from tests.helpers.peft_models import adapter, base, written


def test_conformance_07_query_and_value_become_one_layer_of_twice_rank_and_alpha(tmp_path):
    method = lj.lora(lj.select(QV), rank=4, alpha=32, dropout=0.1)
    delta = filled(method, base("gpt2").params)
    config, tensors = out("gpt2", method, tmp_path, delta)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 64, False)
    assert (config["lora_dropout"], config["target_modules"]) == (0.1, ["c_attn"])
    assert (config["task_type"], config["fan_in_fan_out"]) == ("CAUSAL_LM", True)
    a, b = (tensors[f"transformer.h.1.attn.c_attn.lora_{name}.weight"] for name in "AB")
    query, value = (delta[f"h_1/attn/{part}/kernel"] for part in ("query", "value"))
    np.testing.assert_array_equal(a, np.concatenate([query["a"].T, value["a"].T]))
    np.testing.assert_array_equal(b[:12, :4], query["b"].T)
    np.testing.assert_array_equal(b[24:, 4:], value["b"].T)
    assert not b[12:24].any() and not b[:12, 4:].any() and not b[24:, :4].any()


BRIDGES = {
    "all three": (lj.lora(lj.select(QKV), rank=2, alpha=5), (6, 15, False)),
    "one": (lj.lora(lj.select("**/attn/value/kernel"), rank=3, alpha=5), (3, 5, False)),
    "unequal ranks": (lj.lora(lj.select(QV), rank={"**/query/*": 1, "**": 3}, alpha=4), (4, 4, False)),
    "unequal alphas": (lj.lora(lj.select(QV), rank=2, alpha={"**/query/*": 1, "**": 3}), (4, 4, False)),
    "equal scales": (lj.lora(lj.select(QV), rank={"**/query/*": 1, "**": 3}), (4, 4, False)),
    "rslora": (lj.lora(lj.select(QV), rank=4, alpha=16, scale_rule="alpha/sqrt(r)"), (8, 16 * math.sqrt(2), True)),
    "rslora of three": (lj.lora(lj.select(QKV), rank=3, alpha=1, scale_rule="alpha/sqrt(r)"), (9, math.sqrt(3), True)),
    "shared": (lj.lora(lj.select(QV), rank=2, alpha=3, shared=[QKV]), (2, 3, False)),
    "shared and alone": (lj.lora(lj.select(QKV), rank=2, alpha=3, shared=[QV]), (4, 6, False)),
    "shared, two scales": (
        lj.lora(lj.select(QV), rank=2, alpha={"**/query/*": 1, "**": 3}, shared=[QV]),
        (2, 2, False),
    ),
    "two rules": (
        lj.chain(
            lj.lora(lj.select("**/query/kernel"), rank=4, alpha=4, scale_rule="alpha/sqrt(r)"),
            lj.lora(lj.select("**/value/kernel"), rank=2, alpha=4),
        ),
        (6, 12, False),
    ),
    "odd scale": (lj.lora(lj.select(QV), rank=3, alpha=0.1), (6, 0.2, False)),
    "negative": (lj.lora(lj.select(QV), rank=3, alpha=-7), (6, -14, False)),
}


@pytest.mark.parametrize("method, expected", BRIDGES.values(), ids=BRIDGES)
def test_conformance_07_bridges(method, expected, tmp_path):
    config, _ = out("gpt2", method, tmp_path)
    assert (config["r"], config["use_rslora"]) == (expected[0], expected[2])
    assert config["lora_alpha"] == pytest.approx(expected[1], rel=1e-7)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_factors_of_low_precision_are_stored_so(tmp_path):
    method = lj.lora(lj.select(QV), rank=2, alpha=3, dtype=jnp.bfloat16)
    _, tensors = out("gpt2", method, tmp_path)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), filled(method, base("gpt2").params))
    with pytest.raises(ValueError, match="is float64; an adapter is float32"):
        peft.save(tmp_path / "wide", method, wide, params=base("gpt2").params)


def test_a_layer_that_is_shared_whole_returns_as_peft_had_it(tmp_path):
    """Without what `load` remembers, the same tensors are made of the method alone."""
    folder = written(
        adapter("gpt2", task_type="CAUSAL_LM", r=3, lora_alpha=7, fan_in_fan_out=True), tmp_path / "theirs"
    )
    method, delta = peft.load(folder, base("gpt2").params)
    spec = {name: value for name, value in method.spec.items() if name != "peft"}
    config, _ = out("gpt2", lj.from_spec(spec), tmp_path, delta)
    assert (config["r"], config["lora_alpha"]) == (3, 7)
    ours_and_theirs = [f / "adapter_model.safetensors" for f in (tmp_path / "ours", folder)]
    assert ours_and_theirs[0].read_bytes() == ours_and_theirs[1].read_bytes()


SHAPES = {
    "projection and mlp": ("gpt2", "**/{attn/out,mlp/up,mlp/down}/kernel", ["c_fc", "c_proj"]),
    "one projection": ("gpt2", "**/attn/out/kernel", ["attn.c_proj"]),
    "some layers": ("gpt2", "h_{0,2}/mlp/up/kernel", ["h.0.mlp.c_fc", "h.2.mlp.c_fc"]),
    "position table": ("gpt2", "wpe/embedding", ["wpe"]),
    "untied embedding and head": ("gpt2 untied", "{wte/embedding,lm_head/kernel}", ["lm_head", "wte"]),
    "roberta": ("roberta", QV, ["query", "value"]),
    "encoder, all of a layer": ("bert", "h_1/**/kernel", None),
    "pooler": ("bert", "{pooler,classifier}/kernel", ["classifier", "pooler.dense"]),
    "bare encoder": ("bert bare", "**/{query,out}/kernel", ["attention.output.dense", "query"]),
}


@pytest.mark.parametrize("kind, glob, targets", SHAPES.values(), ids=SHAPES)
def test_targets_are_as_short_as_can_be(kind, glob, targets, tmp_path):
    config, _ = out(kind, lj.lora(lj.select(glob), rank=2, alpha=3), tmp_path)
    assert targets is None or config["target_modules"] == targets
    assert config["task_type"] == ("CAUSAL_LM" if kind.startswith("gpt2") else None)


def test_ranks_and_alphas_that_differ_are_patterns_of_whole_names(tmp_path):
    method = lj.lora(
        lj.select("**/mlp/{up,down}/kernel"), rank={"h_1/**": 3, "**": 2}, alpha={"**/up/*": 8, "h_1/**": 6, "**": 1}
    )
    config, _ = out("gpt2", method, tmp_path)
    modules = [f"transformer.h.1.mlp.{name}" for name in ("c_fc", "c_proj")]
    assert config["rank_pattern"] == dict.fromkeys(modules, 3) and config["r"] == 2
    assert config["alpha_pattern"]["transformer.h.1.mlp.c_proj"] == 6
    assert set(config["alpha_pattern"].values()) | {config["lora_alpha"]} == {8, 6, 1}


def lora_and(other, select=QV, **options):
    return lj.chain(lj.lora(lj.select(select), rank=2, alpha=3, **options), other)


CHAINS = {
    "a head": ("roberta", lora_and(lj.tune(lj.select("classifier/**"))), {"task_type": "SEQ_CLS", "bias": "none"}),
    "a head of one layer": ("bert", lora_and(lj.tune(lj.select("classifier/**"))), {"task_type": "SEQ_CLS"}),
    "half a head": ("roberta", lora_and(lj.tune(lj.select("classifier/out/*"))), {"task_type": None}),
    "a score": ("gpt2 score", lora_and(lj.tune(lj.select("score/kernel"))), {"task_type": "SEQ_CLS"}),
    "biases of the adapted": ("bert", lora_and(lj.tune(lj.select("**/{query,value}/bias"))), {"bias": "lora_only"}),
    "fused biases": (
        "gpt2",
        lora_and(lj.tune(lj.select("**/attn/{query,key,value}/bias"))),
        {"bias": "lora_only", "modules_to_save": None},
    ),
    "all biases": ("gpt2", lora_and(lj.tune(lj.select("**/bias"))), {"bias": "all"}),
    "all biases and a head": ("roberta", lora_and(lj.tune(lj.select("**/bias", "classifier/**"))), {"bias": "all"}),
    "norms": ("gpt2", lora_and(lj.tune(lj.select("**/ln_1/*", "ln_f/*"))), {"modules_to_save": ["ln_1", "ln_f"]}),
    "a fused layer": (
        "gpt2",
        lora_and(lj.tune(lj.select("h_0/attn/{query,key,value}/*")), "h_1/attn/query/kernel"),
        {},
    ),
    "shifts": ("bert", lora_and(bias_delta(lj.select("**/{query,value}/bias"), scale=1.5)), {"lora_bias": True}),
    "shifts of another scale": (
        "gpt2",
        lora_and(bias_delta(lj.select("**/attn/query/bias"), scale=4)),
        {"lora_bias": True},
    ),
    "shifts in one layer": ("bert", lora_and(bias_delta(lj.select("h_1/attn/query/bias"))), {"lora_bias": True}),
    "rows": (
        "gpt2",
        lora_and(token_rows(lj.select("wte/embedding"), indices=[9, 4])),
        {"trainable_token_indices": [9, 4]},
    ),
    "rows of positions": (
        "gpt2",
        lora_and(token_rows(lj.select("wpe/embedding"), indices=[0])),
        {"trainable_token_indices": {"transformer.wpe": [0]}},
    ),
}


@pytest.mark.parametrize("kind, method, fields", CHAINS.values(), ids=CHAINS)
def test_chains(kind, method, fields, tmp_path):
    config, _ = out(kind, method, tmp_path)
    assert fields.items() <= config.items()


def test_a_head_written_here_is_the_file_that_peft_would_write(tmp_path):
    fields = {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 3, "bias": "all"}
    folder = written(adapter("roberta", **fields), tmp_path / "theirs")
    method, delta = peft.load(folder, base("roberta").params)
    spec = {name: value for name, value in method.spec.items() if name != "peft"}
    peft.save(tmp_path / "ours", lj.from_spec(spec), delta, params=base("roberta").params)
    files = [f / "adapter_model.safetensors" for f in (tmp_path / "ours", folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


REFUSED = {
    "half a module": ("gpt2", lora_and(lj.tune(lj.select("ln_f/scale"))), "ln_f/scale is tuned, but PEFT trains whole"),
    "some biases": ("bert", lora_and(lj.tune(lj.select("h_0/**/bias"))), "h_0/.* is tuned"),
    "part of a fused layer": ("gpt2", lora_and(lj.tune(lj.select("h_0/attn/key/*"))), "h_0/attn/key/kernel is tuned"),
    "biases alone": ("gpt2", lj.tune(lj.select("**/bias")), "at least one adapted weight"),
    "two dropouts": (
        "gpt2",
        lora_and(lj.lora(lj.select("**/up/kernel"), rank=2), dropout=0.1),
        "one lora_dropout",
    ),
    "a tied embedding": (
        "gpt2",
        lj.lora(lj.select("wte/embedding"), rank=2),
        "look-up of transformer.wte alone.*tie=False",
    ),
    "a shift elsewhere": (
        "bert",
        lora_and(bias_delta(lj.select("**/key/bias"))),
        "h_0/attn/key/bias is shifted, but not",
    ),
    "a shift without a bias": (
        "gpt2 untied",
        lora_and(bias_delta(lj.select("**/attn/{query,value}/bias")), "{**/attn/{query,value},lm_head}/kernel"),
        "lm_head/kernel has no bias",
    ),
}


@pytest.mark.parametrize("kind, method, message", REFUSED.values(), ids=REFUSED)
def test_what_peft_has_no_form_for_is_said(kind, method, message, tmp_path):
    params = base(kind).params
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path, method, filled(method, params), params=params)
    assert not list(tmp_path.iterdir())


def test_what_is_given_wrongly_is_said(tmp_path):
    params = base("gpt2").params
    method = lj.lora(lj.select(QV), rank=2)
    delta = filled(method, params)
    with pytest.raises(ValueError, match="to_loop"):
        peft.save(tmp_path, method, delta, params=to_scanned(params))
    with pytest.raises(TypeError, match="is adapted"):
        peft.save(tmp_path, method, delta, params=method.apply(params, delta))
    with pytest.raises(ValueError, match="none of the families"):
        peft.save(tmp_path, lj.lora(lj.select("w"), rank=1), delta, params={"w": jnp.ones((2, 2))})
    broken = lj.Delta(
        delta | {"h_0/attn/query/kernel": jax.tree.map(lambda x: x * jnp.nan, delta["h_0/attn/query/kernel"])}
    )
    with pytest.raises(ValueError, match="not finite"):
        peft.save(tmp_path, method, broken, params=params)
    extra = params | {"probe": {"kernel": jnp.ones((3, 3))}}
    probing = lj.lora(lj.select("probe/kernel"), rank=1)
    with pytest.raises(ValueError, match="probe/kernel is adapted, but is no parameter of"):
        peft.save(tmp_path, probing, filled(probing, extra), params=extra)
    folder = written(adapter("gpt2", task_type="CAUSAL_LM", r=2), tmp_path / "theirs")
    read, taken = peft.load(folder, params)
    with pytest.raises(ValueError, match=r"@shared/h_0/attn:a.* is missing or too much"):
        peft.save(tmp_path / "x", read, delta, params=params)
    short = lj.Delta(taken | {"@shared/h_0/attn": {"a": jnp.ones((12, 1))}})
    with pytest.raises(ValueError, match=r"@shared/h_0/attn: .* would have the shape"):
        peft.save(tmp_path / "x", read, short, params=params)


def test_a_loaded_method_goes_with_the_scanned_layout(tmp_path):
    folder = written(adapter("gpt2", task_type="CAUSAL_LM", r=2, lora_bias=True, lora_alpha=3), tmp_path)
    params = base("gpt2").params
    method, delta = peft.load(folder, params)
    merged = lj.merge(method.apply(to_scanned(params), to_scanned(delta)))
    jax.tree.map(np.testing.assert_array_equal, merged, to_scanned(lj.merge(method.apply(params, delta))))
