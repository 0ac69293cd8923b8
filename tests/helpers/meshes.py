"""Tiny models to shard, and meshes of eight devices."""

import jax

from lora_jax.distributed import sharding
from lora_jax.models import gpt2
from lora_jax.models.encoder import EncoderConfig

CONFIG = gpt2.GPT2Config(vocab_size=51, n_positions=16, n_embd=16, n_layer=2, n_head=4)

SCANNED = gpt2.GPT2Config(vocab_size=52, n_positions=16, n_embd=16, n_layer=2, n_head=4, scan_layers=True)

ROBERTA = EncoderConfig(
    vocab_size=52,
    max_positions=24,
    hidden=16,
    layers=2,
    heads=4,
    inner=32,
    head="classification",
    labels=3,
    dropout=0.1,
    attention_dropout=0.1,
    scan_layers=True,
)

# 51 rows divide over no mesh here: the table is spread over its features.
BERT = EncoderConfig(
    "bert", 51, 24, hidden=16, layers=2, heads=4, inner=32, token_types=2, pad_id=0, pooler=True, head="classification"
)


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
