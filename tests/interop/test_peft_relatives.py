"""PEFT's VeRA, IA3 and LoKr read, written and read by PEFT again (conformance 15)."""

import jax
import numpy as np
import pytest

pytest.importorskip("peft")

import peft as their_peft

import lora_jax as lj
from lora_jax.interop import peft
from lora_jax.models.layouts import to_scanned
from tests.helpers.peft_files import QKV, QV, WEIGHTS, out, there_and_back, trained, without_peft
from tests.helpers.peft_models import adapter, assert_close, base, read_by_peft, theirs, written

VERA, IA3, LOKR = their_peft.VeraConfig, their_peft.IA3Config, their_peft.LoKrConfig
LM = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}
CLS = {"task_type": "SEQ_CLS"}

THERE_AND_BACK = {
    "vera": ("roberta", {"config": VERA, "r": 5, **CLS}),
    "vera, rectangular": (
        "bert",
        {"config": VERA, "r": 30, "target_modules": ["query", "output.dense", "intermediate.dense"], "d_initial": 0.2},
    ),
    "vera, Conv1D": (
        "gpt2",
        {"config": VERA, "r": 4, "target_modules": ["c_fc", "c_proj"], **LM},
    ),
    "vera, a fused layer": ("gpt2", {"config": VERA, "r": 5, **LM}),
    "vera, a fused layer and others": (
        "gpt2",
        {"config": VERA, "r": 5, "target_modules": ["c_attn", "c_fc"], "layers_to_transform": [0, 2], **LM},
    ),
    "vera, all biases": ("roberta", {"config": VERA, "r": 5, "bias": "all", **CLS}),
    "vera, its biases": ("bert", {"config": VERA, "r": 5, "bias": "vera_only", "target_modules": "all-linear"}),
    "ia3": ("roberta", {"config": IA3, **CLS}),
    "ia3, a fused layer": ("gpt2", {"config": IA3, **LM}),
    "ia3, its input": (
        "gpt2",
        {"config": IA3, "target_modules": ["c_attn", "c_fc"], "feedforward_modules": ["c_attn"], **LM},
    ),
    "ia3, patterns": (
        "bert",
        {
            "config": IA3,
            "target_modules": r".*layer\.[02]\..*(query|dense)",
            "feedforward_modules": r".*layer\.2\..*(query|output\.dense)",
            "exclude_modules": ["layer.0.output.dense"],
            "modules_to_save": ["LayerNorm"],
        },
    ),
    "ia3, a head without a bias": (
        "gpt2 untied",
        {"config": IA3, "target_modules": ["lm_head"], "feedforward_modules": [], "task_type": "CAUSAL_LM"},
    ),
    "lokr": ("roberta", {"config": LOKR, "r": 1, "alpha": 3, **CLS}),
    "lokr, both sides": (
        "bert",
        {"config": LOKR, "r": 1, "decompose_both": True, "target_modules": ["query", "output.dense"], "size": 0.7},
    ),
    "lokr, patterns": (
        "bert",
        {
            "config": LOKR,
            "r": 4,
            "alpha": -2.5,
            "decompose_factor": 2,
            "target_modules": ["query", "key", "intermediate.dense"],
            "rank_pattern": {"key": 1, "intermediate.dense": 2},
            "alpha_pattern": {"layer.1.attention.self.query": 7},
            "init_weights": "lycoris",
        },
    ),
    "lokr, a head": ("gpt2 untied", {"config": LOKR, "r": 2, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}),
}


# Each is a combination of what the quick ones have in other combinations.
SLOW = ("vera", "vera, Conv1D", "vera, a fused layer", "ia3", "ia3, a fused layer", "lokr")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in THERE_AND_BACK])
def test_conformance_15_there_and_back(name, tmp_path):
    kind, fields = THERE_AND_BACK[name]
    method, delta, again, want = there_and_back(kind, tmp_path, **fields)
    assert_close(theirs(read_by_peft(kind, again)), want, 0.0)
    # and as if it had been made here
    peft.save(tmp_path / "plain", without_peft(method), delta, params=base(kind).params)
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()


def test_conformance_15_a_loaded_method_goes_with_the_scanned_layout(tmp_path):
    params = base("gpt2").params
    for n, fields in enumerate([{"config": IA3}, {"config": VERA, "r": 3, "target_modules": ["c_attn", "mlp.c_proj"]}]):
        method, delta = peft.load(written(adapter("gpt2", **fields, **LM), tmp_path / str(n)), params)
        merged = lj.merge(method.apply(to_scanned(params), to_scanned(delta)))
        want = to_scanned(lj.merge(method.apply(params, delta)))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, want)


# --- ours, there --------------------------------------------------------------------------------------------------

HEAD = lj.tune(lj.select("classifier/**"))
EXPORTED = {
    # kind, method, fields, shapes
    "vera": (
        "bert",
        lj.chain(lj.vera(lj.select(QV, "h_1/mlp/up/kernel"), rank=6, d_initial=0.3), HEAD),
        {"peft_type": "VERA", "r": 6, "d_initial": 0.3, "task_type": "SEQ_CLS", "bias": "none"},
        {"base_model.vera_A": (6, 12), "base_model.vera_B": (20, 6)},
    ),
    "vera of a fused layer": (
        "gpt2",
        lj.vera(lj.select(QKV, "h_0/mlp/up/kernel"), rank=6, fused=QKV),
        {"peft_type": "VERA", "target_modules": ["c_attn", "h.0.mlp.c_fc"]},
        {"base_model.vera_B": (48, 6), "transformer.h.1.attn.c_attn.vera_lambda_d": (6,)},
    ),
    "vera and biases": (
        "gpt2",
        lj.chain(lj.vera(lj.select("**/up/kernel"), rank=6), lj.tune(lj.select("**/up/bias"))),
        {"peft_type": "VERA", "target_modules": ["c_fc"], "bias": "vera_only", "fan_in_fan_out": True},
        {"transformer.h.1.mlp.c_fc.vera_lambda_b": (48,)},
    ),
    "ia3, as in the paper": (
        "gpt2",
        lj.ia3(lj.select("**/attn/{key,value}/kernel", "**/down/kernel"), feedforward="**/down/*"),
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
        {"transformer.h.2.attn.c_attn.ia3_l": (36, 1), "transformer.h.2.mlp.c_proj.ia3_l": (1, 48)},
    ),
    "ia3 of some layers, and a head": (
        "roberta",
        lj.chain(lj.ia3(lj.select("h_{0,1}/**/kernel"), feedforward=["h_0/mlp/*/*", "h_1/attn/out/*"]), HEAD),
        {"peft_type": "IA3", "modules_to_save": ["classifier", "score"]},
        {"roberta.encoder.layer.1.attention.output.dense.ia3_l": (1, 12)},
    ),
    "lokr": (
        "bert",
        lj.chain(lj.lokr(lj.select("**/attn/{query,out}/kernel"), rank=5, alpha=2, decompose_factor=2), HEAD),
        {"peft_type": "LOKR", "r": 5, "alpha": 2, "decompose_factor": 2, "decompose_both": False},
        {"bert.encoder.layer.1.attention.self.query.lokr_w2": (6, 6)},
    ),
    "lokr of two kinds": (
        "bert",
        lj.chain(
            lj.lokr(lj.select("**/up/kernel"), rank=1, alpha={"h_0/**": 4, "**": 3}, decompose_both=True),
            lj.lokr(lj.select("**/key/kernel", layers=[2]), rank={"**": 2}, decompose_both=True),
        ),
        {"r": 1, "alpha": 3, "rank_pattern": {"bert.encoder.layer.2.attention.self.key": 2}},
        {"bert.encoder.layer.0.intermediate.dense.lokr_w1_a": (4, 1)},
    ),
}


@pytest.mark.parametrize("kind, method, fields, shapes", EXPORTED.values(), ids=EXPORTED)
def test_conformance_15_ours_there(kind, method, fields, shapes, tmp_path):
    config, tensors = out(kind, method, tmp_path, trained(method, base(kind).params))
    assert config | fields == config
    assert {name: tensors[name].shape for name in shapes} == shapes


def test_conformance_15_ia3_scales_a_query_that_is_not_adapted_by_one(tmp_path):
    method, params = lj.ia3(lj.select("**/attn/{key,value}/kernel")), base("gpt2").params
    delta = trained(method, params)
    _, tensors = out("gpt2", method, tmp_path, delta)
    l = tensors["transformer.h.0.attn.c_attn.ia3_l"][:, 0]  # noqa: E741
    np.testing.assert_array_equal(l[:12], 1)
    np.testing.assert_array_equal(l[12:24], delta["@shared/h_0/attn/key"]["l"])
