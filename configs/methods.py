"""The options of every method, and the names that the configs give them. Not a config of its own.

`--config.method=NAME` takes a method below with the options under its name (`--config.adapter.rank=16`), several in a
chain (`--config.method=lora+prefix_embedding`), "none" (the base is evaluated), or the function of a file of one's own
(`--config.method=mine.py:method`), which gets the model and returns a transform.
"""

from typing import Any

from lora_jax.runs.config import ATTENTION_AND_MLP, ATTENTION_AND_MLP_KERNELS

MLP = ("mlp_out",)

NOTHING = {"optimizer.decay": ()}

# What each name changes in the config of LoRA; sizes are the paper's where it has one, and else near LoRA's.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_all": {"lora.select": ATTENTION_AND_MLP_KERNELS},
    "bitfit": {"method": "tune", "tune.select": ("**/bias",)},
    "adapter_h": {  # with swish, as in the authors' code
        "method": "adapter",
        "adapter.sites": ATTENTION_AND_MLP,
        "adapter.activation": "silu",
    },
    "adapter_l": {
        "method": "adapter",
        "adapter.sites": MLP,
        "adapter.norm": True,
        "adapter.activation": "relu",
        "optimizer.decay": ("matrices",),
    },
    "adapter_p": {"method": "adapter", "adapter.sites": MLP, "adapter.activation": "relu"},
    "compacter": {"method": "compacter"},
    "prefix_embedding": {"method": "prefix_embedding"},
    "prefix_layer": {"method": "prefix_layer"},
    "lora_pe": {"method": "lora+prefix_embedding", "prefix_embedding.prefix": 8, "prefix_embedding.infix": 4},
    "lora_pl": {"method": "lora+prefix_layer", "prefix_layer.prefix": 8, "prefix_layer.infix": 4},
    "lora_bitfit": {"method": "lora+tune", "tune.select": ("**/bias",)},
    "rslora": {"lora.scale_rule": "alpha/sqrt(r)"},
    "lora_plus": {"optimizer.loraplus_lr_ratio": 16.0},
    "dora": {"method": "dora", "optimizer.decay": ("matrices",)},
    "pissa": {"method": "pissa"},
    "vera": {"method": "vera", **NOTHING},
    "ia3": {"method": "ia3", **NOTHING},
    "lokr": {"method": "lokr"},
}
