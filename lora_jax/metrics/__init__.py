"""Metrics: what the paper's tables report of generated texts."""

from lora_jax.metrics.ngrams import bleu
from lora_jax.metrics.rouge import rouge
from lora_jax.metrics.scores import paired, report, score
from lora_jax.metrics.sql import logical_form_accuracy

__all__ = ["bleu", "logical_form_accuracy", "paired", "report", "rouge", "score"]
