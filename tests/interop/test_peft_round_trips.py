"""PEFT's adapters read, written and read by PEFT again; by the numbers of the list of conformance checks."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("peft")


import lora_jax as lj
from lora_jax.interop import hf, peft
from tests.helpers.peft_files import CLS, LM, config_of, names, there_and_back
from tests.helpers.peft_models import (
    TOKENS,
    adapter,
    assert_close,
    base,
    ours,
    read_by_peft,
    theirs,
    written,
)

BERT_HEAD = ["classifier.bias", "classifier.weight"]
ROBERTA_HEAD = [f"classifier.{layer}.{leaf}" for layer in ("dense", "out_proj") for leaf in ("bias", "weight")]


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_conformance_01_and_02_a_fused_attention_layer(fan_in_fan_out, tmp_path):
    fields = LM | {"fan_in_fan_out": fan_in_fan_out}
    method, delta, again, want = there_and_back("gpt2", tmp_path, **fields)
    assert delta["@shared/h_1/attn"]["a"].shape == (12, 3)
    assert delta["h_1/attn/value/kernel"]["b"].shape == (3, 12)
    assert method.spec["select"] == ["**/attn/{query,key,value}/kernel"]
    if fan_in_fan_out:  # else PEFT itself warns, of its own file too
        assert_close(theirs(read_by_peft("gpt2", again)), want, 0.0)


def test_conformance_03_roberta_with_its_head(tmp_path):
    method, _, again, want = there_and_back("roberta", tmp_path, **CLS)
    assert set(ROBERTA_HEAD) < set(names(again))
    assert config_of(again)["modules_to_save"] == ["classifier", "score"]
    assert [part["method"] for part in method.spec["of"]] == ["lora", "tune"]
    assert_close(theirs(read_by_peft("roberta", again)), want, 0.0)


def test_conformance_03_bert_with_its_head(tmp_path):
    _, delta, again, want = there_and_back("bert", tmp_path, **CLS)
    assert set(BERT_HEAD) < set(names(again))
    assert "value" in delta["classifier/kernel"]
    assert_close(theirs(read_by_peft("bert", again)), want, 0.0)


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("gpt2", LM | {"use_rslora": True}),
        ("gpt2", LM | {"lora_alpha": 0.75}),
        ("roberta", CLS | {"lora_alpha": -5, "use_rslora": True}),
        ("bert", {"r": 5, "lora_alpha": 2.5, "target_modules": ["key", "output.dense"]}),
    ],
)
def test_conformance_04_scales(kind, fields, tmp_path):
    there_and_back(kind, tmp_path, **fields)


PATTERNS = {
    "suffix": {"rank_pattern": {"mlp.c_proj": 2, "c_attn": 5}, "alpha_pattern": {"c_attn": 11}},
    "anchor": {"rank_pattern": {"^transformer.h.0.attn.c_attn": 1}, "alpha_pattern": {"^c_attn": 50}},
    "alternatives": {"rank_pattern": {"c_attn|c_fc": 4}, "alpha_pattern": {r"h\.[02]\.mlp.c_fc": 0.5}},
    "first match": {"rank_pattern": {"c_attn": 2, "transformer.h.1.attn.c_attn": 6}},
}


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_conformance_05_patterns(patterns, tmp_path):
    there_and_back("gpt2", tmp_path, **LM, target_modules=["c_attn", "c_fc", "mlp.c_proj"], **patterns)


def test_conformance_05_patterns_whose_order_counts_are_written_out(tmp_path):
    """PEFT sorts the keys on writing, so that another pattern comes first on reading; ours keeps the meaning."""
    folder = written(adapter("gpt2", **LM, alpha_pattern={"c_attn": 6}), tmp_path / "theirs")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"c_attn": 6, "attn.c_attn": 600}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    params = base("gpt2").params
    method, delta = peft.load(folder, params)
    assert method.spec["alpha"] == 6
    peft.save(tmp_path / "ours", method, delta, params=params)
    assert config_of(tmp_path / "ours")["alpha_pattern"] == {f"transformer.h.{n}.attn.c_attn": 6 for n in range(3)}
    want = ours("gpt2", method.apply(params, delta))
    assert_close(theirs(read_by_peft("gpt2", tmp_path / "ours")), want)


TARGETS = {
    "suffixes": ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"]}),
    "mlp and projection": ("gpt2", {"target_modules": ["c_proj", "c_fc"]}),
    "full paths": ("gpt2", {"target_modules": ["transformer.h.0.attn.c_attn", "h.2.mlp.c_fc"]}),
    "regex": ("gpt2", {"target_modules": r".*\.h\.[12]\..*c_attn"}),
    "all-linear": ("gpt2", {"target_modules": "all-linear"}),
    "all-linear of a classifier": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all-linear without a task": ("roberta", {"target_modules": "all-linear", "task_type": None, "r": 9}),
    "exclude": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "exclude_modules": ["h.1.attn.c_attn"]}),
    "layers": ("gpt2", {"layers_to_transform": [0, 2]}),
    "layers by pattern": ("gpt2 bare", {"layers_to_transform": 1, "layers_pattern": "h", "task_type": None}),
    "embeddings": ("bert", {"target_modules": ["word_embeddings", "token_type_embeddings", "key"], "task_type": None}),
    "a bare encoder": ("roberta bare", {"task_type": "FEATURE_EXTRACTION"}),
}


@pytest.mark.parametrize("kind, fields", TARGETS.values(), ids=TARGETS)
def test_conformance_06_targets(kind, fields, tmp_path):
    there_and_back(kind, tmp_path, **(LM | {"fan_in_fan_out": kind.startswith("gpt2")} | fields))


def test_conformance_08_a_fused_layer_is_three_kernels_that_share_an_a(tmp_path):
    method, delta, _, want = there_and_back("gpt2", tmp_path, **LM)
    params = base("gpt2").params
    alone = lj.lora(lj.select("**/attn/{query,key,value}/kernel"), rank=3, alpha=7)
    copied = lj.Delta(
        {
            path: {"a": delta["@shared/" + path.removesuffix("/kernel").rsplit("/", 1)[0]]["a"], **factors}
            for path, factors in delta.items()
            if not path.startswith("@")
        }
    )
    assert_close(ours("gpt2", alone.apply(params, copied)), want)
    assert lj.check(method, params).trained == 3 * (12 * 3 + 3 * 36) < lj.check(alone, params).trained


def test_conformance_09_an_embedding_is_adapted_in_its_look_up(tmp_path):
    there_and_back("gpt2 untied", tmp_path / "untied", **LM, target_modules=["wte", "wpe", "c_attn"])
    # A tied model, whose head PEFT leaves as it is: here untied on loading.
    made = adapter("gpt2", **LM, target_modules=["wte"])
    folder = written(made, tmp_path / "tied")
    model, params, _ = hf.load(base("gpt2").folder, tie=False)
    method, delta = peft.load(folder, params)
    got = lj.lift(model.apply, on_dense="error")({"params": method.apply(params, delta)}, TOKENS)
    assert_close(np.asarray(got), theirs(made))
    with pytest.raises(ValueError, match=r"look-up of transformer\.wte alone.*tie=False"):
        peft.load(folder, base("gpt2").params)


def test_conformance_10_a_head_that_comes_with_its_base(tmp_path):
    fields = LM | {"fan_in_fan_out": False, "target_modules": ["lm_head"]}
    method, delta, again, _ = there_and_back("gpt2 untied", tmp_path, **fields)
    assert "lm_head.base_layer.weight" in names(again)
    assert sorted(delta) == ["lm_head/kernel"] and method.spec["peft"]["copies"] == ["lm_head.base_layer.weight"]
    there_and_back("gpt2 untied", tmp_path / "both", **LM | {"target_modules": ["lm_head", "wte"]})
    params = base("gpt2 untied").params
    other = params | {"lm_head": {"kernel": params["lm_head"]["kernel"].at[0, 0].add(1.0)}}
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight is no copy of the base's lm_head/kernel"):
        peft.load(tmp_path / "theirs", other)
    tied = written(adapter("gpt2", **LM | {"target_modules": ["lm_head"]}), tmp_path / "tied")
    with pytest.raises(ValueError, match=r"head of lm_head alone.*tie=False"):
        peft.load(tied, base("gpt2").params)
    model, copied, _ = hf.load(base("gpt2").folder, tie=False)
    method, delta = peft.load(tied, copied)
    got = lj.lift(model.apply, on_dense="error")({"params": method.apply(copied, delta)}, TOKENS)
    assert_close(np.asarray(got), theirs(adapter("gpt2", **LM | {"target_modules": ["lm_head"]})))


BIASES = {
    "lora_only": ("gpt2", LM | {"bias": "lora_only"}),
    "all": ("gpt2", LM | {"bias": "all", "target_modules": ["c_attn", "mlp.c_proj"]}),
    "lora_bias": ("gpt2", LM | {"lora_bias": True, "alpha_pattern": {"h.1.attn.c_attn": 2}}),
    "lora_only with a head": ("roberta", CLS | {"bias": "lora_only"}),
    "all with a head": ("roberta", CLS | {"bias": "all"}),
    "all with a head of one layer": ("bert", CLS | {"bias": "all"}),
    "lora_bias with a head": ("bert", CLS | {"lora_bias": True, "use_rslora": True}),
}


@pytest.mark.parametrize("kind, fields", BIASES.values(), ids=BIASES)
def test_conformance_12_biases(kind, fields, tmp_path):
    _, delta, again, _ = there_and_back(kind, tmp_path, **fields)
    shifts = [path for path in delta if path.endswith("/bias") and "shift" in delta[path]]
    tuned = [path for path in delta if path.endswith("/bias") and "value" in delta[path]]
    assert bool(shifts) == fields.get("lora_bias", False)
    kernels = 3 if kind == "gpt2" else 2
    head = {"gpt2": 0, "roberta": 2, "bert": 1}[kind]
    every = {"gpt2": 3 * 8 + 1, "roberta": 3 * 8 + 1 + 2, "bert": 3 * 8 + 2 + 1}[kind]
    assert len(tuned) == {"none": head, "lora_only": 3 * kernels + head, "all": every}[fields.get("bias", "none")]
    if kind != "gpt2" and fields.get("bias") == "all":
        assert any(".original_module." in name for name in names(again))


def test_conformance_16_a_score_beside_gpt2(tmp_path):
    _, delta, again, want = there_and_back("gpt2 score", tmp_path, **LM | {"task_type": "SEQ_CLS"})
    assert delta["score/kernel"]["value"].shape == (12, 4)
    assert_close(theirs(read_by_peft("gpt2 score", again)), want, 0.0)
    with pytest.raises(ValueError, match=r'score\.weight is not part.*params \| \{"score"'):
        peft.load(again, base("gpt2").params)


TOKEN_ROWS = {"list": [7, 2], "by name": {"wte": [0, 22, 5]}, "positions": {"wpe": [1]}}


@pytest.mark.parametrize("indices", TOKEN_ROWS.values(), ids=TOKEN_ROWS)
def test_conformance_17_token_rows_and_the_tied_head(indices, tmp_path):
    _, delta, again, want = there_and_back("gpt2", tmp_path, **LM, trainable_token_indices=indices)
    assert [factors["rows"].shape[1] for factors in delta.values() if "rows" in factors] == [12]
    assert_close(theirs(read_by_peft("gpt2", again)), want, 0.0)


def test_conformance_17_on_encoders_and_untied_models(tmp_path):
    there_and_back("bert", tmp_path / "bert", **CLS, trainable_token_indices=[4, 9])
    there_and_back("gpt2 untied", tmp_path / "untied", **LM, trainable_token_indices=[4, 9])
    folder = written(adapter("gpt2", **LM, trainable_token_indices=[4]), tmp_path / "tied")
    _, copied, _ = hf.load(base("gpt2").folder, tie=False)
    with pytest.raises(ValueError, match="without tie=False"):
        peft.load(folder, copied)


def test_modules_to_save_of_any_kind(tmp_path):
    fields = LM | {"modules_to_save": ["ln_1", "wpe", "h.2.attn.c_attn", "h.1.mlp"]}
    _, delta, again, want = there_and_back("gpt2", tmp_path, **fields)
    assert "value" in delta["h_2/attn/key/kernel"] and "b" in delta["h_1/attn/key/kernel"]
    assert_close(theirs(read_by_peft("gpt2", again)), want, 0.0)
    there_and_back("bert", tmp_path / "bert", **CLS | {"modules_to_save": ["pooler", "LayerNorm"]})


def test_dropout_is_kept_and_acts_in_training_only(tmp_path):
    method, delta, _, _ = there_and_back("gpt2", tmp_path, **LM, lora_dropout=0.4)
    assert method.spec["dropout"] == 0.4
    params = base("gpt2").params
    dropped = ours("gpt2", method.apply(params, delta, key=jax.random.key(0)))
    assert np.abs(dropped - ours("gpt2", method.apply(params, delta))).max() > 0.01
