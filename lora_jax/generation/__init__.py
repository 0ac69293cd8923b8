"""Generation: from prompts to texts."""

from lora_jax.core.extras import extra

with extra("hf"):
    from lora_jax.generation.decode import generate
    from lora_jax.generation.texts import clean, complete, completions, end_tokens

__all__ = ["clean", "complete", "completions", "end_tokens", "generate"]
