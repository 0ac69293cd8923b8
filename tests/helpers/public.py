"""What the package makes public, and where it keeps what is registered."""

import contextlib
from collections.abc import Iterator
from typing import Any

from lora_jax.core.transforms import registry
from lora_jax.interop.hf import families
from lora_jax.interop.peft import kinds
from lora_jax.models import family
from lora_jax.runs import tasks
from lora_jax.training import objectives

REGISTRIES: tuple[dict[str, Any], ...] = (
    registry._METHODS,
    registry._TRAITS,
    families._FORMATS,
    families.ARCHITECTURES,
    kinds.KINDS,
    family._FAMILIES,
    tasks._TASKS,
    objectives._METRICS,
)

PUBLIC = ["lora_jax", "lora_jax.interop.hf", "lora_jax.interop.peft", "lora_jax.interop.gguf", "lora_jax.checkpoints"]
PUBLIC += ["lora_jax.generation", "lora_jax.metrics", "lora_jax.training", "lora_jax.runs", "lora_jax.quantized"]
PUBLIC += ["lora_jax.analysis", "lora_jax.methods.arithmetic"]
PUBLIC += ["lora_jax.models.gpt2", "lora_jax.models.encoder", "lora_jax.models.llama"]


@contextlib.contextmanager
def registries_restored() -> Iterator[None]:
    """What is registered inside is forgotten at the end."""
    before = [dict(registered) for registered in REGISTRIES]
    try:
        yield
    finally:
        for registered, entries in zip(REGISTRIES, before, strict=True):
            registered.clear()
            registered.update(entries)
