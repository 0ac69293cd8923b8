"""What of PEFT's VeRA, IA3 and LoKr is not read, and what of ours PEFT has no form for (conformance 15)."""

import pytest

pytest.importorskip("peft")

import peft as their_peft
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.interop import peft
from lora_jax.methods.bias_delta import bias_delta
from lora_jax.methods.token_rows import token_rows
from lora_jax.models import gpt2
from tests.helpers.peft_files import QKV, QV, WEIGHTS, spoiled, trained, without_peft
from tests.helpers.peft_models import adapter, base, quietly, written

VERA, IA3, LOKR = their_peft.VeraConfig, their_peft.IA3Config, their_peft.LoKrConfig
LM = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}
CLS = {"task_type": "SEQ_CLS"}


def file_of(tmp_path, kind, **fields):
    return written(adapter(kind, **fields), tmp_path / "theirs")


def test_conformance_15_vera_without_its_projections_is_refused(tmp_path, caplog):
    folder = quietly(file_of, tmp_path, "roberta", config=VERA, r=5, save_projection=False, **CLS)
    params = base("roberta").params
    assert not any(name.startswith("base_model.vera") for name in load_file(folder / WEIGHTS))
    with pytest.raises(ValueError, match=r"save_projection=False: its A and B are in no file.*merge_and_unload"):
        peft.load(folder, params)
    with pytest.raises(ValueError, match=r"base_model\.vera_A is missing; base_model\.vera_B is missing"):
        peft.load(spoiled(folder, tmp_path / "1", save_projection=True), params)
    full_folder = written(adapter("roberta", config=VERA, r=5, **CLS), tmp_path / "whole")
    cut = spoiled(full_folder, tmp_path / "2", lambda t: t | {"base_model.vera_B": t["base_model.vera_B"][:9].copy()})
    with pytest.raises(ValueError, match=r"base_model\.vera_B has shape \(9, 5\), not \(12, 5\)"):
        peft.load(cut, params)
    with pytest.raises(ValueError, match=r"query\.vera_lambda_d has shape \(5,\), not \(6,\).*another rank"):
        peft.load(spoiled(full_folder, tmp_path / "3", r=6), params)
    with pytest.raises(ValueError, match=r"exclude_modules=.* is not known here"):
        peft.load(spoiled(full_folder, tmp_path / "4", exclude_modules=["key"]), params)
    with pytest.raises(ValueError, match="bias='lora_only' is not"):
        peft.load(spoiled(full_folder, tmp_path / "5", bias="lora_only"), params)
    assert not caplog.text
    peft.load(spoiled(full_folder, tmp_path / "6", vera_dropout=0.1), params)
    assert "VeRA has no dropout here" in caplog.text


def test_conformance_15_ia3_s_files_are_read_strictly(tmp_path):
    folder, params = file_of(tmp_path, "gpt2", config=IA3, **LM), base("gpt2").params
    name = "base_model.model.transformer.h.1.mlp.c_proj.ia3_l"
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        peft.load(spoiled(folder, tmp_path / "1", lambda t: {n: x for n, x in t.items() if n != name}), params)
    with pytest.raises(ValueError, match=rf"{name} has shape \(48, 1\), not \(1, 48\).*another size"):
        peft.load(spoiled(folder, tmp_path / "2", lambda t: t | {name: t[name].T.copy()}), params)
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_proj\.ia3_l has shape"):
        peft.load(spoiled(folder, tmp_path / "3", feedforward_modules=[]), params)
    with pytest.raises(ValueError, match=r"feedforward_modules has 'c_fc', which is not in target_modules"):
        peft.load(spoiled(folder, tmp_path / "4", feedforward_modules=["c_fc"]), params)
    with pytest.raises(ValueError, match=r"feedforward_modules has '\(c_proj', no regular expression"):
        peft.load(spoiled(folder, tmp_path / "5", feedforward_modules="(c_proj"), params)
    with pytest.raises(ValueError, match="lora_alpha=3 is not known here"):
        peft.load(spoiled(folder, tmp_path / "6", lora_alpha=3), params)
    with pytest.raises(
        ValueError, match=r"means transformer\.wpe, which IA3 cannot adapt: .* Linear, Conv1D, not with E"
    ):
        peft.load(spoiled(folder, tmp_path / "7", target_modules=["wpe"], feedforward_modules=[]), params)
    head = quietly(file_of, tmp_path / "head", "gpt2", config=IA3, target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"head of lm_head alone.*tie=False"):
        peft.load(head, params)


def test_conformance_15_one_input_of_a_fused_layer_is_scaled_once(tmp_path):
    fields = {"target_modules": ["c_attn"], "feedforward_modules": ["c_attn"]}
    folder, params = file_of(tmp_path, "gpt2", config=IA3, **fields, **LM), base("gpt2").params
    method, delta = peft.load(folder, params)
    key = "h_1/attn/key/kernel"
    apart = lj.Delta(delta | {key: {"l": delta[key]["l"] * 2}})
    for each in (method, without_peft(method)):
        with pytest.raises(
            ValueError, match=r"h\.1\.attn\.c_attn\.ia3_l is one for .*query/kernel and .*but these differ"
        ):
            peft.save(tmp_path / "ours", each, apart, params=params)
    alone = lj.ia3(lj.select(QV), feedforward=[QV])
    with pytest.raises(ValueError, match=r"query/kernel is feedforward, but a part of transformer\.h\.0\.attn\.c_attn"):
        peft.save(tmp_path / "ours", alone, trained(alone, params), params=params)
    both = lj.ia3(lj.select(QKV), feedforward=["**/query/*"])
    with pytest.raises(ValueError, match=r"IA3 scales the inputs of a layer, or its outputs"):
        peft.save(tmp_path / "ours", both, trained(both, params), params=params)


def test_conformance_15_lokr_s_files_are_read_strictly(tmp_path, caplog):
    fields = {"config": LOKR, "r": 1, "target_modules": ["query"]}
    folder, params = file_of(tmp_path, "roberta", **fields), base("roberta").params
    with pytest.raises(ValueError, match=r"query\.lokr_w2 is missing; .*lokr_w2_a is not part of the adapter"):
        peft.load(spoiled(folder, tmp_path / "1", r=4), params)
    with pytest.raises(ValueError, match=r"query\.lokr_w1 has shape \(3, 3\), not \(2, 2\)"):
        peft.load(spoiled(folder, tmp_path / "2", decompose_factor=2), params)
    with pytest.raises(ValueError, match="decompose_factor=0 is not -1 or at least 1"):
        peft.load(spoiled(folder, tmp_path / "3", decompose_factor=0), params)
    head = file_of(tmp_path / "head", "gpt2 untied", config=LOKR, r=1, target_modules=["lm_head"])
    with pytest.raises(
        ValueError, match=r"c_attn, which LoKr cannot adapt: PEFT's LoKr goes with Linear, not with Conv1D"
    ):
        peft.load(spoiled(head, tmp_path / "4", target_modules=["c_attn"]), base("gpt2").params)
    assert not caplog.text
    peft.load(spoiled(folder, tmp_path / "5", rank_dropout=0.1, module_dropout=0.2), params)
    assert "rank_dropout acts" in caplog.text and "module_dropout acts" in caplog.text


SITES = gpt2.sites(base("gpt2").model.config)
MLP = {"mlp_out": SITES["mlp_out"]}
BLOCKS = {"block_out": SITES["block_out"]}
UP = lj.ia3(lj.select("**/up/kernel"))
NO_FORM = {
    "adapters": (lj.adapter(MLP, rank=2), "@mlp_out/adapter changes activations: .*save_adapter"),
    "compacter": (
        lj.compacter(MLP, rank=4),
        "changes activations: PEFT has no form for adapters, Compacter or prefixes",
    ),
    "prefix layer": (lj.prefix_layer(BLOCKS, vocabulary=23, prefix=2), "@block_out/prefix_layer changes activations"),
    "prefix embedding": (
        lj.prefix_embedding(lj.select("wte/embedding"), prefix=2),
        "wte/embedding: PEFT has no form for a prefix's tokens like that here; .*save_adapter",
    ),
    "lora and adapters": (lj.chain(lj.lora(lj.select(QV), rank=2), lj.adapter(MLP, rank=2)), "changes activations"),
    "two kinds": (
        lj.chain(lj.lora(lj.select(QV), rank=2), UP),
        r"of one kind, but this method is LoRA \(h_0/attn/query/kernel\) and IA3 \(h_0/mlp/up/.*save_adapter",
    ),
    "rows beside ia3": (
        lj.chain(UP, token_rows(lj.select("wpe/embedding"), indices=[1])),
        "PEFT trains no rows of embeddings beside IA3",
    ),
    "shifts beside ia3": (
        lj.chain(UP, bias_delta(lj.select("**/down/bias"))),
        "PEFT trains no shifts of biases beside IA3",
    ),
    "biases beside ia3": (
        lj.chain(UP, lj.tune(lj.select("**/{attn,down,ln_1,ln_2,ln_f}/**/bias"))),
        "bias is tuned, but PEFT trains whole modules|PEFT trains no biases",
    ),
    "an embedding": (
        lj.ia3(lj.select("wpe/embedding")),
        "wpe/embedding is Embedding's weight, but PEFT's IA3 goes with Linear, Conv1D",
    ),
    "lokr of Conv1D": (
        lj.lokr(lj.select("**/up/kernel"), rank=1),
        "is Conv1D's weight, but PEFT's LoKr goes with Linear only",
    ),
    "vera of a part": (
        lj.vera(lj.select(QV), rank=2),
        r"PEFT has one d for transformer\.h\.0\.attn\.c_attn: make it with fused='\*\*/attn/{query,key,value}/kernel'",
    ),
    "vera in another order": (
        lj.vera(lj.select(QKV), rank=2, fused="**/attn/{key,query,value}/kernel"),
        r"PEFT has one d for transformer\.h\.0\.attn\.c_attn: make it with fused=",
    ),
}


@pytest.mark.parametrize("method, message", NO_FORM.values(), ids=NO_FORM)
def test_conformance_15_what_peft_has_no_form_for_is_said(method, message, tmp_path):
    params = base("gpt2").params
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "ours", method, trained(method, params), params=params)
    assert not list(tmp_path.iterdir())


def test_conformance_15_what_one_config_cannot_say_of_two_parts(tmp_path):
    params = base("bert").params
    parts = [lj.lokr(lj.select(f"h_{n}/mlp/*/kernel"), rank=1, decompose_factor=f) for n, f in ((0, 2), (1, 4))]
    method = lj.chain(*parts)
    with pytest.raises(ValueError, match="one decompose_both and one decompose_factor for all"):
        peft.save(tmp_path, method, trained(method, params), params=params)
    alone = lj.ia3(lj.select("**/key/kernel"))
    bare = alone._replace(apply=lambda p, d, **k: with_plain_biases(p, alone.apply(p, d, **k)))
    with pytest.raises(ValueError, match=r"h_0/attn/key/kernel: PEFT's IA3 scales .* each with its bias"):
        peft.save(tmp_path, bare, trained(alone, params), params=params)


def with_plain_biases(params, adapted):
    """The adapted params with the base's own biases of the keys."""
    layers = {name: layer for name, layer in adapted.items() if name.startswith("h_")}
    for name, layer in layers.items():
        key = layer["attn"]["key"] | {"bias": params[name]["attn"]["key"]["bias"]}
        adapted = adapted | {name: layer | {"attn": layer["attn"] | {"key": key}}}
    return adapted
