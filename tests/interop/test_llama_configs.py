"""config.json of Llama, Mistral, Qwen and Gemma: transformers' defaults; what is not supported is refused by name."""

import dataclasses
from typing import Any

import pytest

from lora_jax.interop.hf.families import format_of
from lora_jax.models.llama import FAMILIES

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}
CLASSES |= {"gemma3_text": "Gemma3Text"}
# Fields that do not say which function the parameters compute, or act in training alone.
HARMLESS = """architectures attention_dropout bos_token_id chunk_size_feed_forward dtype id2label initializer_range
    label2id model_type output_attentions output_hidden_states pad_token_id problem_type return_dict
    transformers_version use_cache _name_or_path is_encoder_decoder max_window_layers default_theta
    _sliding_window_pattern""".split()
READ = """attention_bias attn_logit_softcapping eos_token_id final_logit_softcapping head_dim hidden_act
    hidden_activation hidden_size intermediate_size layer_types max_position_embeddings mlp_bias num_attention_heads
    num_hidden_layers num_key_value_heads pretraining_tp query_pre_attn_scalar rms_norm_eps rope_parameters
    sliding_window tie_word_embeddings use_bidirectional_attention use_sliding_window vocab_size""".split()


def config_of(family: str, **fields: Any) -> Any:
    config = format_of(family, "x").config_of({"model_type": family, "eos_token_id": 1, **fields}, "x")
    return dataclasses.replace(config, key_value_heads=config.kv_heads, head_size=config.size)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_transformers(family):
    transformers = pytest.importorskip("transformers")
    fields = getattr(transformers, f"{CLASSES[family]}Config")(eos_token_id=1).to_dict()
    assert config_of(family) == config_of(family, **fields)
    assert not set(fields) - {*HARMLESS, *READ}, (
        "transformers has a field that is neither read nor known to be harmless"
    )


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2; only 1"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("llama", {"hidden_act": "relu2"}, "relu2"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "lacks factor of rope_type 'linear'"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor='2', not a float"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2, "long_factor": [1]}}, "long_factor"),
        ("llama", {"rope_parameters": [1]}, r"rope parameters \[1\], not an object"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks original_max_position"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ("llama", {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 4}, "no multiple of"),
        ("llama", {"num_attention_heads": 7, "hidden_size": 48}, "hidden 48 is no multiple of heads 7"),
        ("llama", {"head_dim": 7}, "even number"),
        ("llama", {"head_dim": 0}, "head_size=0"),
        ("llama", {"num_key_value_heads": -1}, "key_value_heads=-1"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("llama", {"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
        ("qwen3", {"layer_types": "sliding_attention"}, "layer_types="),
        ("gemma2", {"layer_types": ["chunked_attention"] * 26}, "layer_types="),
        ("gemma2", {"layer_types": ["sliding_attention"] * 25}, "local names 25 of 26"),
        ("gemma2", {"sliding_window": None, "layer_types": ["sliding_attention"] * 26}, "window None"),
        ("qwen2", {"eos_token_id": None}, "eos_token_id=None; give it one id"),
        ("gemma2", {"attn_logit_softcapping": -3.0}, "score_cap=-3.0"),
        ("llama", {"eos_token_id": "2"}, "eos_token_id='2'; give it one id"),
        ("llama", {"rms_norm_eps": -1.0}, "eps=-1.0: at least 0"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(family, fields, says):
    with pytest.raises(ValueError, match=says) as caught:
        config_of(family, **fields)
    assert str(caught.value).startswith("x: ")


def test_older_forms_of_config_json():
    assert config_of("llama", eos_token_id=[7, 8]).eos_token_id == 7
    old = config_of("llama", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4})
    assert old.rotary == config_of("llama", rope_parameters=_linear(5e5)).rotary and old.rotary.factor == 4.0
    assert config_of("gemma3_text", rope_local_base_freq=3e3).local_rotary.rope_theta == 3e3
    assert config_of("gemma3_text", sliding_window_pattern=2).local[:4] == (True, False, True, False)
    window = config_of("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=30)
    assert (window.window, window.local) == (9, (False,) * 30 + (True,) * 2)
    assert config_of("qwen2", sliding_window=9).window is None


def _linear(theta: float) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": 4.0, "rope_theta": theta}
