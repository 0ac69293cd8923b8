"""GPT-3 175B (Hu et al. 2021, Tables 4 and 15; hyperparameters of Table 12), for counting and planning.

    python -m experiments.count --config=configs/gpt3.py:lora_qv_r8

Its weights are not public: nothing trains this config. Counted is a GPT-2 of its shape, whose output head is the token
embedding. The name is what trains:

    full                              full fine-tuning
    bitfit                            all biases
    prefix_embedding_32_8 ...         PreEmbed, 32 prefix and 8 infix tokens; of 32, 64, 128, 256, 512
    prefix_layer_2_2 ...              PreLayer; also of 8_0, 8_8, 32_4, 64_0
    adapter_h_r1 ...                  Houlsby et al.'s adapters; also of 4, 8, 16, 64
    lora_v_r2                         LoRA on value alone
    lora_qv_r1 ...                    LoRA on query and value; also of 2, 4, 8, 64
    lora_qkvo_r1 ...                  LoRA on query, key, value and output; also of 2, 4, 64
    lora_pe_r8, _r32, _r64            LoRA on query and value with PreEmbed of 8 and 4
    lora_pl_r8                        LoRA on query and value with PreLayer of 8 and 4

The paper's figures (validation, the best reported; spread about .5, .1, and .2 / .2 / .1):

                             trained       WikiSQL  MNLI   SAMSum
    full                     175,255.8 M   73.8     89.5   52.0 / 28.0 / 44.5
    bitfit                   14.2 M        71.3     91.0   51.3 / 27.4 / 43.5
    prefix_embedding_256_8   3.2 M         63.1     88.6   48.3 / 24.2 / 40.5
    prefix_layer_8_8         20.2 M        70.1     89.5   50.8 / 27.3 / 43.5
    adapter_h_r1             7.1 M         71.9     89.8   53.0 / 28.9 / 44.8
    adapter_h_r8             40.1 M        73.2     91.5   53.2 / 29.0 / 45.1
    lora_v_r2                4.7 M         73.4     91.7   53.8 / 29.8 / 45.9
    lora_qkvo_r4             37.7 M        74.0     91.6   53.4 / 29.2 / 45.1

(WikiSQL: accuracy of the logical form; MNLI matched; SAMSum ROUGE-1 / 2 / L.) The last row joins two of Table 15: 91.6
is lora_qv_r8's, of as many parameters.

Table 15, WikiSQL / MNLI:

    prefix_embedding  32_8 55.9 / 84.9   64_8 58.7 / 88.1   128_8 60.6 / 88.0   256_8 63.1 / 88.6   512_8 55.9 / 85.8
    prefix_layer      2_2  68.5 / 89.2   8_0  69.8 / 88.2   8_8   70.1 / 89.5   32_4  66.4 / 89.6   64_0  64.9 / 87.9
    adapter_h         r1   71.9 / 89.8   r4   73.2 / 91.0   r8    73.2 / 91.5   r16   73.2 / 91.5   r64   72.6 / 91.5
    lora_v            r2   73.4 / 91.7
    lora_qv           r1   73.4 / 91.3   r2   73.3 / 91.4   r4    73.7 / 91.3   r8    73.8 / 91.6   r64   73.6 / 91.4
    lora_qkvo         r1   74.1 / 91.2   r2   73.7 / 91.7   r4    74.0 / 91.7                       r64   73.9 / 91.4
    lora_pe           r8   75.0 / 91.4   r32  75.9 / 91.1   r64   76.2 / 91.3
    lora_pl           r8   72.9 / 90.2

Really trained are in several rows other numbers than the paper prints: `python -m experiments.count --all` lists them.

Table 12 has AdamW, batches of 128, 2 epochs, weight decay 0.1, a linear decay after a warm-up over 250,000 tokens, and
the rates below, on texts of up to 384 tokens (WikiSQL, as here), 768 (MNLI) and 2,048 (SAMSum). A warm-up is in steps
here: as many full batches as hold 250,000 tokens, 6 of WikiSQL's (3 and 1 of the others'). What the table does not have
is 0: dropout of LoRA, label smoothing. Alpha is not printed: 8 for every rank, since the paper keeps its first one. The
combinations have LoRA's rate.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from configs import nlg
from configs.methods import METHODS
from lora_jax.runs.config import QV

BATCH, LENGTH, WARMUP_TOKENS = 128, 384, 250_000
RATES = {
    "full": 5e-6,
    "prefix_embedding": 5e-4,
    "prefix_layer": 1e-4,
    "bitfit": 1.6e-3,
    "adapter_h": 1e-4,
    "lora": 2e-4,
}
TARGETS = {"v": ("**/attn/value/kernel",), "qv": QV, "qkvo": ("**/attn/{query,key,value,out}/kernel",)}

PREFIXES = {
    "prefix_embedding": ((32, 8), (64, 8), (128, 8), (256, 8), (512, 8)),
    "prefix_layer": ((2, 2), (8, 0), (8, 8), (32, 4), (64, 0)),
}
ADAPTERS = (1, 4, 8, 16, 64)
LORAS = {"v": (2,), "qv": (1, 2, 4, 8, 64), "qkvo": (1, 2, 4, 64)}
COMBINATIONS = {"lora_pe": (8, 32, 64), "lora_pl": (8,)}

TASK = {
    "data.name": "wikisql",
    "data.path": "wikisql",
    "data.batch_size": BATCH,
    "data.length": LENGTH,
    "epochs": 2,
    "label_smoothing": 0.0,
    "optimizer.warmup_steps": math.ceil(WARMUP_TOKENS / (BATCH * LENGTH)),
    "optimizer.weight_decay": 0.1,
    "lora.alpha": 8.0,
    "lora.dropout": 0.0,
    "model.scan_layers": True,  # 96 layers
    "model.remat": True,
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.query_block": 256,
}


def variants() -> dict[str, dict[str, Any]]:
    """What each row changes in the config of LoRA on query and value."""
    full = {"method": "tune", "model.param_dtype": "float32"}
    changes: dict[str, dict[str, Any]] = {"full": full, "bitfit": METHODS["bitfit"]}
    for name, pairs in PREFIXES.items():
        for prefix, infix in pairs:
            sizes = {f"{name}.prefix": prefix, f"{name}.infix": infix}
            changes[f"{name}_{prefix}_{infix}"] = METHODS[name] | sizes
    changes |= {f"adapter_h_r{rank}": METHODS["adapter_h"] | {"adapter.rank": rank} for rank in ADAPTERS}
    for name, ranks in LORAS.items():
        changes |= {f"lora_{name}_r{rank}": {"lora.select": TARGETS[name], "lora.rank": rank} for rank in ranks}
    for name, ranks in COMBINATIONS.items():
        changes |= {f"{name}_r{rank}": METHODS[name] | {"lora.rank": rank} for rank in ranks}
    return changes


def get_config(name: str = "lora_qv_r8") -> ConfigDict:
    """The config of a row of Tables 4 and 15."""
    changes = variants()
    if name not in changes:
        raise ValueError(f"no config {name!r}: give one of {', '.join(changes)}")
    rate = next(rate for kind, rate in RATES.items() if name.startswith(kind))
    return nlg.changed("gpt3", TASK, {"optimizer.learning_rate": rate}, changes[name])
