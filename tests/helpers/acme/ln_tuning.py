"""PEFT's LN_TUNING (Zhao et al. 2023, arXiv 2312.11420): the weights and biases of layer norms train themselves."""

from lora_jax.core.transforms import Delta, ParamTransform
from lora_jax.interop import peft
from lora_jax.interop.hf.families import Module
from lora_jax.interop.peft.config import COMMON, EXCLUDE
from lora_jax.interop.peft.kind import Resolved, Tensor


def tensors(resolved: Resolved, module: Module, options: None) -> list[Tensor]:
    return [
        Tensor(
            f"{module.name}.ln_tuning_layers.{which}", resolved.model.shape(module, which), module.path(which), "value"
        )
        for which in ("weight", "bias")
    ]


def method(resolved: Resolved) -> tuple[list[ParamTransform], Delta]:
    return [], Delta()  # the factor "value" is a tuned leaf's


NORMS = ("ln_1", "ln_2", "ln_f")
FIELDS = {**COMMON, **EXCLUDE}
KIND = peft.Kind("LN tuning", ("LayerNorm",), FIELDS, tensors, method, targets=lambda architecture: NORMS)
peft.register_kind("LN_TUNING", KIND)
