"""Which modules a config means, and which tensors its adapter has: against PEFT itself (conformance 4 to 6)."""

import copy
import json
import re

import numpy as np
import pytest

peft = pytest.importorskip("peft")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.utils import constants  # noqa: E402
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper  # noqa: E402

import lora_jax as lj  # noqa: E402
from lora_jax.interop import peft as peft_here  # noqa: E402
from lora_jax.interop.peft import config as peft_config  # noqa: E402
from lora_jax.interop.peft.kinds.lora import LORA  # noqa: E402
from lora_jax.interop.peft.modules import model_of, resolve  # noqa: E402
from lora_jax.interop.peft.tensors import PREFIX, tensors_of  # noqa: E402
from tests.helpers import peft_models  # noqa: E402
from tests.helpers.peft_models import adapter, assert_close, base, ours, quietly, theirs, written  # noqa: E402

KINDS = ["gpt2 untied", "gpt2 bare", "gpt2 score", "roberta", "roberta bare", "bert", "bert bare"]
LLAMAS = ["llama", "llama: bare", "llama: score", "llama, biases", "mistral: untied", "qwen2", "qwen3", "qwen3, biases"]
LLAMAS += ["gemma2", "gemma3, defaults"]
NAMES = {
    "gpt2": "c_attn c_proj attn.c_proj mlp.c_proj c_fc wte wpe lm_head score ln_1 attn proj h.1.mlp.c_fc "
    "transformer.h.0.attn.c_attn h.2.attn.c_attn transformer.wte c.attn transformer.h.1 act",
    "bert": "query value key dense output.dense attention.output.dense intermediate.dense classifier pooler "
    "word_embeddings classifier.dense out_proj attention LayerNorm ery bert.encoder.layer.0.attention.self.query "
    "encoder.layer.2.attention.self.value roberta.encoder.layer.1.output.dense pooler.dense",
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj self_attn.q_proj mlp.down_proj embed_tokens "
    "lm_head score norm input_layernorm post_attention_layernorm self_attn proj layers.1.mlp.up_proj q_norm "
    "model.layers.0.self_attn.q_proj layers.2.self_attn.k_proj model.embed_tokens model.layers.1 act_fn rotary_emb",
}
REGEXES = {
    "gpt2": [
        r".*c_attn",
        "c_proj",
        r".*\.h\.[12]\..*(c_attn|c_proj)",
        r"(transformer\.)?h\.0\.attn\.c_attn",
        r".*h\.1.*",
    ],
    "llama": [
        r".*(q|v)_proj",
        "q_proj",
        r".*layers\.[12]\..*(up|down)_proj",
        r"(model\.)?layers\.0\.self_attn\.k_proj",
        r".*(embed_tokens|lm_head)",
    ],
    "bert": [r".*(query|value)", "dense", r".*\.layer\.[12]\..*\.(key|dense)", r"(?!roberta).*query", r".*layer\.1.*"],
}
PATTERNS = {
    "gpt2": ["c_attn", "^transformer.h.0.attn.c_attn", "attn", r"h\.1\..*", "attn.c_proj|c_fc", "mlp.c_proj", "score"],
    "llama": [
        "q_proj",
        "^model.layers.0.self_attn.q_proj",
        "self_attn",
        r"layers\.1\..*",
        "up_proj|down_proj",
        "score",
    ],
    "bert": [
        "query",
        "^bert.encoder.layer.0.attention.self.query",
        r"layer\.1\..*",
        "query|value",
        "dense",
        "output.dense",
    ],
}


def torch_model(kind):
    return peft_models.base(kind).torch


def model(kind):
    prefix = "" if kind.endswith("bare") else None
    return model_of(peft_models.base(kind).params, prefix, kind.endswith("score"), "params")


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", *LLAMAS])
def test_the_modules_are_those_of_transformers(kind):
    classes = re.compile("(Linear|Conv1D|LayerNorm)|.*?(RMSNorm)|(?:.*Word)?(Embedding)")
    class_names = {name: type(module).__name__ for name, module in torch_model(kind).named_modules() if name}
    matches = {name: classes.fullmatch(class_name) for name, class_name in class_names.items()}
    want = {name: match[match.lastindex] if match else "" for name, match in matches.items()}
    assert {name: module.torch_class for name, module in model(kind).modules.items()} == want
    biased = {name for name, module in torch_model(kind).named_modules() if getattr(module, "bias", None) is not None}
    assert {name for name, module in model(kind).modules.items() if module.bias} == biased


@pytest.mark.parametrize("kind", LLAMAS)
def test_parameters_are_recognized_and_have_the_targets_that_peft_gives_their_model(kind):
    """A Mistral's parameters are a Llama's; PEFT's defaults for the two are the same."""
    theirs, architecture = torch_model(kind).config.model_type, model(kind).architecture
    assert architecture.name == theirs.replace("mistral", "llama")
    for kind_of_adapter in ("LORA", "VERA", "LOKR"):
        assert set(architecture.lora_targets) == defaults(kind_of_adapter)[theirs]
    assert set(architecture.ia3_targets) == defaults("IA3")[theirs]
    assert set(architecture.ia3_feedforward) == defaults("IA3", "FEEDFORWARD")[theirs]


def defaults(kind_of_adapter, what="TARGET"):
    """PEFT's default modules by the model's type."""
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{kind_of_adapter}_{what}_MODULES_MAPPING")
    return {model_type: set(names) for model_type, names in table.items()}


@st.composite
def configs(draw, family):
    """A config of names that fit often enough, and not always."""
    names = st.sampled_from(NAMES[family].split())
    listed = st.lists(names, min_size=1, max_size=3, unique=True)
    targets = draw(
        st.one_of(st.none(), listed, listed, listed, st.sampled_from([*REGEXES[family], "all-linear", "All-Linear"]))
    )
    fields = {
        "target_modules": targets,
        "exclude_modules": draw(st.one_of(st.none(), st.none(), listed, st.sampled_from(REGEXES[family]))),
        "modules_to_save": draw(st.one_of(st.none(), st.none(), st.lists(names, max_size=2, unique=True))),
        "task_type": draw(st.sampled_from([None, "SEQ_CLS", "CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION"])),
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.sampled_from([8, -3, 0.5, 0])),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "none", "lora_only", "all"])),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(PATTERNS[family]), st.integers(1, 6), max_size=3)),
        "alpha_pattern": draw(
            st.dictionaries(st.sampled_from(PATTERNS[family]), st.sampled_from([1, 2.5, 30]), max_size=3)
        ),
    }
    if draw(st.integers(0, 2)) == 0:
        fields["layers_to_transform"] = draw(st.sampled_from([[0], [1, 2], 2, [], [7]]))
        patterns = [None, None, "layers"] if family == "llama" else [None, None, "h", ["layer"], ["h", "layer"], ""]
        fields["layers_pattern"] = draw(st.sampled_from(patterns))
    if draw(st.integers(0, 5)) == 0:
        fields["lora_bias"] = True
    if draw(st.integers(0, 5)) == 0:
        indices = [[3, 1], {"wte": [2]}, {"word_embeddings": [5, 6]}]
        fields["trainable_token_indices"] = draw(
            st.sampled_from([[3, 1], {"embed_tokens": [2]}] if family == "llama" else indices)
        )
    return fields


def decided_by_peft(kind, fields):
    """Adapted modules, saved ones, and tensors with shapes, or None where PEFT refuses."""
    try:
        config = quietly(peft.LoraConfig, **copy.deepcopy(fields))
        # The class that a task brings only adds these, but asks the model for what a tiny bare one has not.
        config.modules_to_save = [*(config.modules_to_save or []), *peft_config.TASK_HEADS.get(fields["task_type"], [])]
        made = quietly(peft.PeftModel, copy.deepcopy(torch_model(kind)), config)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    named = {name.removeprefix(PREFIX): module for name, module in made.named_modules()}
    adapted = {
        name: (module.r["default"], module.lora_alpha["default"], module.scaling["default"])
        for name, module in named.items()
        if isinstance(module, LoraLayer)
    }
    saved = {name for name, module in named.items() if isinstance(module, ModulesToSaveWrapper)}
    tokens = {name for name, module in named.items() if isinstance(module, TrainableTokensWrapper)}
    state = quietly(peft.get_peft_model_state_dict, made)
    return adapted, saved, tokens, {name.removeprefix(PREFIX): tuple(x.shape) for name, x in state.items()}


def decided_here(kind, fields):
    complete = peft_config.complete(json.loads(json.dumps({"peft_type": "LORA", **fields})), LORA, "config")
    resolved = resolve(complete, model(kind), "config", LORA)
    return resolved, tensors_of(resolved)


def compare(kind, fields):
    want = decided_by_peft(kind, fields)
    try:
        resolved, tensors = decided_here(kind, fields)
    except ValueError as error:
        refused_here = ("unsupported", "has no bias that could take it")
        assert want is None or any(text in str(error) for text in refused_here), (str(error), want)
        return
    assert want is not None, "PEFT refuses"
    adapted, saved, tokens, state = want
    power = 0.5 if resolved.fields["use_rslora"] else 1
    assert {name: (r, alpha, alpha / r**power) for name, (r, alpha) in resolved.adapted.items()} == adapted
    assert {name for name in saved if model(kind).below(name)} == set(resolved.saved)
    assert set(resolved.tokens) == tokens
    assert {tensor.name for tensor in tensors if not tensor.copy} <= set(state)
    assert state == {tensor.name: tensor.shape for tensor in tensors if tensor.name in state}


@settings(max_examples=80)
@given(st.data())
@pytest.mark.parametrize("family", ["gpt2", "bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_conformance_06_any_config_means_what_it_means_to_peft(family, data):
    kinds = [kind for kind in KINDS if kind.startswith("gpt2") == (family == "gpt2")]
    if family == "llama":
        kinds = ["llama: untied", "llama: bare", "llama: score", "qwen2: untied", "gemma3, defaults: untied"]
    compare(data.draw(st.sampled_from(kinds)), data.draw(configs(family)))


SAID = {
    # what random configs seldom say: (base, config, a module that is adapted)
    "all-linear, no task: the head too": ("bert", {"target_modules": "all-linear"}, "classifier"),
    "all-linear, no task: a score too": ("gpt2 score", {"target_modules": "all-linear"}, "score"),
    "all-linear, another task": (
        "bert",
        {"target_modules": "all-linear", "task_type": "TOKEN_CLS"},
        "bert.pooler.dense",
    ),
    "a regex excludes whole names": (
        "gpt2 untied",
        {"target_modules": ["c_attn"], "exclude_modules": r"transformer\.h\.1"},
        "transformer.h.1.attn.c_attn",
    ),
}


@pytest.mark.parametrize("kind, fields, there", SAID.values(), ids=SAID)
def test_conformance_06_a_config_means_what_it_means_to_peft(kind, fields, there):
    fields = {"task_type": None, "r": 2, "lora_alpha": 3, "use_rslora": False} | fields
    assert there in decided_here(kind, fields)[0].adapted
    compare(kind, fields)


@pytest.mark.parametrize(
    "fields, tensors",
    [
        ({"target_modules": ["wte"], "trainable_token_indices": [3]}, "lora_embedding_B and .*trainable_tokens_delta"),
        ({"modules_to_save": ["wte"], "trainable_token_indices": [3]}, "weight and .*trainable_tokens_delta"),
    ],
)
def test_conformance_06_two_tensors_for_one_weight_are_refused(fields, tensors):
    fields = {"target_modules": ["c_attn"], "task_type": None, "use_rslora": False} | fields
    with pytest.raises(ValueError, match=f"config: .*wte.{tensors} both change wte/embedding: unsupported"):
        decided_here("gpt2 untied", fields)


EMBEDDINGS = {
    "a score": ("gpt2 score", {"task_type": "SEQ_CLS", "target_modules": ["wte", "c_attn"]}),
    "a score, the look-up saved": ("gpt2 score", {"task_type": "SEQ_CLS", "modules_to_save": ["wte"]}),
    "no head": ("gpt2 bare", {"task_type": "FEATURE_EXTRACTION", "target_modules": ["wte"]}),
}


@pytest.mark.parametrize("kind, fields", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_conformance_09_an_embedding_without_a_language_model_s_head_is_tied_to_nothing(kind, fields, tmp_path):
    made = adapter(kind, r=3, lora_alpha=7, fan_in_fan_out=fields.get("target_modules") != ["wte"], **fields)
    folder = written(made, tmp_path / "theirs")
    params, want = base(kind).params, theirs(made)
    assert np.abs(want - theirs(base(kind).torch)).max() > 0.01
    method, delta = peft_here.load(folder, params)
    assert set(delta["wte/embedding"]) == ({"value"} if "modules_to_save" in fields else {"a", "b"})
    assert_close(ours(kind, method.apply(params, delta)), want)
    assert_close(ours(kind, lj.merge(method.apply(params, delta))), want)
    peft_here.save(tmp_path / "ours", method, delta, params=params)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "ours" / weights).read_bytes() == (folder / weights).read_bytes()
