"""The kinds of PEFT adapters that are read and written, and why others are not."""

from collections.abc import Mapping
from typing import Any

from lora_jax.interop.peft.kind import Kind
from lora_jax.interop.peft.kinds.ia3 import IA3
from lora_jax.interop.peft.kinds.lokr import LOKR
from lora_jax.interop.peft.kinds.lora import LORA
from lora_jax.interop.peft.kinds.vera import VERA

KINDS: dict[str, Kind] = {"LORA": LORA, "VERA": VERA, "IA3": IA3, "LOKR": LOKR}

_PROMPT = (
    "its vectors stand before the text's embeddings, and its logits cover them; those of a prefix_embedding here are "
    "embeddings of tokens that the data hold, before the text or within it"
)
_WHY_NOT = dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT"), _PROMPT) | {
    "ADALORA": "it scales by a rank that its file does not hold, and prunes ranks in training: no method here does",
    "PREFIX_TUNING": "its vectors are past keys and values of every layer; those of a prefix_layer here are outputs",
    "ADAPTION_PROMPT": "its vectors are keys and values that attention gates; no method here does",
}


def register_kind(name: str, kind: Kind) -> None:
    """Makes `load` and `save` know a kind of adapter by its `peft_type`, in place of an earlier one of that name; a
    ValueError where the name is not in capitals, as all of PEFT's are.

    >>> from lora_jax.interop import peft
    >>> from lora_jax.interop.peft.kinds import kind_of
    >>> from lora_jax.interop.peft.kinds.lora import LORA
    >>> ours = LORA._replace(name="a LoRA of ours", export=None)  # its files are LoRA's; they are only read
    >>> peft.register_kind("OUR_LORA", ours)
    >>> kind_of({"peft_type": "OUR_LORA"}, "adapter_config.json").name
    'a LoRA of ours'
    """
    if not name or name != name.upper():
        raise ValueError(f"a peft_type is written in capitals, but this one is {name!r}")
    KINDS[name] = kind


def kind_of(config: Mapping[str, Any], source: str) -> Kind:
    """The kind of an adapter with this config; a ValueError that says why where none is supported."""
    name = config.get("peft_type")
    if not isinstance(name, str):
        raise ValueError(f"{source}: peft_type is {name!r}: it is no adapter of PEFT's")
    if name in KINDS:
        return KINDS[name]
    if name.upper() in KINDS:
        raise ValueError(f"{source}: peft_type {name!r} must be written {name.upper()!r}")
    why = f": {_WHY_NOT[name]}" if name in _WHY_NOT else ""
    raise ValueError(f"{source}: peft_type {name!r} is not supported{why}; {', '.join(KINDS)} are read here")
