"""The default configs of runs: what a config may say, with its default and its meaning.

    config = default_config("generation")
    config.base, config.data.path, config.lora.rank = "gpt2-medium", "data/e2e", 8

Training's own keys are those of `lora_jax.training.config`.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

from lora_jax.generation.beam_rules import RULES
from lora_jax.methods.ranges import COUNT, FINITE, PROBABILITY, Range
from lora_jax.runs import methods
from lora_jax.training.config import SEED, OptimizerConfig, TrainConfig, as_config_dict

ATTENTION_AND_MLP_KERNELS = ("**/{attn,mlp}/*/kernel",)
QV = ("**/attn/{query,value}/kernel",)
ATTENTION_AND_MLP = ("attention_out", "mlp_out")
_FROM_0 = Range(least=0, whole=True)
# The numbers of a config besides training's and the methods' own.
NUMBERS = {
    **{f"data.{name}": COUNT for name in ("length", "batch_size", "buckets")},
    **{f"mesh.{name}": COUNT for name in ("data", "fsdp", "tensor")},
    **{f"decode.{name}": COUNT for name in ("num_beams", "max_new_tokens")},
    **{"decode.length_penalty": FINITE, "decode.no_repeat_ngram_size": _FROM_0},
    **{"model.dropout": PROBABILITY, "model.attention_dropout": PROBABILITY, "model.query_block": _FROM_0},
    **{f"model.{name}": COUNT for name in ("n_embd", "n_layer", "n_head", "n_positions")},  # of one that is pretrained
    "vocab_size": COUNT,
}
BASE_BITS = (None, "4", "8", "file")
DTYPES = ("float32", "bfloat16", "float16")
SWEPT = ("learning_rate", "weight_decay", "alpha", "rank", "seed")  # alpha and rank: of the method


def default_config(kind: str) -> ConfigDict:
    """The config of LoRA on query and value, with the paper's hyperparameters of its GPT-2 and RoBERTa runs.

    Args:
      kind: "generation" (texts from contexts, by a model that generates), "classification" (a label a text, GLUE's) or
        "chat" (the answers of conversations; LoRA on all matrices, with the hyperparameters that most have for it).

    Returns:
      A config whose `base`, data and, of a classification, `data.name` are not set yet.

    >>> config = default_config("generation")
    >>> config.base, config.lora.rank = "gpt2-medium", 8
    >>> config.optimizer.learning_rate, config.epochs
    (0.0002, 5)
    """
    kinds = {"generation": _generation, "classification": _classification, "chat": _chat}
    if kind not in kinds:
        raise ValueError(f"no default config {kind!r}: one of {', '.join(kinds)}")
    config = ConfigDict()
    config.base = ""  # a folder, or a name on the Hugging Face Hub
    config.method = "lora"  # or another with options below, several as "lora+tune", FILE.py:FUNCTION, or "none"
    config.data = ConfigDict()
    config.data.name = ""  # a task: of lora_jax.data.tasks, of lora_jax.data.glue, or registered (`register_task`)
    config.data.path = ""  # a folder of the files, or a name on the Hugging Face Hub
    config.data.length = 512  # tokens: longer examples are skipped (see `long`), longer texts to classify cut
    config.model = ConfigDict()
    config.model.dtype = "float32"  # computes in; what trains is float32 always
    config.model.param_dtype = "float32"  # the base is kept in
    # The base's matrices in 4 or 8 bits, "4" (nf4) or "8" (int8), or as a GGUF file has them, "file"; the tables of
    # embeddings, the head, norms and biases stay in param_dtype. None: all of it does.
    config.model.base_bits = config_dict.placeholder(str)
    config.model.scan_layers = False
    config.model.remat = False  # on a CPU together with scan_layers alone: in a loop XLA undoes it
    # Values that train at once, in one program, every combination a run: `--config.sweep.learning_rate=1e-4,2e-4`.
    config.sweep = ConfigDict({name: config_dict.placeholder(tuple) for name in SWEPT})
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    kinds[kind](config)
    return config


def _generation(config: ConfigDict) -> None:
    # the authors' README has this seed; they report 3, decay all that trains, and do not clip
    optimizer = OptimizerConfig(warmup_steps=500, eps=1e-6)
    config.update(as_config_dict(TrainConfig(seed=110, epochs=5, label_smoothing=0.1, optimizer=optimizer)))
    config.update(_method_options(rank=4, alpha=32.0, dropout=0.1, a_init="gaussian"))
    config.data.name = "e2e"
    config.data.batch_size = 8
    config.data.long = "skip"  # examples longer than `length` are skipped and counted, or an "error"
    config.data.buckets = 8  # lengths, each compiled once: so many that 9 of 10 tokens computed are not padding
    config.model.query_block = 0  # attention takes so many queries at a time, for long texts; 0: all
    decode = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4}  # how texts are written
    config.decode = ConfigDict(decode | {"max_new_tokens": 64, "beam_rule": "lora_paper"})


def _chat(config: ConfigDict) -> None:
    optimizer = OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_ratio=0.03, clip_norm=1.0)
    config.update(as_config_dict(TrainConfig(epochs=3, log_every=10, optimizer=optimizer)))
    config.update(_method_options(rank=16, alpha=32.0))
    config.lora.select = config.dora.select = config.pissa.select = ATTENTION_AND_MLP_KERNELS
    config.data.name = "chat"
    config.data.train = ""  # a file of JSON lines (docs/how_to/instruct.md), or in its place the folder `data.path`
    config.data.valid = ""  # another; "": one of twenty conversations of `data.train` is held out
    config.data.template = ""  # a file of Jinja, its text, or "plain"; "": the template of the base
    config.data.length = 1024  # tokens: longer conversations are skipped, see `long`
    config.data.long = "skip"  # and counted, or an "error"
    config.data.packing = True  # several conversations in a row of `length`; else batches are bucketed:
    config.data.buckets = 8  # lengths, each compiled once
    config.data.batch_size = 8
    config.model.query_block = 0  # attention takes so many queries at a time, for long texts; 0: all
    decode = {"num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0}  # how answers are written
    config.decode = ConfigDict(decode | {"max_new_tokens": 256, "beam_rule": "hf"})


def _classification(config: ConfigDict) -> None:
    optimizer = OptimizerConfig(
        learning_rate=4e-4, warmup_ratio=0.06, weight_decay=0.1, decay=("matrices",), clip_norm=1.0
    )
    settings = TrainConfig(epochs=30, best="accuracy", log_every=50, max_to_keep=2, optimizer=optimizer)
    config.update(as_config_dict(settings))
    del config.label_smoothing  # of language models
    config.seeds = (0, 1, 2, 3, 4)  # a run each; () is one run, of `seed`
    config.update(_method_options(rank=8, alpha=8.0))
    config.head = ("classifier/**",)  # trains besides
    config.warm_start = config_dict.placeholder(str)  # a workdir or an adapter that the delta starts from
    config.data.path = "nyu-mll/glue"  # or a folder in the layout of glue_data
    config.data.batch_size = 16
    config.data.buckets = 12  # lengths, each compiled once
    config.model.dropout = 0.1
    config.model.attention_dropout = 0.1


def _method_options(
    rank: int, alpha: float, dropout: float = 0.0, a_init: str = "kaiming_uniform"
) -> dict[str, dict[str, Any]]:
    """The options of every method, by its name; those given are LoRA's, and its relatives' too where they have them."""
    weights = {"select": QV, "exclude": ()}
    low_rank = weights | {"rank": rank, "alpha": alpha, "scale_rule": "alpha/r"}
    lora = low_rank | {"dropout": dropout, "a_init": a_init}
    down = ("**/mlp/down/kernel",)
    # layers: of those that the model has, () is all; AdapterDrop leaves out the first ones
    sites = {"sites": ATTENTION_AND_MLP, "activation": "gelu", "layers": ()}
    options: dict[str, dict[str, Any]] = {
        "lora": lora,
        "dora": lora,
        "pissa": low_rank,
        "vera": weights | {"rank": 256, "d_initial": 0.1},
        # feedforward: scales the input there, as in the paper
        "ia3": weights | {"select": ("**/attn/{key,value}/kernel", *down), "feedforward": down},
        "lokr": weights | {"rank": 8, "alpha": 8.0, "decompose_factor": -1},
        "tune": weights | {"select": ("**",)},
        "adapter": sites | {"rank": 8, "norm": False},
        "compacter": sites | {"rank": 64, "n": 4},
        # infix: tokens between context and completion, in generation alone
        # select: () is the token embedding, as the model's family names it
        "prefix_embedding": weights | {"select": (), "prefix": 64, "infix": 0},
        "prefix_layer": {"sites": ("block_out",), "prefix": 8, "infix": 0},
    }
    for name in [name for name, part in options.items() if "select" in part]:
        options[name] = options[name] | {"ndim": config_dict.placeholder(int)}  # 2: of the leaves the matrices alone
    return options


def check(config: ConfigDict) -> None:
    """A ValueError that names a config's numbers which are out of their range; of a run, one of several seeds, or a
    member of a sweep, before anything is written."""
    need_config(config)
    settings, problems = TrainConfig.of(config), []
    values = {name: (numbers, _value(config, name)) for name, numbers in NUMBERS.items()}
    values |= {f"seeds[{n}]": (SEED, seed) for n, seed in enumerate(config.get("seeds") or ())}
    for name, (numbers, value) in values.items():
        try:
            if value is not None:
                numbers(name, value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    size, parts = _value(config, "data.batch_size"), settings.accumulate
    if size is not None and size % parts:
        raise ValueError(f"accumulate={parts} must divide data.batch_size={size}")
    if (bits := _value(config, "model.base_bits")) not in BASE_BITS:
        raise ValueError(f"model.base_bits={bits!r}: choose {', '.join(map(repr, BASE_BITS[1:]))}, or leave it out")
    for name, choices in (("model.dtype", DTYPES), ("model.param_dtype", DTYPES), ("decode.beam_rule", RULES)):
        if (value := _value(config, name)) not in (None, *choices):
            raise ValueError(f"{name}={value!r}: choose {', '.join(choices)}")
    methods.check(config)


def check_run(config: ConfigDict) -> None:
    """As `check`, of a run, or of one of several seeds; a ValueError for a sweep."""
    need_config(config)
    if is_sweep(config):
        raise ValueError("the config has values to sweep: runs.sweep trains them")
    check(config)


def need_config(config: Any) -> None:
    """A TypeError for what is no config."""
    if not isinstance(config, ConfigDict):
        ours = "runs.default_config(...), or get_config() of a config file"
        raise TypeError(f"the first argument must be a config, {ours}; got {config!r:.60}")


def _value(config: ConfigDict, name: str) -> Any:
    """What a config has at "group.name"; None where it has nothing there."""
    group, _, key = name.rpartition(".")
    return ((config.get(group) or {}) if group else config).get(key)


def is_sweep(config: ConfigDict) -> bool:
    """Whether a config has values to sweep.

    >>> config = default_config("generation")
    >>> config.sweep.rank = (4, 8)
    >>> is_sweep(config)
    True
    """
    return any((config.get("sweep") or {}).values())
