"""PEFT's DoRA and PiSSA read, written and read by PEFT again (conformance 13 and 14)."""

import copy

import jax
import numpy as np
import pytest

pytest.importorskip("peft")

import peft as their_peft
import torch
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.core import selection
from lora_jax.interop import peft
from lora_jax.methods.bias_delta import bias_delta
from lora_jax.models.layouts import to_scanned
from tests.helpers.peft_files import (
    CLS,
    LM,
    QV,
    WEIGHTS,
    config_of,
    names,
    out,
    spoiled,
    there_and_back,
    trained,
    without_peft,
)
from tests.helpers.peft_models import adapter, assert_close, base, ours, quietly, read_by_peft, theirs, written

DORA = {"use_dora": True}
C_ATTN = "transformer.h.{}.attn.c_attn"


# --- DoRA ---------------------------------------------------------------------------------------------------------

DORAS = {
    "a fused layer": ("gpt2", LM),
    "Conv1D of all shapes, a position table": (
        "gpt2",
        LM | {"target_modules": ["c_attn", "c_fc", "c_proj", "wpe"], "use_rslora": True, "lora_dropout": 0.2},
    ),
    "an untied embedding and head": ("gpt2 untied", LM | {"target_modules": ["wte", "lm_head"]}),
    "an encoder with its head": ("roberta", CLS | {"bias": "lora_only"}),
    "embeddings, patterns": (
        "bert",
        CLS
        | {
            "target_modules": ["word_embeddings", "key", "intermediate.dense"],
            "rank_pattern": {"key": 1},
            "alpha_pattern": {"layer.1.attention.self.key": -2},
        },
    ),
}


@pytest.mark.parametrize("kind, fields", DORAS.values(), ids=DORAS)
def test_conformance_13_dora(kind, fields, tmp_path):
    method, delta, again, want = there_and_back(kind, tmp_path, **fields | DORA)
    assert "dora" in str(method.spec) and not any("fixed" in name for name in names(again))
    assert_close(theirs(read_by_peft(kind, again)), want, 0.0)
    magnitudes = [name for name in names(again) if name.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == sum(name.endswith(("A.weight", "embedding_A")) for name in names(again)) > 1
    norms = {path: f["fixed_norm"] for path, f in delta.items() if "fixed_norm" in f}
    leaves = dict(selection.flatten(base(kind).params)[0])
    for path, norm in norms.items():
        np.testing.assert_allclose(norm, np.linalg.norm(np.asarray(leaves[path]), axis=0), rtol=1e-6)


def test_conformance_13_query_key_and_value_have_their_columns_of_the_magnitude(tmp_path):
    """A key without a change is scaled all the same, by m / ||W||."""
    made = adapter("gpt2", **LM | DORA)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data[12:24] = 0
    folder = written(made, tmp_path)
    params = base("gpt2").params
    method, delta = peft.load(folder, params)
    assert_close(ours("gpt2", method.apply(params, delta)), theirs(made))
    m = load_file(folder / WEIGHTS)[f"base_model.model.{C_ATTN.format(1)}.lora_magnitude_vector"]
    for n, part in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(delta[f"h_1/attn/{part}/kernel"]["m"], m[12 * n : 12 * n + 12])
    key = np.asarray(params["h_1"]["attn"]["key"]["kernel"])
    merged = lj.merge(method.apply(params, delta))["h_1"]["attn"]["key"]["kernel"]
    np.testing.assert_allclose(merged, key * m[12:24] / np.linalg.norm(key, axis=0), atol=1e-6)
    scanned = lj.merge(method.apply(to_scanned(params), to_scanned(delta)))
    np.testing.assert_allclose(scanned["h"]["attn"]["key"]["kernel"][1], merged, atol=1e-6)


@pytest.mark.parametrize(
    "options, rank",
    [
        ({"rank": 2, "alpha": 3}, 4),
        ({"rank": 2, "alpha": {"**/query/*": 1, "**": 3}}, 4),
        ({"rank": 2, "shared": QV}, 2),
    ],
)
def test_conformance_13_a_key_that_is_not_adapted_keeps_its_norm(options, rank, tmp_path):
    method = lj.dora(lj.select(QV, "h_0/mlp/up/kernel"), scale_rule="alpha/sqrt(r)", dropout=0.1, **options)
    params = base("gpt2").params
    config, tensors = out("gpt2", method, tmp_path, trained(method, params))
    ranks = {"r": rank, "rank_pattern": {"transformer.h.0.mlp.c_fc": 2} if rank == 4 else {}}
    assert config | ranks | DORA | {"lora_dropout": 0.1} == config
    there = read_by_peft("gpt2", tmp_path / "ours").merge_and_unload()
    for n in range(3):
        key = np.asarray(params[f"h_{n}"]["attn"]["key"]["kernel"])
        np.testing.assert_allclose(
            tensors[f"{C_ATTN.format(n)}.lora_magnitude_vector"][12:24], np.linalg.norm(key, axis=0), rtol=1e-6
        )
        merged = there.transformer.h[n].attn.c_attn.weight.detach().numpy()[:, 12:24]
        np.testing.assert_allclose(merged, key, atol=1e-6)


def test_conformance_13_what_is_read_is_written_without_what_load_remembers(tmp_path):
    folder = written(adapter("gpt2", **LM | DORA), tmp_path / "theirs")
    method, delta = peft.load(folder, base("gpt2").params)
    peft.save(tmp_path / "ours", without_peft(method), delta, params=base("gpt2").params)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    ignored = ("auto_mapping", "base_model_name_or_path", "peft_version")
    ours_and_theirs = [{k: v for k, v in config_of(f).items() if k not in ignored} for f in (tmp_path / "ours", folder)]
    assert ours_and_theirs[0] == ours_and_theirs[1]


def test_conformance_13_a_magnitude_that_is_missing_or_too_much_is_named(tmp_path):
    folder = written(adapter("gpt2", **LM | DORA), tmp_path / "theirs")
    params = base("gpt2").params
    name = f"base_model.model.{C_ATTN.format(2)}.lora_magnitude_vector"
    lacking = spoiled(folder, tmp_path / "1", lambda t: {n: x for n, x in t.items() if n != name})
    with pytest.raises(ValueError, match=rf"{name} is missing\. DoRA \(use_dora=true\) has"):
        peft.load(lacking, params)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.lora_magnitude_vector is not part.*LoRA has none"):
        peft.load(spoiled(folder, tmp_path / "2", use_dora=False), params)
    with pytest.raises(ValueError, match=rf"{name} has shape \(12,\), not \(36,\)"):
        peft.load(spoiled(folder, tmp_path / "3", lambda t: t | {name: t[name][:12].copy()}), params)
    with pytest.raises(ValueError, match="has entries that are not finite"):
        peft.load(spoiled(folder, tmp_path / "4", lambda t: t | {name: t[name] * np.float32(np.nan)}), params)
    for n, (fields, message) in enumerate(
        [
            ({"use_dora": "true"}, "use_dora='true' is not true or false"),
            ({"lora_bias": True}, "lora_bias does not go with use_dora"),
            ({"lora_alpha": -1e18}, "an alpha is -1e\\+18: float32 does not hold"),
            ({"init_lora_weights": "pissa"}, "DoRA of a changed base"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            peft.load(spoiled(folder, tmp_path / f"f{n}", **fields), params)


BESIDE = {
    "LoRA": (lj.lora(lj.select("**/up/kernel"), rank=1), r"DoRA is beside LoRA here"),
    "a shift": (bias_delta(lj.select("**/attn/{query,value}/bias")), "DoRA is beside shifts of biases"),
}


@pytest.mark.parametrize("other, message", BESIDE.values(), ids=BESIDE)
def test_conformance_13_what_peft_s_dora_does_not_go_with(other, message, tmp_path):
    method, params = lj.chain(lj.dora(lj.select(QV), rank=2), other), base("gpt2").params
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "ours", method, trained(method, params), params=params)


# --- PiSSA --------------------------------------------------------------------------------------------------------

PISSA = {"init_lora_weights": "pissa"}
PISSAS = {
    "a fused layer": ("gpt2", LM),
    "beside an embedding, which PEFT leaves whole": (
        "gpt2",
        LM | {"target_modules": ["c_attn", "c_fc", "mlp.c_proj", "wpe"], "use_rslora": True},
    ),
    "an encoder with its head": ("roberta", CLS | {"bias": "all"}),
    "patterns": (
        "bert",
        CLS
        | {
            "target_modules": ["key", "output.dense", "query"],
            "rank_pattern": {"key": 1},
            "alpha_pattern": {"layer.1.attention.self.key": 0.5},
        },
    ),
}


@pytest.mark.parametrize("kind, fields", PISSAS.values(), ids=PISSAS)
def test_conformance_14_pissa_on_the_original_base(kind, fields, tmp_path):
    method, delta, again, want = there_and_back(kind, tmp_path, **fields | PISSA)
    assert method.spec.get("of", [method.spec])[0]["method"] == "pissa"
    assert sorted(f for f in delta["h_1/attn/query/kernel"]) == ["a", "b", "fixed_a", "fixed_b"] or kind == "roberta"
    assert_close(theirs(read_by_peft(kind, again)), want, 0.0)


def test_conformance_14_what_is_taken_out_is_the_best_approximation_of_the_whole_layer(tmp_path):
    folder = written(adapter("gpt2", **LM | PISSA), tmp_path)
    params = base("gpt2").params
    _, delta = peft.load(folder, params)
    parts = [f"h_1/attn/{part}/kernel" for part in ("query", "key", "value")]
    kernel = np.concatenate([np.asarray(params["h_1"]["attn"][path.split("/")[2]]["kernel"]) for path in parts], 1)
    u, s, v = np.linalg.svd(kernel)
    taken = [7 / 3 * np.asarray(delta[path]["fixed_a"]) @ np.asarray(delta[path]["fixed_b"]) for path in parts]
    np.testing.assert_allclose(np.concatenate(taken, 1), u[:, :3] * s[:3] @ v[:3], atol=1e-5)


def stepped(kind, tmp_path, **fields):
    """PEFT's PiSSA after steps of A and B, its folder, and that of PEFT's own conversion to LoRA."""
    config = their_peft.LoraConfig(**fields | PISSA)
    made = quietly(their_peft.get_peft_model, copy.deepcopy(base(kind).torch), config)
    config.init_lora_weights = True  # as PEFT's guide has it
    quietly(made.save_pretrained, tmp_path / "initial")
    config.init_lora_weights = "pissa"
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    written(made, tmp_path / "theirs")
    initial = str(tmp_path / "initial")
    quietly(made.save_pretrained, tmp_path / "converted", path_initial_model_for_weight_conversion=initial)
    return made.eval(), tmp_path / "theirs", tmp_path / "converted"


@pytest.mark.parametrize("rslora", [False, True])
def test_conformance_14_as_lora_of_twice_the_rank_it_is_peft_s_own_conversion(rslora, tmp_path):
    """But for the signs of singular vectors, which are free, and 1e-4 where two singular values are near."""
    fields = LM | {"target_modules": ["c_fc", "mlp.c_proj"], "use_rslora": rslora}
    made, folder, converted = stepped("gpt2", tmp_path, **fields)
    params, want = base("gpt2").params, theirs(made)
    method, delta = peft.load(folder, params)
    assert_close(ours("gpt2", method.apply(params, delta)), want)
    config, tensors = out("gpt2", without_peft(method), tmp_path, delta)
    assert_close(theirs(read_by_peft("gpt2", tmp_path / "ours")), want)
    there = config_of(converted)
    for name in ("r", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern"):
        assert config[name] == there[name]
    assert (config["r"], config["init_lora_weights"]) == (6, True)
    assert config["lora_alpha"] == pytest.approx(there["lora_alpha"], rel=1e-6)
    for name, tensor in load_file(converted / WEIGHTS).items():
        got = tensors[name.removeprefix("base_model.model.")]
        axis = int("lora_B" in name)
        got, tensor = np.moveaxis(got, axis, 0), np.moveaxis(tensor, axis, 0)
        np.testing.assert_array_equal(got[:3], tensor[:3])
        np.testing.assert_allclose(np.abs(got[3:]), np.abs(tensor[3:]), rtol=0, atol=1e-4)
    read, lora = peft.load(converted, params)
    assert read.spec["method"] == "lora"
    assert_close(ours("gpt2", read.apply(params, lora)), want)


def test_conformance_14_pissa_of_our_own_is_lora_there(tmp_path):
    method = lj.pissa(lj.select(QV, "**/mlp/up/kernel"), rank=2, alpha={"**/query/*": 1, "**": 3})
    params = base("gpt2").params
    config, _ = out("gpt2", method, tmp_path, trained(method, params))
    assert (config["r"], config["init_lora_weights"], config["rank_pattern"]) == (
        8,
        True,
        {f"transformer.h.{n}.mlp.c_fc": 4 for n in range(3)},
    )
    fresh = method.init(jax.random.key(0), params)
    peft.save(tmp_path / "fresh", method, fresh, params=params)
    assert_close(theirs(read_by_peft("gpt2", tmp_path / "fresh")), theirs(base("gpt2").torch))


def test_conformance_14_a_fused_layer_trained_further_goes_back_while_it_has_one_a(tmp_path):
    folder = written(adapter("gpt2", **LM | PISSA), tmp_path / "theirs")
    params = base("gpt2").params
    method, delta = peft.load(folder, params)
    stepped = lj.Delta({path: f | {"b": f["b"] + 0.1} for path, f in delta.items()})
    peft.save(tmp_path / "one", method, stepped, params=params)
    assert config_of(tmp_path / "one") == config_of(folder)
    assert_close(theirs(read_by_peft("gpt2", tmp_path / "one")), ours("gpt2", method.apply(params, stepped)))
    key = "h_1/attn/key/kernel"
    apart = lj.Delta(stepped | {key: stepped[key] | {"a": stepped[key]["a"] * 2}})
    config, _ = out("gpt2", method, tmp_path, apart)
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 18, 42)


def test_conformance_14_what_is_refused(tmp_path, caplog):
    folder = written(adapter("gpt2", **LM | PISSA), tmp_path / "theirs")
    params = base("gpt2").params
    for n, (fields, message) in enumerate(
        [
            ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16' changes the base's weights on loading"),
            ({"init_lora_weights": "olora"}, "'olora' changes the base's weights on loading"),
            ({"lora_alpha": -1}, "PiSSA divides by alpha / r, but an alpha is -1"),
            ({"alpha_pattern": {"h.1.attn.c_attn": 0}}, "an alpha is 0"),
            ({"lora_bias": True}, "lora_bias goes with init_lora_weights true or false"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            peft.load(spoiled(folder, tmp_path / f"f{n}", **fields), params)
    wide = written(quietly(adapter, "roberta", r=5, target_modules=["out_proj"], **PISSA), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"out_proj\.lora_A\.weight has shape \(3, 12\), not \(5, 12\)"):
        peft.load(wide, base("roberta").params)
    assert not caplog.text
    peft.load(spoiled(folder, tmp_path / "dropout", lora_dropout=0.1), params)
    assert "PiSSA has no dropout here; its lora_dropout acts in PEFT's training only" in caplog.text
