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

from ml_collections import ConfigDict

from lora_jax.training.config import OptimizerConfig, TrainConfig, as_config_dict

SIZES = {"tiny": (256, 6, 8, 512), "small": (768, 12, 12, 1024)}


def get_config(name: str = "tiny") -> ConfigDict:
    """The config of a size."""
    if name not in SIZES:
        raise ValueError(f"no config {name!r}: give one of {', '.join(SIZES)}")

    config = ConfigDict()
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

    optimizer = OptimizerConfig(
        learning_rate=1.5e-3 if name == "tiny" else 6e-4,
        schedule="cosine",
        warmup_steps=200,
        end_lr_ratio=0.02,
        b2=0.98,
        weight_decay=0.05,
        decay=("**/{kernel,embedding}",),
        clip_norm=1.0,
    )
    settings = TrainConfig(log_every=50, save_every=500, max_to_keep=2, optimizer=optimizer)
    config.update(as_config_dict(settings))
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    return config
