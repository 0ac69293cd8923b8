"""A small GPT-2 from plain text, to adapt where no pretrained one can be had.

    python -m experiments.pretrain --config=configs/pretrain.py:tiny --workdir=runs/base \\
      --config.data.path=TEXTS --config.data.validation=HELD_OUT.txt

makes `runs/base/model`, a Hugging Face folder for `--config.base` of the other experiments.

    tiny    6 layers of 256, a vocabulary of 8,192 of its own, learnt from the text: 7.0 M parameters
    small   GPT-2 small, with GPT-2's vocabulary (--config.tokenizer=TOKENIZER.JSON): 124 M

For comparison: 2,911 batches of 16 x 256 tokens and 445 of 8 x 512 out of 17.4 M tokens of books,
Wikipedia and web pages, with these rates, gave the tiny one a perplexity of 146 a token (1.806
bits a byte) on WikiText-2's validation text, in 78 minutes on 2 cores.
"""

from ml_collections import ConfigDict, config_dict

SIZES = {"tiny": (256, 6, 8, 512), "small": (768, 12, 12, 1024)}


def get_config(name: str = "tiny") -> ConfigDict:
    """The config of a size."""
    if name not in SIZES:
        raise ValueError(f"no config {name!r}: give one of {', '.join(SIZES)}")

    config = ConfigDict()
    config.seed = 0

    config.model = model = ConfigDict()
    model.n_embd, model.n_layer, model.n_head, model.n_positions = SIZES[name]
    model.dtype = "bfloat16"
    model.scan_layers = False
    model.remat = False

    config.tokenizer = ""  # a tokenizer.json; "": one is learnt, of so many tokens:
    config.vocab_size = 8192

    config.data = data = ConfigDict()
    data.path = ("",)  # text files, or folders of .txt and .txt.gz
    data.validation = ("",)  # held out, even if it lies in such a folder
    data.batch_size = 16
    data.length = 512

    config.epochs = 1
    config.steps = config_dict.placeholder(int)  # ends (and decays to) there instead
    config.label_smoothing = 0.0
    config.accumulate = 1

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1.5e-3 if name == "tiny" else 6e-4
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = 200
    optimizer.final_share = 0.02
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.05
    optimizer.decay = ("**/{kernel,embedding}",)
    optimizer.clip_norm = 1.0

    config.mesh = mesh = ConfigDict()
    mesh.data = mesh.fsdp = mesh.tensor = 1

    config.log_every = 50
    config.eval_every = config_dict.placeholder(int)
    config.save_every = 500
    config.keep = 2
    return config
