"""Llama 3 8B and 70B (arXiv 2407.21783) with LoRA, for counting and planning from their sizes alone.

    python -m experiments.plan --config=configs/llama.py:8b --topology=v5e --search
    python -m experiments.count --config=configs/llama.py:70b

The name is a size. LoRA of rank 16 on all matrices of attention and MLP, the base and the computation in bfloat16,
texts of 2,048 tokens, one for each part of the axes data and fsdp. Nothing trains this config: its base is a name whose
shape is known; `--config.base=FOLDER` takes another one. No paper's figure belongs to it.
"""

from ml_collections import ConfigDict

from configs import nlg
from lora_jax.runs.config import ATTENTION_AND_MLP_KERNELS

SIZES = {"8b": "meta-llama/Meta-Llama-3-8B", "70b": "meta-llama/Meta-Llama-3-70B"}
CHANGES = {
    "data.length": 2048,
    "data.batch_size": 0,
    "label_smoothing": 0.0,
    "lora.select": ATTENTION_AND_MLP_KERNELS,
    "lora.rank": 16,
    "lora.alpha": 32.0,
    "lora.dropout": 0.0,
    "lora.a_init": "kaiming_uniform",
    "optimizer.learning_rate": 2e-4,
    "model.scan_layers": True,
    "model.remat": True,
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.query_block": 256,
}


def get_config(name: str = "8b") -> ConfigDict:
    """The config of a size."""
    if name not in SIZES:
        raise ValueError(f"no config {name!r}: give one of {', '.join(SIZES)}")
    return nlg.changed(SIZES[name], CHANGES)
