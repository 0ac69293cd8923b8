"""PEFT adapters that are not read, and what is said of them (conformance 11, 13 to 15, 23, 25)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("peft")

from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.interop import hf, peft
from lora_jax.models.layouts import to_scanned
from tests.helpers.peft_models import adapter, base, written

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A0 = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return written(adapter("gpt2", task_type="CAUSAL_LM", r=2, lora_alpha=5), tmp_path_factory.mktemp("good"))


@pytest.fixture
def copy(good, tmp_path):
    """An adapter that a test may spoil."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


def edit(folder, remove=(), **fields):
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if name not in remove}))
    return folder


def spoil(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def load(folder, kind="gpt2"):
    return peft.load(folder, base(kind).params)


def test_what_zero_3_leaves(copy):
    spoil(copy, lambda tensors: {name: tensor.reshape(-1)[:0].copy() for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: tensors without entries: .*ZeRO-3.*zero_to_fp32"):
        load(copy)


KINDS = {
    "ADALORA": ": it scales by a rank that its file does not hold",
    "PREFIX_TUNING": ": its vectors are past keys and values of every layer",
    "PROMPT_TUNING": ": its vectors stand before the text's embeddings",
    "P_TUNING": ": its vectors stand before the text's embeddings",
    "LOHA": "; LORA, VERA, IA3, LOKR are read here",
    "OFT": "; LORA",
    "BOFT": "; LORA",
    "LILY": "; LORA",
    "ia3": "; LORA",
}


@pytest.mark.parametrize("kind, why", KINDS.items(), ids=KINDS)
def test_conformance_15_other_methods_are_refused_by_name_and_reason(copy, kind, why):
    message = "must be written 'IA3'" if kind == "ia3" else f"is not supported{why}"
    with pytest.raises(ValueError, match=f"{CONFIG}: peft_type '{kind}' {message}"):
        load(edit(copy, peft_type=kind))


FIELDS = {
    "conformance 11": ({"ensure_weight_tying": True}, "ensure_weight_tying=True is not supported"),
    "conformance 13": ({"use_dora": True}, "lora_magnitude_vector is missing.*use_dora=true"),
    "conformance 14": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base.*path_initial"),
    "pissa as PEFT does not write it": ({"init_lora_weights": "PiSSA"}, "changes the base"),
    "olora": ({"init_lora_weights": "OLoRA"}, "changes the base"),
    "loftq": ({"init_lora_weights": "loftq"}, "changes the base"),
    "corda": ({"init_lora_weights": "corda"}, "changes the base"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "changes the base"),
    "unknown init": ({"init_lora_weights": "mystery"}, "init_lora_weights='mystery' is none of"),
    "init of a wrong type": ({"init_lora_weights": None}, "init_lora_weights=None is not true, false or a name"),
    "qalora": ({"use_qalora": True}, "use_qalora=True"),
    "qalora's size": ({"qalora_group_size": 8}, "qalora_group_size=8"),
    "bdlora": ({"use_bdlora": {"x": 1}}, "use_bdlora"),
    "arrow": ({"arrow_config": {"top_k": 1}}, "arrow_config"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "velora": ({"velora_config": {"x": 1}}, "velora_config"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "monteclora": ({"monteclora_config": {"x": 1}}, "monteclora_config"),
    "lora_ga config": ({"lora_ga_config": {"x": 1}}, "lora_ga_config"),
    "megatron": ({"megatron_config": {"x": 1}}, "megatron_config"),
    "parameters": ({"target_parameters": ["attn.c_attn.weight"]}, "target_parameters"),
    "replication": ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
    "an unknown field": ({"new_trick": True}, "new_trick=True is not known here"),
    "lower case": ({"peft_type": "lora"}, "must be written 'LORA'"),
    "no type": ({"peft_type": None}, "peft_type is None"),
    "a string for a boolean": ({"use_rslora": "false"}, "use_rslora='false' is not true or false"),
    "a number for a boolean": ({"lora_bias": 0}, "lora_bias=0 is not true or false"),
    "rank as a string": ({"r": "2"}, "r='2' is not a whole number"),
    "rank as a float": ({"r": 2.0}, "r=2.0 is not a whole number"),
    "rank as a boolean": ({"r": True}, "r=True is not a whole number"),
    "no rank": ({"r": 0}, "r=0 is not a whole number from 1"),
    "alpha": ({"lora_alpha": "5"}, "lora_alpha='5' is not a finite number"),
    "an alpha beyond float32": ({"lora_alpha": 10**400}, "lora_alpha=.* is not a finite number"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout=1.0 is not a number from 0 to below 1"),
    "bias": ({"bias": "ALL"}, "bias='ALL' is not"),
    "task": ({"task_type": "causal_lm"}, "task_type='causal_lm' is not null or one of"),
    "targets": ({"target_modules": [["c_attn"]]}, "target_modules=.* is not a list of strings"),
    "saved": ({"modules_to_save": "wpe"}, "modules_to_save='wpe' is not a list"),
    "tokens": ({"trainable_token_indices": [1, -1]}, "trainable_token_indices"),
    "tokens beyond": (
        {"trainable_token_indices": [23]},
        r"trainable_token_indices=\[23\] of transformer.wte: .*beyond 23",
    ),
    "pattern of ranks": ({"rank_pattern": {"c_attn": 0}}, "rank_pattern"),
    "pattern of alphas": ({"alpha_pattern": {"c_attn": True}}, "alpha_pattern"),
    "layers with a regex": (
        {"target_modules": ".*c_attn", "layers_to_transform": [0]},
        "layers_to_transform goes with",
    ),
    "pattern alone": ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    "two biases": ({"lora_bias": True, "bias": "all"}, "two arrays for one bias"),
    "lora_bias and an init": ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias goes with init"),
    "no regex": ({"target_modules": "(c_attn"}, "no regular expression"),
    "no regex in a pattern": ({"rank_pattern": {"(c_attn": 2}}, "no regular expression"),
    "a regex that may run for ever": ({"target_modules": r"(\w|.)*!"}, "could run for ever"),
    "repeats in a row": ({"target_modules": ".*" * 8 + "!"}, r"could run for ever \(more than 100,000,000 steps"),
    "lazy repeats in a row": (
        {"exclude_modules": ".*?" * 8 + "!"},
        r"could run for ever \(more than 100,000,000 steps",
    ),
    "options in a row": ({"target_modules": ".?" * 40 + "!"}, r"could run for ever \(more than 100,000,000 steps"),
    "groups in a row": ({"rank_pattern": {"(?:.?)" * 40 + "!": 2}}, r"could run for ever \(more than 100,000,000"),
    "alternatives in a row": ({"modules_to_save": ["(.|.)" * 30 + "!"]}, r"could run for ever \(more than 100,000,000"),
    "a long regex": ({"target_modules": "c_attn|" * 1500}, r"could run for ever \(it has 10500 characters"),
    "a container": ({"target_modules": ["attn"]}, "means transformer.h.0.attn, which LoRA cannot adapt"),
    "a norm": ({"target_modules": ["ln_1"]}, "ln_1, which LoRA cannot adapt"),
    "nothing": ({"target_modules": ["q_proj"]}, "no module of this model is meant"),
    "all excluded": ({"exclude_modules": ["c_attn"]}, "no module of this model is meant"),
    "within each other": ({"modules_to_save": ["mlp", "c_fc"]}, "which has transformer.h.0.mlp.c_fc in it"),
}


@pytest.mark.parametrize("fields, message", FIELDS.values(), ids=FIELDS)
def test_conformance_23_fields_are_refused_by_name(copy, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(edit(copy, **fields))
    assert str(copy) in str(caught.value)


def test_what_says_nothing_is_accepted(copy, good):
    """Fields that a later or earlier version added and left empty; those that concern training only."""
    inert = {
        "later": None,
        "enable_lora": None,
        "merge_weights": False,
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2},
    }
    method, delta = load(edit(copy, **inert, base_model_name_or_path="x", inference_mode=False, peft_version="99"))
    want = load(good)[1]
    jax.tree.map(np.testing.assert_array_equal, delta, want)
    assert method.spec["peft"]["config"]["enable_lora"] is None
    optional = set(json.loads((good / CONFIG).read_text())) - {"peft_type", "r", "lora_alpha", "task_type"}
    again, delta = load(edit(copy, remove=[*optional, *inert]))  # the rest are PEFT's defaults: c_attn
    jax.tree.map(np.testing.assert_array_equal, delta, want)
    assert again.spec["alpha"] == 5


def test_json_that_can_be_read_in_two_ways_is_refused(copy):
    text = (copy / CONFIG).read_text()
    for spoiled in (
        text.replace('"r": 2', '"r": 2, "r": 4'),
        text.replace('"lora_alpha": 5', '"lora_alpha": NaN'),
        text.replace('"lora_alpha": 5', '"lora_alpha": 1e999'),
        "\ufeff" + text,
        "[" + text + "]",
        text[:-20],
        "",
        "[" * 100_000,
    ):
        (copy / CONFIG).write_text(spoiled)
        with pytest.raises(ValueError, match=CONFIG):
            load(copy)


def test_tensors_that_do_not_fit_are_named(copy, good):
    def again():
        return Path(shutil.copytree(good, copy, dirs_exist_ok=True))

    with pytest.raises(ValueError, match=rf"{A0} is missing"):
        load(spoil(copy, lambda t: {name: x for name, x in t.items() if name != A0}))
    with pytest.raises(ValueError, match=r"lora_C\.weight is not part of the adapter"):
        load(spoil(again(), lambda t: t | {A0.replace("_A", "_C"): t[A0]}))
    with pytest.raises(ValueError, match=r"has shape \(12, 2\), not \(2, 12\).*another size"):
        load(spoil(again(), lambda t: t | {A0: np.ascontiguousarray(t[A0].T)}))
    with pytest.raises(ValueError, match=rf"{A0} is float64"):
        load(spoil(again(), lambda t: t | {A0: t[A0].astype(np.float64)}))
    with pytest.raises(ValueError, match=rf"{A0} is int8"):
        load(spoil(again(), lambda t: t | {A0: t[A0].astype(np.int8)}))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"{A0} has entries that are not finite"):
            load(spoil(again(), lambda t, bad=bad: t | {A0: np.full_like(t[A0], bad)}))
    with pytest.raises(ValueError, match=r"is missing; .*PEFT's names begin with base_model\.model\."):
        load(spoil(again(), lambda t: {name.removeprefix("base_model.model."): x for name, x in t.items()}))
    with pytest.raises(ValueError, match=r"names begin with 'module\.transformer\.'"):
        load(spoil(again(), lambda t: {name.replace("model.tr", "model.module.tr"): x for name, x in t.items()}))
    with pytest.raises(ValueError, match=r"'' and 'transformer\.'"):
        load(spoil(again(), lambda t: {name.replace("transformer.h.0", "h.0"): x for name, x in t.items()}))


def test_adapters_of_other_bases_are_named(good, tmp_path):
    params = base("gpt2").params
    shorter = {name: leaf for name, leaf in params.items() if name != "h_2"}
    with pytest.raises(ValueError, match="base of another size: this one has 2 layers"):
        peft.load(good, shorter)
    wider = jax.tree.map(lambda leaf: jnp.zeros([2 * n for n in leaf.shape]), params)
    with pytest.raises(ValueError, match=r"c_attn\.lora_A\.weight has shape \(2, 12\), not \(2, 24\).*another size"):
        peft.load(good, wider)
    encoder = written(adapter("roberta", task_type="SEQ_CLS", r=2), tmp_path / "roberta")
    with pytest.raises(ValueError, match=r"begin with 'roberta\.', these params' with 'transformer\.'"):
        peft.load(encoder, params)
    with pytest.raises(ValueError, match=r"begin with 'roberta\.', these params' with 'bert\.'"):
        load(encoder, "bert")
    with pytest.raises(ValueError, match=r'classifier\.dense\.bias is not part.*head="classification"'):
        load(encoder, "roberta bare")
    with pytest.raises(ValueError, match="begin with 'transformer"):
        load(good, "bert")
    _, labels, _ = hf.load(base("roberta").folder, head="classification", labels=5)
    with pytest.raises(ValueError, match=r"classifier\.out_proj\.weight has shape \(3, 12\), not \(5, 12\)"):
        peft.load(encoder, labels)


def test_files_that_are_not_there(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(tmp_path / "nothing")
    named = tmp_path / "named"
    shutil.copytree(copy, named / "second")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing; its folders second have one"):
        load(named)
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin .*Pickles can run any code.*save_pretrained"):
        load(copy)
    (copy / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        load(copy)
    (copy / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing: it is no PEFT adapter"):
        load(copy)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_links_that_leave_the_folder_are_refused(copy, good, name):
    (copy / name).unlink()
    (copy / name).symlink_to(good / name)
    with pytest.raises(ValueError, match="outside its folder"):
        load(copy)


def test_a_cut_file_is_refused(copy):
    content = (copy / WEIGHTS).read_bytes()
    for end in (0, 7, 100, len(content) - 1):
        (copy / WEIGHTS).write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"{WEIGHTS} is cut off or damaged"):
            load(copy)


def test_params_that_do_not_do(good):
    params = base("gpt2").params
    with pytest.raises(ValueError, match="to_loop"):
        peft.load(good, to_scanned(params))
    method, delta = peft.load(good, params)
    with pytest.raises(TypeError, match="is adapted"):
        peft.load(good, method.apply(params, delta))
    lacking = {**params, "h_1": {name: leaf for name, leaf in params["h_1"].items() if name != "mlp"}}
    with pytest.raises(ValueError, match=r"params lack h_1/mlp/up/kernel"):
        peft.load(good, lacking)


def test_a_rank_above_the_smaller_side_is_a_warning(tmp_path, caplog):
    folder = written(adapter("roberta", r=5, target_modules=["out_proj", "query"], task_type=None), tmp_path / "theirs")
    method, delta = load(folder, "roberta")
    assert "classifier.out_proj has rank 5, more than min(in, out) = 3" in caplog.text
    assert method.spec["strict"] is False and delta["classifier/out/kernel"]["a"].shape == (12, 5)
    peft.save(tmp_path / "ours", method, delta, params=base("roberta").params)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_low_precision_files_are_float32_here_and_come_back(copy, dtype, tmp_path):
    spoil(copy, lambda t: {name: x.astype(dtype) for name, x in t.items()})
    content = (copy / WEIGHTS).read_bytes()
    method, delta = load(copy)
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {np.dtype("float32")}
    peft.save(tmp_path / "ours", method, delta, params=base("gpt2").params)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == content
    trained = jax.tree.map(lambda x: x + 1e-6, delta)
    peft.save(tmp_path / "trained", method, trained, params=base("gpt2").params)
    assert {x.dtype for x in load_file(tmp_path / "trained" / WEIGHTS).values()} == {np.dtype("float32")}


def test_a_file_of_mixed_dtypes_comes_back(copy, tmp_path):
    spoil(copy, lambda t: t | {A0: t[A0].astype(ml_dtypes.bfloat16)})
    content = (copy / WEIGHTS).read_bytes()
    method, delta = load(copy)
    assert method.spec["peft"]["dtypes"] == {A0.removeprefix("base_model.model."): "bfloat16"}
    peft.save(tmp_path / "ours", method, delta, params=base("gpt2").params)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == content


WRITES = """
import sys
import jax, jax.numpy as jnp
import lora_jax as lj
from lora_jax.interop import hf, peft
_, params, _ = hf.load(sys.argv[1])
lora = lj.lora(lj.select("**/{attn/out,mlp/up,query}/kernel"), rank={"h_1/**": 3, "**": 2})
method = lj.chain(lora, lj.tune(lj.select("**/ln_1/*", "wpe/embedding")))
delta = jax.tree.map(lambda x: x + 0.5, method.init(jax.random.key(0), params))
peft.save(sys.argv[2], method, delta, params=params)
"""


@pytest.mark.slow
def test_conformance_25_equal_bytes_whatever_the_hash_seed(tmp_path):
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", WRITES, str(base("gpt2").folder), str(tmp_path / seed)]
        subprocess.run(command, check=True, env=env, cwd=Path(lj.__file__).parents[1])
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert len(json.loads((tmp_path / "1" / CONFIG).read_text())["target_modules"]) == 3


def test_an_adapter_that_is_replaced_keeps_the_folder_s_other_files(copy):
    method, delta = load(copy)
    readme = (copy / "README.md").read_text()
    peft.save(copy, method, jax.tree.map(lambda x: 2 * x, delta), params=base("gpt2").params)
    _, doubled = load(copy)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), doubled, delta)
    assert (copy / "README.md").read_text() == readme
