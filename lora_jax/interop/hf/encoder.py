"""RoBERTa's and BERT's names and config fields in Hugging Face folders."""

import dataclasses
import functools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from lora_jax.interop import lazy
from lora_jax.interop.folders import check_shapes
from lora_jax.interop.hf import families, heads
from lora_jax.interop.hf.families import Architecture, Format, Head, containers
from lora_jax.interop.lazy import Lazy
from lora_jax.models import shapes
from lora_jax.models.encoder import FAMILIES, HEADS, Encoder, EncoderConfig

_NAMES = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "token_types": "type_vocab_size",
    "eps": "layer_norm_eps",
    "activation": "hidden_act",
    "pad_id": "pad_token_id",
}
# What transformers' RobertaConfig and BertConfig say where a field is missing, in that order.
_BASE = dict(zip(_NAMES.values(), (50265, 512, 768, 12, 12, 3072, 2, 1e-12, "gelu", 1), strict=True))
_DEFAULTS = {"roberta": _BASE, "bert": _BASE | {"vocab_size": 30522, "pad_token_id": 0}}
# Fields that change the function, with the one value that this model computes. Dropout rates are not among them.
_FIXED: dict[str, Any] = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "quantization_config": None,
}

_ROBERTA_HEAD = {
    **containers("classifier classifier.dropout"),
    "classifier.dense": ("Linear", "classifier/dense"),
    "classifier.out_proj": ("Linear", "classifier/out"),
}
_BERT_HEAD = {**containers("dropout"), "classifier": ("Linear", "classifier")}
_NO_CLASSIFIER = 'The params have no such head: hf.load(folder, head="classification", labels=...) makes one'
ARCHITECTURE = Architecture(
    name="encoder",
    weight="embeddings/word/embedding",
    embedding="embeddings.word_embeddings",
    backbone={
        **containers("embeddings embeddings.dropout encoder"),
        "embeddings.word_embeddings": ("Embedding", "embeddings/word"),
        "embeddings.position_embeddings": ("Embedding", "embeddings/position"),
        "embeddings.token_type_embeddings": ("Embedding", "embeddings/token_type"),
        "embeddings.LayerNorm": ("LayerNorm", "embeddings/norm"),
    },
    layers=(
        "encoder.layer",
        {
            **containers("attention attention.self attention.self.dropout attention.output attention.output.dropout"),
            **containers("intermediate intermediate.intermediate_act_fn output output.dropout"),
            "attention.self.query": ("Linear", "attn/query"),
            "attention.self.key": ("Linear", "attn/key"),
            "attention.self.value": ("Linear", "attn/value"),
            "attention.output.dense": ("Linear", "attn/out"),
            "attention.output.LayerNorm": ("LayerNorm", "ln_1"),
            "intermediate.dense": ("Linear", "mlp/up"),
            "output.dense": ("Linear", "mlp/down"),
            "output.LayerNorm": ("LayerNorm", "ln_2"),
        },
    ),
    classifiers=(
        Head("roberta.", _ROBERTA_HEAD, "classifier/out/kernel", _NO_CLASSIFIER),
        Head("bert.", _BERT_HEAD, "classifier/kernel", _NO_CLASSIFIER),
    ),
    optional={"pooler/kernel": {**containers("pooler pooler.activation"), "pooler.dense": ("Linear", "pooler")}},
    lora_targets=("query", "value"),
    ia3_targets=("key", "value", "output.dense"),
    ia3_feedforward=("output.dense",),
)
_COUNTERS = re.compile(r"(\w+\.)?embeddings\.(position_ids|token_type_ids)")  # in older files
_TASKS = "Model ForSequenceClassification ForMaskedLM ForPreTraining ForCausalLM LMHeadModel".split()
_TASKS += ["ForNextSentencePrediction"]
# What a file of the pretrained model has for other tasks, and RoBERTa's pooler, which its classifier does without.
_UNUSED = re.compile(r"(lm_head|cls|pooler)\.")


def _from_hf(
    format: Format, fields: dict, tensors: dict[str, Lazy], source: str, options: families.HeadOptions
) -> tuple[Encoder, dict[str, Lazy]]:
    head, labels, tie, key, trained = options
    if tie is not None or head not in HEADS:
        raise ValueError(f"{source}: an encoder has one of the heads {HEADS} and nothing to tie, not {head=}, {tie=}")
    config = format.config_of(fields, source)
    tensors = families.rename(tensors, functools.partial(_bare_name, config.family), source)
    config = _with_head(config, tensors, fields, head, labels, source)
    leaves = shapes.of_params(Encoder(config))
    names = families.layouts(ARCHITECTURE, leaves)
    if unused := sorted(name for name in tensors.keys() - names.keys() if _UNUSED.match(name)):
        logging.info("%s: not used here: %s", source, ", ".join(unused))
        tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    new = {name for name in names.keys() - tensors.keys() if head and name.startswith(("classifier", "pooler"))}
    if any(name.startswith("classifier") for name in tensors):  # half a head is a damaged one
        new = {name for name in new if name.startswith("pooler")}
    expected = {name: layout.shape(leaves) for name, layout in names.items() if name not in new}
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected, source)
    flat: dict[str, Lazy] = {}
    for name, tensor in tensors.items():  # a head is there to be trained: it stays in float32
        flat |= names[name].split(dataclasses.replace(tensor, kept=name.startswith("classifier")))
    if new:
        if not trained:
            logging.warning("%s has no %s: made new, random ones", source, ", ".join(sorted(new)))
        one_layer = Encoder(dataclasses.replace(config, layers=1, vocab_size=1))  # none of the new ones is in a layer
        params = one_layer.init(jax.random.key(0) if key is None else key, jnp.zeros((1, 1), jnp.int32))["params"]
        initial = flatten_dict(params, sep="/")
        flat |= {path: lazy.of(initial[path], f"the new {path}") for name in new for path in names[name].paths}
    return Encoder(config), flat


def _fields_of(config: EncoderConfig) -> dict:
    names = {"roberta": "Roberta", "bert": "Bert"}
    fields = {
        "architectures": [names[config.family] + ("ForSequenceClassification" if config.head else "Model")],
        "model_type": config.family,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
    }
    if config.head:
        fields |= heads.fields_of(config.head, config.labels)
    return fields


def _config_of(fields: dict, source: str) -> EncoderConfig:
    fields = _DEFAULTS[fields["model_type"]] | fields
    return families.read_config(EncoderConfig, fields, _NAMES | {"family": "model_type"}, _FIXED, source)


def _bare_name(family: str, name: str) -> str:
    """Without the prefix of models with a head, and with LayerNorm's newer names."""
    newer = {"gamma": "weight", "beta": "bias"}
    return re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda old: newer[old[0]], name.removeprefix(f"{family}."))


def _with_head(
    config: EncoderConfig, tensors: dict[str, Lazy], fields: dict, head: str | None, labels: int | None, source: str
) -> EncoderConfig:
    """The config with the head asked for, or else the file's; takes a head of other labels out of the tensors."""
    weight = "classifier.out_proj.weight" if config.family == "roberta" else "classifier.weight"
    head, labels = heads.wanted(tensors, weight, fields, head, labels, source)
    if head is None:
        return dataclasses.replace(config, pooler="pooler.dense.weight" in tensors)
    return dataclasses.replace(config, head=head, labels=labels, pooler=config.family == "bert")


def _head_needs(config: EncoderConfig) -> dict[str, str]:
    """BERT classifies by its pooler, which a file of a masked language model lacks."""
    return {"pooler.dense.weight": "pooler/**"} if config.family == "bert" and config.head else {}


for _family in FAMILIES:
    families.register_format(
        _family,
        Format(
            ARCHITECTURE,
            _config_of,
            _fields_of,
            _COUNTERS,
            _from_hf,
            _head_needs,
            sizes={
                "hidden_size": ("hidden", "embeddings.word_embeddings.weight", 1),
                "max_position_embeddings": ("max_positions", "embeddings.position_embeddings.weight", 0),
                "type_vocab_size": ("token_types", "embeddings.token_type_embeddings.weight", 0),
                "intermediate_size": ("inner", "encoder.layer.0.intermediate.dense.weight", 0),
            },
            of_source=("hidden_dropout_prob", "attention_probs_dropout_prob"),
            tasks=_TASKS,
            other_head="head='classification', labels=... leaves it out for a new one",
        ),
    )
