"""The torch modules of each family of Hugging Face models, and the parameters here that hold their weights.

PEFT matches the names of modules, containers and dropouts among them, so an architecture lists all of them. A family
from outside is registered in the same way as ours:

    register_architecture(Architecture("llama", "h_0/mlp/gate/kernel", ...))
"""

from collections.abc import Mapping
from typing import NamedTuple

# Module name -> (torch's class, its subtree in our parameters); both "" for a module without weights of its own. The
# parts of a fused layer are in braces: "attn/{query,key,value}".
Modules = Mapping[str, tuple[str, str]]


class Head(NamedTuple):
    """What a model with a head has besides its backbone.

    Attributes:
      prefix: what stands before the names of the backbone's modules, such as "transformer.".
      modules: those of the head.
      weight: the path of a parameter that only a model with this head has.
      hint: how to get such parameters, for the message where a file has a head that they lack.
    """

    prefix: str
    modules: Modules
    weight: str
    hint: str = ""


class Architecture(NamedTuple):
    """One family of Hugging Face models.

    Attributes:
      name: of the family, for messages.
      weight: the path of a parameter that only this family has, by which its parameters are recognized.
      embedding: the module of the token embedding.
      backbone: the modules outside the layers, but for the layers' list.
      layers: the name of the layers' list, and the modules of one layer, whose subtrees are those within `h_0`, ...
      lm_head: the language model's head, of one module; None for a family without. The parameters may lack its weight,
        which is the token embedding then.
      classifiers: the other heads.
      optional: modules of the backbone that some models lack: the path of a weight -> the modules.
      lora_targets, ia3_targets, ia3_feedforward: PEFT's defaults for target_modules (those of LoRA serve most kinds)
        and for IA3's feedforward_modules.
    """

    name: str
    weight: str
    embedding: str
    backbone: Modules
    layers: tuple[str, Modules]
    lm_head: Head | None = None
    classifiers: tuple[Head, ...] = ()
    optional: Mapping[str, Modules] = {}
    lora_targets: tuple[str, ...] = ()
    ia3_targets: tuple[str, ...] = ()
    ia3_feedforward: tuple[str, ...] = ()


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Makes a family known by its name, in place of an earlier one of that name; later ones are recognized first."""
    ARCHITECTURES.pop(architecture.name, None)
    ARCHITECTURES[architecture.name] = architecture


def _containers(names: str) -> Modules:
    """Modules without weights of their own."""
    return dict.fromkeys(names.split(), ("", ""))


_GPT2_LAYER = {
    **_containers("attn attn.attn_dropout attn.resid_dropout mlp mlp.act mlp.dropout"),
    "ln_1": ("LayerNorm", "ln_1"),
    "attn.c_attn": ("Conv1D", "attn/{query,key,value}"),
    "attn.c_proj": ("Conv1D", "attn/out"),
    "ln_2": ("LayerNorm", "ln_2"),
    "mlp.c_fc": ("Conv1D", "mlp/up"),
    "mlp.c_proj": ("Conv1D", "mlp/down"),
}
_ENCODER_LAYER = {
    **_containers("attention attention.self attention.self.dropout attention.output attention.output.dropout"),
    **_containers("intermediate intermediate.intermediate_act_fn output output.dropout"),
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
    **_containers("classifier classifier.dropout"),
    "classifier.dense": ("Linear", "classifier/dense"),
    "classifier.out_proj": ("Linear", "classifier/out"),
}
_BERT_HEAD = {**_containers("dropout"), "classifier": ("Linear", "classifier")}
_POOLER = {**_containers("pooler pooler.activation"), "pooler.dense": ("Linear", "pooler")}
_NO_CLASSIFIER = 'The params have no such head: hf.load(folder, head="classification", labels=...) makes one'
_NO_SCORE = 'A GPT-2 has no head "score" here: give params | {"score": {"kernel": zeros (width, labels)}}'

register_architecture(
    Architecture(
        name="gpt2",
        weight="wte/embedding",
        embedding="wte",
        backbone={
            **_containers("drop"),
            "wte": ("Embedding", "wte"),
            "wpe": ("Embedding", "wpe"),
            "ln_f": ("LayerNorm", "ln_f"),
        },
        layers=("h", _GPT2_LAYER),
        lm_head=Head("transformer.", {"lm_head": ("Linear", "lm_head")}, "lm_head/kernel"),
        classifiers=(Head("transformer.", {"score": ("Linear", "score")}, "score/kernel", _NO_SCORE),),
        lora_targets=("c_attn",),
        ia3_targets=("c_attn", "mlp.c_proj"),
        ia3_feedforward=("mlp.c_proj",),
    )
)
register_architecture(
    Architecture(
        name="encoder",
        weight="embeddings/word/embedding",
        embedding="embeddings.word_embeddings",
        backbone={
            **_containers("embeddings embeddings.dropout encoder"),
            "embeddings.word_embeddings": ("Embedding", "embeddings/word"),
            "embeddings.position_embeddings": ("Embedding", "embeddings/position"),
            "embeddings.token_type_embeddings": ("Embedding", "embeddings/token_type"),
            "embeddings.LayerNorm": ("LayerNorm", "embeddings/norm"),
        },
        layers=("encoder.layer", _ENCODER_LAYER),
        classifiers=(
            Head("roberta.", _ROBERTA_HEAD, "classifier/out/kernel", _NO_CLASSIFIER),
            Head("bert.", _BERT_HEAD, "classifier/kernel", _NO_CLASSIFIER),
        ),
        optional={"pooler/kernel": _POOLER},
        lora_targets=("query", "value"),
        ia3_targets=("key", "value", "output.dense"),
        ia3_feedforward=("output.dense",),
    )
)
