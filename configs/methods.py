"""The options of every method, and the names that the configs give them. Not a config of its own.

`--config.method=NAME` takes a method below with the options under its name (`--config.adapter.rank=16`), several in a
chain (`--config.method=lora+prefix_embedding`), "none" (the base is evaluated), or the function of a file of one's own
(`--config.method=mine.py:method`), which gets the model and returns a transform.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

QV = ("**/attn/{query,value}/kernel",)
EVERY = ("**/{attn,mlp}/*/kernel",)
ATTENTION_AND_MLP = ("attention_out", "mlp_out")
MLP = ("mlp_out",)

NOTHING = {"optimizer.decay": ()}

# What each name changes in the config of LoRA; sizes are the paper's where it has one, and else near LoRA's.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_all": {"lora.select": EVERY},
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
    "lora_plus": {"optimizer.b_ratio": 16.0},
    "dora": {"method": "dora", "optimizer.decay": ("matrices",)},
    "pissa": {"method": "pissa"},
    "vera": {"method": "vera", **NOTHING},
    "ia3": {"method": "ia3", **NOTHING},
    "lokr": {"method": "lokr"},
}


def options(**lora: Any) -> ConfigDict:
    """The options of every method, by its name; those given are LoRA's, and its relatives' too where they have them."""
    found = ConfigDict()
    shared = {"select": QV, "exclude": (), "rank": 4, "alpha": 4.0, "scale_rule": "alpha/r"} | {
        name: value for name, value in lora.items() if name in ("select", "rank", "alpha")
    }
    trained = {"dropout": 0.0, "a_init": "kaiming_uniform"}
    trained |= {name: value for name, value in lora.items() if name in trained}
    found.lora = ConfigDict(shared | trained)
    found.dora = ConfigDict(shared | trained)
    found.pissa = ConfigDict(shared)
    found.vera = ConfigDict({"select": shared["select"], "exclude": (), "rank": 256, "d_initial": 0.1})
    found.ia3 = ConfigDict(
        {
            "select": ("**/attn/{key,value}/kernel", "**/mlp/down/kernel"),
            "exclude": (),
            "feedforward": ("**/mlp/down/kernel",),  # scales the input there, as in the paper
        }
    )
    found.lokr = ConfigDict(
        {"select": shared["select"], "exclude": (), "rank": 8, "alpha": 8.0, "decompose_factor": -1}
    )
    found.tune = ConfigDict({"select": ("**",), "exclude": ()})
    # layers: of those that the model has, () is all; AdapterDrop leaves out the first ones
    found.adapter = ConfigDict(
        {"sites": ATTENTION_AND_MLP, "rank": 8, "activation": "gelu", "norm": False, "layers": ()}
    )
    found.compacter = ConfigDict({"sites": ATTENTION_AND_MLP, "rank": 64, "n": 4, "activation": "gelu", "layers": ()})
    # infix: tokens between context and completion, in generation alone
    found.prefix_embedding = ConfigDict(
        {"select": ("**/{wte,word}/embedding",), "exclude": (), "prefix": 64, "infix": 0}
    )
    found.prefix_layer = ConfigDict({"sites": ("block_out",), "prefix": 8, "infix": 0})
    return found


def sweep() -> ConfigDict:
    """Values that train at once, in one program, every combination a run: `--config.sweep.learning_rate=1e-4,2e-4`."""
    names = ("learning_rate", "weight_decay", "alpha", "rank", "seed")  # alpha and rank: of the method
    return ConfigDict({name: config_dict.placeholder(tuple) for name in names})
