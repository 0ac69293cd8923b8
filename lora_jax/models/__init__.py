"""Models in plain Flax linen. They know nothing of the methods that adapt them."""

from lora_jax.core.extras import extra

with extra("train"):
    import flax  # noqa: F401
