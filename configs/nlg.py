"""What configs/e2e.py, webnlg.py and dart.py share: GPT-2 with LoRA or fine-tuned (Hu et al. 2021, Tables 3 and 11).

Not a config of its own. A name is a size and, after a comma, what trains (LoRA on query and value without it):

    small | medium | large            the GPT-2 of that size (any other with --config.base=FOLDER)
    medium,lora                       LoRA on query and value, r = 4
    medium,lora_all                   LoRA on all attention and MLP matrices
    medium,full                       full fine-tuning
    medium,top2                       fine-tuning of the last two layers (FT-Top2), of the size's GPT-2
    medium,bitfit                     all biases
    medium,adapter_l                  Lin et al.'s adapters, of the paper's smaller size; adapter_l_big: of the larger
    medium,adapter_h                  Houlsby et al.'s
    medium,prefix_layer               PreLayer (in Table 14 "Prefix"); prefix_embedding: PreEmbed
    medium,frozen                     nothing: the base is evaluated

and every other name in configs/methods.py: adapter_p compacter lora_pe lora_pl lora_bitfit rslora lora_plus dora pissa
vera ia3 lokr.

Where the authors' scripts differ from the paper: factors A start Kaiming-uniform in loralib
(`--config.lora.a_init=kaiming_uniform`), Gaussian in the paper and their first GPT-2 code, as here.
They cut examples at 512 tokens, here longer ones are skipped and counted; they pad every example
to 512, here batches are bucketed by length, each example once an epoch. They give a command for
GPT-2 medium on E2E only.

The paper's rows of full fine-tuning and FT-Top2 on E2E are quoted from Li & Liang (2021,
prefix-tuning), whose rate of 5e-5 they have here, on all three data sets.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from configs import methods

SIZES = {"small": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large"}
LAYERS = {"small": 12, "medium": 24, "large": 36}
Changes = dict[str, Any]

# The sizes of Tables 3, 13 and 14, solved for from the numbers of parameters, which is all that the paper prints; for
# small, which it has not, so that they are near LoRA's.
SIZED = {
    "adapter_l": ("adapter.rank", {"small": 6, "medium": 6, "large": 8}),
    "adapter_l_big": ("adapter.rank", {"small": 224, "medium": 224, "large": 248}),
    "adapter_h": ("adapter.rank", {"small": 4, "medium": 112, "large": 112}),
    "prefix_layer": ("prefix_layer.prefix", {"small": 16, "medium": 14, "large": 16}),
}


def variants(size: str) -> dict[str, Changes]:
    """What each name after the comma changes in the config of LoRA on query and value."""
    last = LAYERS[size]
    sized = {name: methods.METHODS[name.removesuffix("_big")] | {key: of[size]} for name, (key, of) in SIZED.items()}
    return (
        methods.METHODS
        | sized
        | {
            "full": {"method": "tune", "optimizer.learning_rate": 5e-5},
            "top2": {
                "method": "tune",
                "tune.select": (f"**/h_{{{last - 2},{last - 1}}}/**",),
                "optimizer.learning_rate": 5e-5,
            },
            "frozen": {"method": "none"},
        }
    )


def make(name: str, task: Changes, more: Mapping[str, Changes] | None = None) -> ConfigDict:
    """The config of "size" or "size,variant".

    Args:
      task: what differs between tasks, by its full key ("data.name").
      more: further variants.
    """
    size, _, variant = name.partition(",")
    changes = variants(size if size in SIZES else "small") | dict(more or {})
    if size not in SIZES or (variant and variant not in changes):
        raise ValueError(
            f"no config {name!r}: give one of {', '.join(SIZES)}, and after a comma perhaps one of {', '.join(changes)}"
        )
    return changed(SIZES[size], task, changes[variant or "lora"])


def changed(base: str, *changes: Changes) -> ConfigDict:
    """The config of LoRA on query and value of a base, with changes by full keys, the later ones last."""
    config = _common()
    config.base = base
    for each in changes:
        config.update_from_flattened_dict(each)
    return config


def _common() -> ConfigDict:
    config = ConfigDict()
    config.seed = 110  # the authors' README; they report 3 seeds
    config.base = ""  # a folder, or a name on the Hugging Face Hub

    config.method = "lora"  # or another of configs/methods.py, with its options by its name, or "none"
    config.update(methods.options(rank=4, alpha=32.0, dropout=0.1, a_init="gaussian"))

    config.data = data = ConfigDict()
    data.name = ""  # of lora_jax.data.tasks
    data.path = ""  # a folder of the files, or a name on the Hugging Face Hub
    data.batch_size = 8
    data.length = 512  # longer examples ...
    data.long = "skip"  # ... are skipped and counted, or an "error"
    data.buckets = 8  # lengths, each compiled once: so many that 9 of 10 tokens computed are real

    config.epochs = 5
    config.steps = config_dict.placeholder(int)  # ends (and decays to) there instead
    config.label_smoothing = 0.1
    config.accumulate = 1  # micro-batches a batch is split into

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 2e-4
    optimizer.schedule = "linear"
    optimizer.warmup_steps = 500
    optimizer.final_share = 0.0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-6
    optimizer.weight_decay = 0.01
    optimizer.decay = ("**",)  # all that trains, as in the authors' code
    optimizer.clip_norm = config_dict.placeholder(float)  # the authors do not clip
    optimizer.b_ratio = 1.0  # LoRA+: the rate of B over that of A

    config.model = model = ConfigDict()
    model.dtype = "float32"  # computes in; what trains is float32 always
    model.param_dtype = "float32"  # the base is kept in
    model.query_block = 0  # attention takes so many queries at a time, for long texts; 0: all
    model.scan_layers = False
    model.remat = False  # on a CPU together with scan_layers alone: in a loop XLA undoes it

    config.decode = decode = ConfigDict()  # how experiments.evaluate writes texts
    decode.num_beams = 10
    decode.length_penalty = 0.8
    decode.no_repeat_ngram_size = 4
    decode.max_new_tokens = 64
    decode.beam_rule = "lora_paper"

    config.sweep = methods.sweep()

    config.mesh = mesh = ConfigDict()
    mesh.data = mesh.fsdp = mesh.tensor = 1

    config.log_every = 100
    config.eval_every = config_dict.placeholder(int)  # besides each epoch's end
    config.save_every = 1000  # and each epoch's end
    config.keep = 3  # checkpoints
    return config
