"""RoBERTa's and BERT's names and config fields in Hugging Face folders."""

import dataclasses
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

from lora_jax.interop import lazy
from lora_jax.interop.folders import Recipe, check_fields, check_shapes
from lora_jax.interop.hf.architectures import (
    Architecture,
    Head,
    containers,
    modules_of,
    register_architecture,
    stored,
)
from lora_jax.interop.hf.formats import Format, register_format
from lora_jax.interop.lazy import Lazy
from lora_jax.models import shapes
from lora_jax.models.encoder import FAMILIES, HEADS, Encoder, EncoderConfig

# config.json's fields by ours, each with what transformers' RobertaConfig and BertConfig say where it is missing.
_FIELDS: dict[str, tuple[str, Any, Any]] = {
    "vocab_size": ("vocab_size", 50265, 30522),
    "max_positions": ("max_position_embeddings", 512, 512),
    "hidden": ("hidden_size", 768, 768),
    "layers": ("num_hidden_layers", 12, 12),
    "heads": ("num_attention_heads", 12, 12),
    "inner": ("intermediate_size", 3072, 3072),
    "token_types": ("type_vocab_size", 2, 2),
    "eps": ("layer_norm_eps", 1e-12, 1e-12),
    "activation": ("hidden_act", "gelu", "gelu"),
    "pad_id": ("pad_token_id", 1, 0),
}
# Fields that change the function, with the one value that this model computes. Dropout rates are not among them.
_FIXED: dict[str, Any] = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "quantization_config": None,
}

_LAYER = {
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
}
_ROBERTA_HEAD = {
    **containers("classifier classifier.dropout"),
    "classifier.dense": ("Linear", "classifier/dense"),
    "classifier.out_proj": ("Linear", "classifier/out"),
}
_BERT_HEAD = {**containers("dropout"), "classifier": ("Linear", "classifier")}
_POOLER = {**containers("pooler pooler.activation"), "pooler.dense": ("Linear", "pooler")}
_NO_CLASSIFIER = 'The params have no such head: hf.load(folder, head="classification", labels=...) makes one'
_CLASSIFIERS = {
    "roberta": Head("roberta.", _ROBERTA_HEAD, "classifier/out/kernel", _NO_CLASSIFIER),
    "bert": Head("bert.", _BERT_HEAD, "classifier/kernel", _NO_CLASSIFIER),
}
_OLDER = {"gamma": "weight", "beta": "bias"}
# What a file of the pretrained model has for other tasks, and RoBERTa's pooler, which its classifier does without.
_UNUSED = re.compile(r"(lm_head|cls|pooler)\.")


def from_hf(
    fields: dict,
    tensors: dict[str, Lazy],
    source: str,
    *,
    head: str | None,
    labels: int | None,
    tie: bool | None,
    key: Array | None,
) -> tuple[Encoder, dict[str, Lazy]]:
    """The model and `{path: parameter}` in the loop layout; the arguments are those of `hf.load`."""
    if tie is not None or head not in HEADS:
        raise ValueError(f"{source}: an encoder has one of the heads {HEADS} and nothing to tie, not {head=}, {tie=}")
    config = config_of(fields, source)
    tensors = _bare_names(tensors, config.family, source)
    config = _with_head(config, tensors, fields, head, labels, source)
    leaves = shapes.of_params(Encoder(config))
    names = stored(modules_of(ARCHITECTURE, leaves, head=_head(config)))
    if unused := sorted(name for name in tensors.keys() - names.keys() if _UNUSED.match(name)):
        logging.info("%s: not used here: %s", source, ", ".join(unused))
        tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    new = {name for name in names.keys() - tensors.keys() if head and name.startswith(("classifier", "pooler"))}
    if any(name.startswith("classifier") for name in tensors):  # half a head is a damaged one
        new = {name for name in new if name.startswith("pooler")}
    check_shapes(
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: layout.shape(leaves) for name, layout in names.items() if name not in new},
        source,
    )
    flat: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        flat |= names[name].parameters(_kept(name, tensor))
    if new:
        logging.warning("%s has no %s: made new, random ones", source, ", ".join(sorted(new)))
        paths = {path for name in new for path in names[name].paths}
        flat |= _new(config, paths, jax.random.key(0) if key is None else key)
    return Encoder(config), flat


def to_hf(model: Encoder) -> tuple[dict, dict[str, Recipe]]:
    """The fields of config.json, and how the tensors of transformers' model (with that head, or the bare one) are made
    of our parameters."""
    config = model.config
    leaves = shapes.of_params(Encoder(dataclasses.replace(config, scan_layers=False)))
    head = _head(config)
    modules = modules_of(ARCHITECTURE, leaves, head.prefix if head else "", head)
    tensors = {name: layout.recipe for name, layout in stored(modules).items()}
    classes = {"roberta": "Roberta", "bert": "Bert"}
    fields = {
        "architectures": [classes[config.family] + ("ForSequenceClassification" if config.head else "Model")],
        "model_type": config.family,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        **{theirs: getattr(config, ours) for ours, (theirs, *_) in _FIELDS.items()},
    }
    if config.head:
        ids = {f"LABEL_{i}": i for i in range(config.labels)}
        kind = "regression" if config.head == "regression" else "single_label_classification"
        fields |= {"label2id": ids, "id2label": {str(i): name for name, i in ids.items()}, "problem_type": kind}
    return fields, tensors


def _head_needs(config: EncoderConfig) -> dict[str, str]:
    """BERT classifies by its pooler, which a file of a masked language model lacks."""
    return {"pooler.dense.weight": "pooler/**"} if config.family == "bert" and config.head else {}


def config_of(fields: dict, source: str) -> EncoderConfig:
    """The model's shape by the fields of config.json."""
    check_fields(fields, _FIXED, source)
    family = fields["model_type"]
    defaults = FAMILIES.index(family)
    values = {ours: fields.get(theirs, default[defaults]) for ours, (theirs, *default) in _FIELDS.items()}
    for name, value in values.items():
        kind = type(_FIELDS[name][1])
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{source}: config.json has {_FIELDS[name][0]}={value!r}, not a {kind.__name__}")
    try:
        return EncoderConfig(family=family, **values)
    except ValueError as error:
        raise ValueError(f"{source}: config.json: {error}") from error


def _bare_names(tensors: dict[str, Lazy], family: str, source: str) -> dict[str, Lazy]:
    """Without the prefix of models with a head, and with LayerNorm's newer names."""
    bare: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(f"{family}.")
        short = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda old: _OLDER[old[0]], short)
        if short in bare:
            raise ValueError(f"{source}: {short} is there twice, under two names")
        bare[short] = tensor
    return bare


def _with_head(
    config: EncoderConfig,
    tensors: dict[str, Lazy],
    fields: dict,
    head: str | None,
    labels: int | None,
    source: str,
) -> EncoderConfig:
    """The config with the head asked for, or else the file's; takes a head of other labels out of the tensors."""
    stored = tensors.get("classifier.out_proj.weight" if config.family == "roberta" else "classifier.weight")
    in_file = stored.shape[0] if stored is not None and stored.shape else None
    if head is None:
        if labels is not None:
            raise ValueError(f"{source}: labels={labels} goes with head='classification'")
        if in_file:
            regression = in_file == 1 or fields.get("problem_type") == "regression"
            head = "regression" if regression else "classification"
    if head is None:
        return dataclasses.replace(config, pooler="pooler.dense.weight" in tensors)
    labels = labels or (1 if head == "regression" else in_file)
    if labels is None:
        raise ValueError(f"{source} has no head: say how many classes the new one has, labels=")
    if in_file not in (None, labels):
        logging.warning("%s has a head of %d labels, not of %d: it is not used", source, in_file, labels)
        for name in [name for name in tensors if name.startswith("classifier.")]:
            del tensors[name]
    return dataclasses.replace(config, head=head, labels=labels, pooler=config.family == "bert")


def _kept(name: str, tensor: Lazy) -> Lazy:
    """A head is there to be trained: it stays in float32 in a model of another type."""
    return dataclasses.replace(tensor, kept=True) if name.startswith("classifier") else tensor


def _new(config: EncoderConfig, paths: set[str], key: Array) -> dict[str, Lazy]:
    """New parameters of these paths, which are none of a layer's."""
    params = Encoder(dataclasses.replace(config, layers=1, vocab_size=1)).init(key, jnp.zeros((1, 1), jnp.int32))
    flat = flatten_dict(params["params"], sep="/")
    return {path: lazy.of(leaf, f"the new {path}") for path, leaf in flat.items() if path in paths}


def _head(config: EncoderConfig) -> Head | None:
    return _CLASSIFIERS[config.family] if config.head else None


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
    layers=("encoder.layer", _LAYER),
    classifiers=tuple(_CLASSIFIERS.values()),
    optional={"pooler/kernel": _POOLER},
    lora_targets=("query", "value"),
    ia3_targets=("key", "value", "output.dense"),
    ia3_feedforward=("output.dense",),
)
_COUNTERS = re.compile(r"(\w+\.)?embeddings\.(position_ids|token_type_ids)")  # in older files
register_architecture(ARCHITECTURE)
for _family in FAMILIES:
    register_format(_family, Format(config_of, from_hf, to_hf, ignored=_COUNTERS, head_needs=_head_needs))
