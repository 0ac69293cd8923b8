"""The kinds of PEFT's adapters that are read and written here, and why others are not."""

from collections.abc import Mapping
from typing import Any

from lora_jax.interop.peft.kind import Family
from lora_jax.interop.peft.kinds.ia3 import IA3
from lora_jax.interop.peft.kinds.lokr import LOKR
from lora_jax.interop.peft.kinds.lora import LORA
from lora_jax.interop.peft.kinds.vera import VERA

FAMILIES: dict[str, Family] = {"LORA": LORA, "VERA": VERA, "IA3": IA3, "LOKR": LOKR}

_PROMPT = (
    "its vectors stand before the text's embeddings, and its logits cover them; those of a prefix_embedding here are "
    "embeddings of tokens that the data hold, before the text or within it"
)
_WHY_NOT = {
    "ADALORA": "it scales by a rank that its file does not hold, and prunes ranks in training: no method here does",
    "PREFIX_TUNING": "its vectors are past keys and values of every layer; those of a prefix_layer here are outputs",
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "ADAPTION_PROMPT": "its vectors are keys and values that attention gates; no method here does",
}


def family_of(found: Mapping[str, Any], source: str) -> Family:
    """That of a config.

    Raises:
      ValueError: it is none that is read here; it says why.
    """
    kind = found.get("peft_type")
    if not isinstance(kind, str):
        raise ValueError(f"{source}: peft_type is {kind!r}: it is no adapter of PEFT's")
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind.upper() in FAMILIES:
        raise ValueError(f"{source}: peft_type {kind!r} must be written {kind.upper()!r}")
    why = f": {_WHY_NOT[kind]}" if kind in _WHY_NOT else ""
    raise ValueError(f"{source}: peft_type {kind!r} is not supported{why}; {', '.join(FAMILIES)} are read here")
