"""`lora_jax.distributed.sharding`, under its short name."""

from lora_jax.distributed.sharding import *  # noqa: F403
