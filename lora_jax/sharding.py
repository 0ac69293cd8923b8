"""`lora_jax.distributed.sharding`, under its short name, and the rules of two models by their vocabulary's size."""

from jax.sharding import Mesh

from lora_jax.distributed.sharding import *  # noqa: F403
from lora_jax.distributed.sharding import Rules, rules_for


def gpt2_rules(vocab_size: int, mesh: Mesh) -> Rules:
    """`rules_for` a GPT-2 with this vocabulary."""
    from lora_jax.models.gpt2 import GPT2, GPT2Config  # here: a model of one's own needs no flax

    return rules_for(GPT2(GPT2Config(vocab_size=vocab_size)), mesh)


def encoder_rules(vocab_size: int, mesh: Mesh) -> Rules:
    """`rules_for` a RoBERTa or BERT with this vocabulary."""
    from lora_jax.models.encoder import Encoder, EncoderConfig

    return rules_for(Encoder(EncoderConfig(vocab_size=vocab_size)), mesh)
