"""Other people's files, both ways."""

from lora_jax.core.extras import extra

with extra("hf"):
    import flax  # noqa: F401
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401
