"""PEFT's adapters of Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3: read, written again, and read by PEFT; ours there.

Logits are compared with 1e-4 of the largest: both sum in float32, in other orders.
"""

import numpy as np
import pytest

pytest.importorskip("peft")

import peft as their_peft
import transformers

import lora_jax as lj
from lora_jax.interop import hf, peft
from lora_jax.methods.token_rows import token_rows
from tests.helpers.peft_files import WEIGHTS, filled, names, out, spoiled, there_and_back, trained, without_peft
from tests.helpers.peft_models import TOKENS, adapter, assert_close, base, ours, read_by_peft, theirs, written

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENDS = ["embed_tokens", "lm_head"]
LM = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7}
IA3, VERA, LOKR = (
    {"config": config, "task_type": "CAUSAL_LM"} | fields
    for config, fields in [
        (their_peft.IA3Config, {}),
        (their_peft.VeraConfig, {"r": 5}),
        (their_peft.LoKrConfig, {"r": 2, "alpha": 3}),
    ]
)
LLAMA, QWEN3, GEMMA3 = "llama: untied", "qwen3: untied", "gemma3, defaults: untied"
EVERYWHERE = {
    "all matrices": LM | {"target_modules": ALL, "use_rslora": True},
    "embedding and head": LM | {"target_modules": ["q_proj", *ENDS]},
    "embedding and head saved": LM | {"modules_to_save": [*ENDS, "norm"]},
    "dora": LM | {"target_modules": [*ALL, *ENDS], "use_dora": True},
    "ia3": IA3,
    "vera": VERA | {"target_modules": ALL},
    "lokr": LOKR | {"target_modules": ALL},
    "all-linear": LM | {"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj"]},
    "a regex": LM | {"target_modules": r".*layers\.[02]\.self_attn\.(q|k)_proj"},
    "layers": LM | {"layers_to_transform": [1]},
    "patterns": LM | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5}},
    "token rows": LM | {"trainable_token_indices": [3, 9]},
}
THERE_AND_BACK = {f"{kind}, {name}": (kind, EVERYWHERE[name]) for kind in (LLAMA, QWEN3, GEMMA3) for name in EVERYWHERE}
THERE_AND_BACK |= {
    f"{kind}, {name}": (kind, fields)
    for kind in ("mistral", "qwen2", "gemma2")
    for name, fields in {"lora": LM, "ia3": IA3}.items()
}
THERE_AND_BACK |= {
    f"{LLAMA}, embedding alone": (LLAMA, LM | {"target_modules": ["embed_tokens"]}),
    "llama, pissa": (LLAMA, LM | {"init_lora_weights": "pissa"}),
    "qwen2, its biases": ("qwen2", LM | {"bias": "lora_only"}),
    "qwen2, shifts": ("qwen2", LM | {"lora_bias": True}),
    "llama, all biases": ("llama, biases", LM | {"target_modules": ALL, "bias": "all"}),
    "llama, rows of a tied table": ("llama", LM | {"trainable_token_indices": [3, 9]}),
    "gemma3, rows of a tied table": ("gemma3, defaults", LM | {"trainable_token_indices": [3, 9]}),
    "a score": ("llama: score", LM | {"task_type": "SEQ_CLS"}),
    "a score, all-linear": ("llama: score", LM | {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "no head": ("llama: bare", LM | {"task_type": "FEATURE_EXTRACTION"}),
}
QUICK = (f"{LLAMA}, all matrices", f"{QWEN3}, patterns", f"{GEMMA3}, embedding and head", "qwen2, ia3", "a score")


def cases(named, quick):
    return [pytest.param(*named[name], id=name, marks=() if name in quick else pytest.mark.slow) for name in named]


@pytest.mark.parametrize("kind, fields", cases(THERE_AND_BACK, QUICK))
def test_there_and_back(kind, fields, tmp_path):
    """The same bytes, also from the method without what `load` remembers of the file, but for two kinds of files: a
    model without a head, which is one with a tied head here, and PiSSA, which becomes LoRA."""
    method, delta, again, want = there_and_back(kind, tmp_path, **fields)
    assert_close(theirs(read_by_peft(kind, again)), want, 0.0)
    if not kind.endswith("bare") and "init_lora_weights" not in fields:
        peft.save(tmp_path / "plain", without_peft(method), delta, params=base(kind).params)
        assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", ["llama", pytest.param("gemma3, defaults", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fields", [{"target_modules": [name]} for name in ENDS] + [{"modules_to_save": ["lm_head"]}])
def test_a_tied_table_is_adapted_in_one_use_alone(kind, fields, tmp_path):
    """As PEFT does: the model is untied on loading. Tied, it is an error."""
    made = adapter(kind, **LM | fields)
    folder = written(made, tmp_path)
    with pytest.raises(
        ValueError, match=r"changes the (look-up|head) of (model\.)?(embed_tokens|lm_head) alone.*tie=Fa"
    ):
        peft.load(folder, base(kind).params)
    model, params, _ = hf.load(base(kind).folder, tie=False)
    method, delta = peft.load(folder, params)
    got = lj.lift(model.apply, on_dense="error")({"params": method.apply(params, delta)}, TOKENS)
    assert np.abs(theirs(made) - theirs(base(kind).torch)).max() > 0.01
    assert_close(np.asarray(got), theirs(made), 1e-4)


def lora(*globs, **options):
    return lj.lora(lj.select(*globs), **{"rank": 2, "alpha": 3} | options)


KERNELS = "**/{attn,mlp}/*/kernel"
EXPORTED = {
    # kind, method, fields of the config
    "all matrices": (LLAMA, lora(KERNELS, scale_rule="alpha/sqrt(r)"), {"target_modules": sorted(ALL), "r": 2}),
    "embedding and head": (GEMMA3, lora("wte/embedding", "lm_head/kernel"), {"target_modules": ENDS}),
    "a score": (
        "llama: score",
        lj.chain(lora("**/query/kernel"), lj.tune(lj.select("score/kernel"))),
        {"task_type": "SEQ_CLS"},
    ),
    "norms": (
        QWEN3,
        lj.chain(lora("**/up/kernel"), lj.tune(lj.select("**/{query,key}_norm/scale"))),
        {"modules_to_save": ["k_norm", "q_norm"]},
    ),
    "biases": (
        "qwen2",
        lj.chain(lora("**/{query,value}/kernel"), lj.tune(lj.select("**/{query,value}/bias"))),
        {"bias": "lora_only"},
    ),
    "rows": (
        "gemma2",
        lj.chain(lora("h_1/attn/out/kernel"), token_rows(lj.select("wte/embedding"), indices=[4])),
        {"trainable_token_indices": [4]},
    ),
    "dora": ("mistral", lj.dora(lj.select("**/{key,gate}/kernel"), rank=2), {"use_dora": True}),
    "vera": (QWEN3, lj.vera(lj.select("**/{key,down}/kernel"), rank=6), {"target_modules": ["down_proj", "k_proj"]}),
    "ia3": (
        GEMMA3,
        lj.ia3(lj.select("**/{query,value,down}/kernel"), feedforward="**/down/*"),
        {"feedforward_modules": ["down_proj"]},
    ),
    "lokr": (LLAMA, lj.lokr(lj.select("**/{query,down}/kernel"), rank=2), {"peft_type": "LOKR"}),
}


@pytest.mark.parametrize("kind, method, fields", cases(EXPORTED, ("norms", "ia3")))
def test_ours_there(kind, method, fields, tmp_path):
    config, _ = out(kind, method, tmp_path, trained(method, base(kind).params))
    assert config | fields == config


@pytest.mark.parametrize(
    "kind, glob",
    [
        pytest.param("llama: untied", "{wte/embedding,lm_head/kernel,h_*/**/kernel}"),
        pytest.param("qwen3", KERNELS, marks=pytest.mark.slow),
        pytest.param("gemma3, defaults", KERNELS, marks=pytest.mark.slow),
        pytest.param("qwen2", KERNELS, marks=pytest.mark.slow),
    ],
)
def test_a_merged_model_is_the_same_in_transformers(kind, glob, tmp_path):
    params, method = base(kind).params, lora(glob)
    adapted = method.apply(params, filled(method, params))
    hf.save(tmp_path, base(kind).model, adapted, merge=True, like=base(kind).folder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert np.abs(theirs(merged) - theirs(base(kind).torch)).max() > 0.01
    assert_close(theirs(merged), ours(kind, adapted), 1e-4)


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without_layer(params):
    return {name: part for name, part in params.items() if name != "h_2"}


def test_what_cannot_be_read_is_said_with_names(tmp_path):
    folder, params = written(adapter(LLAMA, **LM), tmp_path / "llama"), base(LLAMA).params
    multimodal = spoiled(folder, tmp_path / "multimodal", renamed("model.layers", "model.language_model.layers"))
    with pytest.raises(ValueError, match=r"begin with 'model\.language_model\.', these params' with 'model\.'"):
        peft.load(multimodal, params)
    fused = spoiled(folder, tmp_path / "fused", renamed("v_proj", "qkv_proj"))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.v_proj\.lora_A\.weight is missing"):
        peft.load(fused, params)
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn.* is not part of the adapter.*this one has 2 layers"):
        peft.load(folder, without_layer(params))
    with pytest.raises(ValueError, match=r"begin with 'model\.', these params' with 'transformer\.'"):
        peft.load(folder, base("gpt2").params)
    other = written(adapter(QWEN3, **LM), tmp_path / "qwen3")
    with pytest.raises(ValueError, match=r"q_proj\.lora_B\.weight has shape \(72, 3\), not \(48, 3\).*of another size"):
        peft.load(other, params)
    for field, value in {"layer_replication": [[0, 2]], "ensure_weight_tying": True}.items():
        with pytest.raises(ValueError, match=f"{field}=.* is not supported here"):
            peft.load(spoiled(folder, tmp_path / field, **{field: value}), params)
    with pytest.raises(ValueError, match="'PREFIX_TUNING' is not supported: its vectors are past keys and values"):
        peft.load(spoiled(folder, tmp_path / "prefix", peft_type="PREFIX_TUNING"), params)


def test_a_base_s_name_is_for_peft_s_users(tmp_path):
    kind, method = "llama", lora("**/query/kernel")
    peft.save(tmp_path, method, filled(method, base(kind).params), params=base(kind).params, base="owner/name")
    assert their_peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "owner/name"
    read, delta = peft.load(tmp_path, base(kind).params)
    peft.save(tmp_path, read, delta, params=base(kind).params, base="owner/another")
    assert their_peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "owner/name"
    assert all("q_proj" in name for name in names(tmp_path))
