"""GPT-2 on the E2E NLG challenge (Hu et al. 2021, Table 3; hyperparameters of Table 11).

    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/e2e

The name is a size and, after a comma, what trains (LoRA on query and value without it):

    small | medium | large            the GPT-2 of that size (any other with --config.base=FOLDER)
    medium,lora_all                   LoRA on all attention and MLP matrices
    medium,full                       full fine-tuning
    medium,frozen                     nothing: the base is evaluated

The paper's figures (test; mean of 3 seeds; beam search of width 10), and what others report who ran
the authors' commands (microsoft/LoRA, issue 165):

                             trained    BLEU        NIST    METEOR  ROUGE-L  CIDEr
    medium, LoRA q,v r=4     0.35 M     70.4        8.85    46.8    71.8     2.53
    medium, others' runs     0.35 M     68.7-68.9   8.68    46.4    71.3     2.50
    medium, full             354.92 M   68.2        8.62    46.2    71.0     2.47
    large, LoRA q,v r=4      0.77 M     70.4        8.89    46.8    72.0     2.47
    large, full              774.03 M   68.5        8.78    46.0    69.9     2.45
    small, one other's run              67.3        8.60    45.7    68.1     2.31

Where the authors' scripts differ from the paper: factors A start Kaiming-uniform in loralib
(`--config.lora.a_init=kaiming_uniform`), Gaussian in the paper and their first GPT-2 code, as here.
They cut examples at 512 tokens, here longer ones are skipped and counted; they pad every example
to 512, here batches are bucketed by length, each example once an epoch.
The paper quotes full fine-tuning from Li & Liang (2021, prefix-tuning); its rate here is theirs, 5e-5.
"""

from ml_collections import ConfigDict, config_dict

SIZES = {"small": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large"}
VARIANTS = {
    "lora": ("lora", ("**/attn/{query,value}/kernel",)),
    "lora_all": ("lora", ("**/{attn,mlp}/*/kernel",)),
    "full": ("tune", ("**",)),
    "frozen": ("none", ()),
}


def get_config(name: str = "medium") -> ConfigDict:
    """The config of "size" or "size,variant"."""
    size, _, variant = name.partition(",")
    variant = variant or "lora"
    if size not in SIZES or variant not in VARIANTS:
        raise ValueError(
            f"no config {name!r}: give one of {', '.join(SIZES)}, and after a comma perhaps one of "
            f"{', '.join(VARIANTS)}"
        )
    method, select = VARIANTS[variant]

    config = ConfigDict()
    config.seed = 110  # the authors' README; they report 3 seeds
    config.base = SIZES[size]  # a folder, or a name on the Hugging Face Hub

    config.method = method  # "lora", "tune", ..., or "none"; its options are below, by its name
    config.lora = lora = ConfigDict()
    lora.select = select if method == "lora" else VARIANTS["lora"][1]
    lora.exclude = ()
    lora.rank = 4
    lora.alpha = 32.0
    lora.dropout = 0.1
    lora.a_init = "gaussian"
    lora.scale_rule = "alpha/r"
    config.tune = tune = ConfigDict()
    tune.select = ("**",)
    tune.exclude = ()

    config.data = data = ConfigDict()
    data.name = "e2e"
    data.path = "tuetschek/e2e_nlg"  # a folder of the files, or a name on the Hugging Face Hub
    data.batch_size = 8
    data.length = 512  # longer examples ...
    data.long = "skip"  # ... are skipped and counted, or an "error"
    data.buckets = 8  # lengths, each compiled once

    config.epochs = 5
    config.steps = config_dict.placeholder(int)  # ends (and decays to) there instead
    config.label_smoothing = 0.1
    config.accumulate = 1  # micro-batches a batch is split into

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 5e-5 if variant == "full" else 2e-4
    optimizer.schedule = "linear"
    optimizer.warmup_steps = 500
    optimizer.final_share = 0.0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-6
    optimizer.weight_decay = 0.01
    optimizer.decay = ("**",)  # all that trains, as in the authors' code
    optimizer.clip_norm = config_dict.placeholder(float)  # the authors do not clip

    config.model = model = ConfigDict()
    model.dtype = "float32"  # computes in; what trains is float32 always
    model.scan_layers = False
    model.remat = False

    config.mesh = mesh = ConfigDict()
    mesh.data = mesh.fsdp = mesh.tensor = 1

    config.log_every = 100
    config.eval_every = config_dict.placeholder(int)  # besides each epoch's end
    config.save_every = 1000  # and each epoch's end
    config.keep = 3  # checkpoints
    return config
