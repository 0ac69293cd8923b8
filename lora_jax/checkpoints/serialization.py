"""`flax.serialization` of a Delta (`lora_jax.methods.flax_state`), from the import of this package on."""

from flax import serialization  # noqa: F401

from lora_jax.methods.flax_state import register_delta

register_delta()
