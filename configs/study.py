"""Methods at one budget of parameters and of steps, for experiments.study: the learning rates and sizes to try.

A name is a task (e2e, mrpc, smollm2) and, after a comma, a method of METHODS: `configs/study.py:e2e,adapter_h`. A
method's size is LoRA's on query and value (r = 4 for E2E, 8 for MRPC) where it has that rank; else experiments.study
chooses it. smollm2 is E2E on SmolLM2-135M-Instruct; the sizes are those of configs/e2e.py:smollm2, where LoRA on all
matrices has r = 8.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import e2e, glue

PAIRS: dict[str, dict[str, int | None]] = {  # of E2E, the first ones
    "e2e": {"train": 8_000, "valid": 250, "test": None},
    "smollm2": {"train": 2_400, "valid": 256, "test": None},
}
CONTEXTS = {"e2e": 200, "mrpc": 0, "smollm2": 630}  # of E2E's test set, which are described
_SEEDS = dict.fromkeys(("lora", "full", "bitfit", "adapter_h"), (0, 1, 2))
SEEDS = {"e2e": _SEEDS, "mrpc": _SEEDS, "smollm2": dict.fromkeys(("lora", "full"), (0, 1, 2))}
_LOSS = {"validation_loss": "validation loss, nats per label"}
_BLEU = {"bleu": "BLEU", **_LOSS}
FIGURES = {"e2e": _BLEU, "mrpc": {"accuracy": "accuracy", **_LOSS}, "smollm2": _BLEU}  # of a summary, with titles
SCORES = {"e2e": ("bleu",), "mrpc": (), "smollm2": ("bleu", "nist", "meteor", "rouge_l", "cider")}
BATCH = {"e2e": 4, "mrpc": 8, "smollm2": 8}
BUCKETS = {"e2e": 2, "mrpc": 2, "smollm2": 6}
# The rates that are tried: of low-rank and other matrices that start at zero; of those that do not, or whose B has 16
# times the rate; of vectors; of the base's own weights. MRPC's are lower: at higher ones a method is no better than the
# commoner label after 300 steps, but that cannot be told after 100, when every method is at its loss.
# SmolLM2's LoRA has alpha / r = 8, the paper's.
RATES = {"e2e": (2e-3, 8e-3, 2e-2), "mrpc": (1e-3, 2e-3, 4e-3), "smollm2": (5e-4, 1e-3, 2e-3)}
_SLOWER, _FASTER = ("pissa", "lora_plus"), ("bitfit", "vera", "ia3", "prefix_embedding", "prefix_layer", "classifier")
_BASES = ("full", "top2")
OWN_RATES = {
    "e2e": dict.fromkeys(_SLOWER, (5e-4, 2e-3, 8e-3))
    | dict.fromkeys(_FASTER, (5e-3, 2e-2, 6e-2))
    | dict.fromkeys(_BASES, (3e-4, 1e-3, 3e-3)),
    "mrpc": dict.fromkeys(_SLOWER, (2e-4, 5e-4, 1e-3))
    | dict.fromkeys(_FASTER, (2e-3, 5e-3, 1e-2))
    | dict.fromkeys(_BASES, (5e-5, 1e-4, 3e-4)),
    "smollm2": dict.fromkeys(("adapter_h", "adapter_l"), (1e-3, 3e-3, 1e-2))
    | dict.fromkeys(_FASTER, (5e-3, 2e-2, 6e-2))
    | {"full": (5e-5, 1e-4, 3e-4), "top2": (1e-4, 3e-4, 1e-3)},
}
# The method that is compared, the config's name of it, what else differs, and the option that sets its size.
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "frozen": ("frozen", {}, ""),
    "lora": ("lora", {}, ""),
    "lora_all": ("lora_all", {}, "lora.rank"),
    "full": ("full", {}, ""),
    "top2": ("top2", {}, ""),
    "classifier": ("classifier", {}, ""),
    "bitfit": ("bitfit", {}, ""),
    "prefix_embedding": ("prefix_embedding", {}, "prefix_embedding.prefix"),
    "prefix_layer": ("prefix_layer", {}, "prefix_layer.prefix"),
    "adapter_h": ("adapter_h", {}, "adapter.rank"),
    "adapter_l": ("adapter_l", {}, "adapter.rank"),
    "adapter_p": ("adapter_p", {}, "adapter.rank"),
    "adapter_d": ("adapter_p", {}, "adapter.rank"),  # without the first third of the layers
    "compacter": ("compacter", {}, "compacter.rank"),
    "lora_pe": ("lora_pe", {}, "lora.rank"),
    "lora_pl": ("lora_pl", {"prefix_layer.prefix": 4}, "lora.rank"),
    "lora_bitfit": ("lora_bitfit", {}, "lora.rank"),
    "rslora": ("rslora", {}, ""),
    "lora_plus": ("lora_plus", {}, ""),
    "dora": ("dora", {}, "dora.rank"),
    "pissa": ("pissa", {}, ""),
    "vera": ("vera", {}, "vera.rank"),
    "ia3": ("ia3", {}, ""),
    "lokr": ("lokr", {}, "lokr.rank"),
    "lora_bf16": ("lora", {"model.param_dtype": "bfloat16"}, ""),
    "lora_int8": ("lora", {"model.base_bits": "8"}, ""),
    "lora_nf4": ("lora", {"model.base_bits": "4"}, ""),
}
SMOLLM2 = "frozen lora lora_all full top2 bitfit adapter_h adapter_l prefix_layer prefix_embedding dora".split()
SAME_RATE = dict.fromkeys(("lora_bf16", "lora_int8", "lora_nf4"), "lora")  # that of another method
SMOLLM2 += SAME_RATE
NOT_IN = {"e2e": ("classifier", "frozen", *SAME_RATE), "mrpc": ("top2", "frozen", *SAME_RATE)}
SIZES = (*range(1, 16), *range(16, 64, 4), *range(64, 160, 16), *range(192, 2049, 64))
RANK = {"e2e": 4, "mrpc": 8}
MOST = {"e2e": 96, "mrpc": 32}  # tokens of a prefix: they cost time as any


def methods_of(task: str) -> list[str]:
    """The methods that are compared on a task."""
    return SMOLLM2 if task == "smollm2" else [name for name in METHODS if name not in NOT_IN[task]]


def rates_of(task: str, name: str) -> tuple[float, ...]:
    """The learning rates to try."""
    return OWN_RATES[task].get(name, RATES[task])


def sizes_of(task: str, name: str, config: ConfigDict) -> list[int]:
    """The sizes to choose from, smallest first."""
    multiple = config.compacter.n if name == "compacter" else 1
    most = MOST[task] if name.startswith("prefix") else SIZES[-1]
    return [size for size in SIZES if size % multiple == 0 and size <= most]


def get_config(name: str = "e2e,lora", layers: int = 12) -> ConfigDict:
    """The config of a task and a method, for a base of so many layers, without size, rate and paths."""
    task, _, name = name.partition(",")
    variant, changes, _ = METHODS[name]
    if task == "mrpc":
        config = glue.get_config(f"base,mrpc,{variant}")
    else:
        config = e2e.get_config(f"{'small' if task == 'e2e' else task},{variant}")
    for kind in ("lora", "dora", "pissa") if task in RANK else ():
        config[kind].rank = RANK[task]
        config[kind].alpha = float(RANK[task])
    if name == "lora_all" and task == "smollm2":
        config.lora.rank, config.lora.alpha = 8, 64.0
    if name == "top2" and task == "e2e":
        config.tune.select = (f"h_{{{layers - 2},{layers - 1}}}/**",)
    if name == "adapter_d":
        config.adapter.layers = tuple(range(layers // 3, layers))
    config.update_from_flattened_dict(changes)
    # One layer compiles instead of 30; but a loop leaves out the gradients below the last two.
    config.model.scan_layers = task == "smollm2" and name != "top2"
    config.seed, config.log_every = 0, 20
    config.data.batch_size, config.data.buckets = BATCH[task], BUCKETS[task]
    config.optimizer.warmup_steps = 20
    if task == "mrpc":
        config.seeds, config.best, config.data.length = (), "", 128
    return config
