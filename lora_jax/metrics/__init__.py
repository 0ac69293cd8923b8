"""Metrics: what the paper's tables report of generated texts."""

from lora_jax.metrics.bleu import bleu

__all__ = ["bleu"]
