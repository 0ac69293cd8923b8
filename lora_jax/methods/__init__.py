"""One method, one file; each registers itself, and `lora_jax` imports them all."""
