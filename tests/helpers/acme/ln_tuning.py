"""PEFT's LN_TUNING (Zhao et al. 2023, arXiv 2312.11420): the weights and biases of layer norms train themselves."""

from typing import Any

from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop import peft
from lora_jax.interop.peft.config import COMMON, EXCLUDE, Schema
from lora_jax.interop.peft.kind import Adaptation
from lora_jax.interop.peft.modules import Resolved, Rules
from lora_jax.interop.peft.tensors import Tensor


def _tensors(resolved: Resolved) -> list[list[Tensor]]:
    model = resolved.model
    return [
        [
            Tensor(f"{name}.ln_tuning_layers.{which}", model.shape(module, which), module.path(which), "value")
            for which in ("weight", "bias")
        ]
        for name, module in model.modules.items()
        if name in resolved.adapted
    ]


def _method(resolved: Resolved) -> tuple[list[ParamTransform], Delta]:
    return [], Delta()  # the factor "value" is a tuned leaf's


def _export(adaptation: Adaptation) -> tuple[Delta, dict[str, Any]]:
    raise ValueError("LN_TUNING is written as it was read")


peft.register_kind(
    "LN_TUNING",
    peft.Kind(
        schema=Schema({**COMMON, **EXCLUDE}),
        rules=Rules("LN tuning", ("LayerNorm",), lambda *_: None, lambda architecture: ("ln_1", "ln_2", "ln_f")),
        tensors=_tensors,
        method=_method,
        leaves=(),
        export=_export,
    ),
)
