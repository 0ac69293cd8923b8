"""`lora_jax.methods.arithmetic`, under its short name."""

from lora_jax.methods.arithmetic import *  # noqa: F403
