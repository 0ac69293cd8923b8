"""The default configs of runs: what a config may say, with its default and its meaning.

    config = default_config("generation")
    config.base, config.data.path, config.lora.rank = "gpt2-medium", "data/e2e", 8

Training's own keys are those of `lora_jax.training.config`.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

from lora_jax.training.config import OptimizerConfig, TrainConfig, as_config_dict

QV = ("**/attn/{query,value}/kernel",)
ATTENTION_AND_MLP = ("attention_out", "mlp_out")
KINDS = ("generation", "classification")


def default_config(kind: str) -> ConfigDict:
    """The config of LoRA on query and value, with the paper's hyperparameters of its GPT-2 and RoBERTa runs.

    Args:
      kind: "generation" (texts from contexts, by a model that generates) or "classification" (a label a text, GLUE's).

    Returns: a config without `base`, `data.path` and, of a classification, `data.name`.
    """
    if kind not in KINDS:
        raise ValueError(f"no default config {kind!r}: one of {', '.join(KINDS)}")
    config = ConfigDict()
    config.base = ""  # a folder, or a name on the Hugging Face Hub
    config.method = "lora"  # or another with options below, several as "lora+tune", FILE.py:FUNCTION, or "none"
    config.data = ConfigDict()
    config.data.name = ""  # a task: of lora_jax.data.tasks, of lora_jax.data.glue, or registered (`register_task`)
    config.data.path = ""  # a folder of the files, or a name on the Hugging Face Hub
    config.sweep = sweep_options()
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    (_generation if kind == "generation" else _classification)(config)
    return config


def _generation(config: ConfigDict) -> None:
    # the authors' README has this seed; they report 3, decay all that trains, and do not clip
    optimizer = OptimizerConfig(warmup_steps=500, eps=1e-6)
    config.update(as_config_dict(TrainConfig(seed=110, epochs=5, label_smoothing=0.1, optimizer=optimizer)))
    config.update(method_options(rank=4, alpha=32.0, dropout=0.1, a_init="gaussian"))

    data = config.data
    data.name = "e2e"
    data.batch_size = 8
    data.length = 512  # longer examples ...
    data.long = "skip"  # ... are skipped and counted, or an "error"
    data.buckets = 8  # lengths, each compiled once: so many that 9 of 10 tokens computed are not padding

    config.model = model = ConfigDict()
    model.dtype = "float32"  # computes in; what trains is float32 always
    model.param_dtype = "float32"  # the base is kept in
    model.query_block = 0  # attention takes so many queries at a time, for long texts; 0: all
    model.scan_layers = False
    model.remat = False  # on a CPU together with scan_layers alone: in a loop XLA undoes it

    config.decode = decode = ConfigDict()  # how `evaluate` and `complete` write texts
    decode.num_beams = 10
    decode.length_penalty = 0.8
    decode.no_repeat_ngram_size = 4
    decode.max_new_tokens = 64
    decode.beam_rule = "lora_paper"


def _classification(config: ConfigDict) -> None:
    optimizer = OptimizerConfig(
        learning_rate=4e-4, warmup_ratio=0.06, weight_decay=0.1, decay=("matrices",), clip_norm=1.0
    )
    settings = TrainConfig(epochs=30, best="accuracy", log_every=50, max_to_keep=2, optimizer=optimizer)
    config.update(as_config_dict(settings))
    del config.label_smoothing  # of language models
    config.seeds = (0, 1, 2, 3, 4)  # a run each; () is one run, of `seed`
    config.update(method_options(rank=8, alpha=8.0))
    config.head = ("classifier/**",)  # trains besides
    config.warm_start = config_dict.placeholder(str)  # a workdir or an adapter that the delta starts from

    data = config.data
    data.path = "nyu-mll/glue"  # or a folder in the layout of glue_data
    data.batch_size = 16
    data.length = 512  # longer texts are cut
    data.buckets = 12  # lengths, each compiled once

    config.model = model = ConfigDict()
    model.dropout = 0.1
    model.attention_dropout = 0.1
    model.dtype = "float32"  # computes in; what trains is float32 always
    model.param_dtype = "float32"  # the base is kept in
    model.scan_layers = False
    model.remat = False


def method_options(**lora: Any) -> ConfigDict:
    """The options of every method, by its name; those given are LoRA's, and its relatives' too where they have them."""
    options = ConfigDict()
    shared = {"select": QV, "exclude": (), "rank": 4, "alpha": 4.0, "scale_rule": "alpha/r"} | {
        name: value for name, value in lora.items() if name in ("select", "rank", "alpha")
    }
    trained = {"dropout": 0.0, "a_init": "kaiming_uniform"}
    trained |= {name: value for name, value in lora.items() if name in trained}
    options.lora = ConfigDict(shared | trained)
    options.dora = ConfigDict(shared | trained)
    options.pissa = ConfigDict(shared)
    options.vera = ConfigDict({"select": shared["select"], "exclude": (), "rank": 256, "d_initial": 0.1})
    options.ia3 = ConfigDict(
        {
            "select": ("**/attn/{key,value}/kernel", "**/mlp/down/kernel"),
            "exclude": (),
            "feedforward": ("**/mlp/down/kernel",),  # scales the input there, as in the paper
        }
    )
    options.lokr = ConfigDict(
        {"select": shared["select"], "exclude": (), "rank": 8, "alpha": 8.0, "decompose_factor": -1}
    )
    options.tune = ConfigDict({"select": ("**",), "exclude": ()})
    # layers: of those that the model has, () is all; AdapterDrop leaves out the first ones
    options.adapter = ConfigDict(
        {"sites": ATTENTION_AND_MLP, "rank": 8, "activation": "gelu", "norm": False, "layers": ()}
    )
    options.compacter = ConfigDict({"sites": ATTENTION_AND_MLP, "rank": 64, "n": 4, "activation": "gelu", "layers": ()})
    # infix: tokens between context and completion, in generation alone
    options.prefix_embedding = ConfigDict(
        {"select": ("**/{wte,word}/embedding",), "exclude": (), "prefix": 64, "infix": 0}
    )
    options.prefix_layer = ConfigDict({"sites": ("block_out",), "prefix": 8, "infix": 0})
    return options


def sweep_options() -> ConfigDict:
    """Values that train at once, in one program, every combination a run: `--config.sweep.learning_rate=1e-4,2e-4`."""
    names = ("learning_rate", "weight_decay", "alpha", "rank", "seed")  # alpha and rank: of the method
    return ConfigDict({name: config_dict.placeholder(tuple) for name in names})
