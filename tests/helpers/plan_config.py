"""A workload to plan, of a tiny GPT-2."""

import json
from pathlib import Path

from configs import e2e
from lora_jax.runs import shapes


def tiny(folder: Path):
    """LoRA on query and value of a GPT-2 with two scanned layers of width 64, as a folder without weights."""
    shape = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 200}
    (folder / "config.json").write_text(json.dumps(shape))
    config = e2e.get_config("small")
    config.base = str(folder)
    config.model.scan_layers = config.model.remat = True
    config.data.length, config.data.batch_size = 32, 8
    return shapes.workload(config)
