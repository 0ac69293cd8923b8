"""Adapting a model as a transform of its parameter tree: `init` makes a small Delta, `apply` puts it on the base."""

from lora_jax.core.transforms.builders import Target, per_site, per_target, targets_of
from lora_jax.core.transforms.merging import merge, unmerge
from lora_jax.core.transforms.registry import Traits, from_spec, inserted_tokens, method_shardings, register, traits_of
from lora_jax.core.transforms.report import Report, check
from lora_jax.core.transforms.transform import Delta, Factors, Params, ParamTransform, Spec, chain, keys_of, stable_hash

__all__ = ["Delta", "Factors", "ParamTransform", "Params", "Report", "Spec", "Target", "Traits", "chain", "check"]
__all__ += ["from_spec", "inserted_tokens", "keys_of", "merge", "method_shardings", "per_site"]
__all__ += ["per_target", "register", "stable_hash", "targets_of", "traits_of", "unmerge"]
