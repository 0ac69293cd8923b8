"""Adapting a model as a transform of its parameter tree: `init` makes a small Delta, `apply` puts it on the base."""

from lora_jax.core.transforms.merging import merge, unmerge, without_tuned
from lora_jax.core.transforms.registry import from_spec, register
from lora_jax.core.transforms.report import Report, check
from lora_jax.core.transforms.transform import (
    Delta,
    ParamTransform,
    all_layers,
    chain,
    need_factors,
    per_leaf,
    per_site,
    sizes,
    stable_hash,
    typed_key,
)

__all__ = [
    "Delta",
    "ParamTransform",
    "Report",
    "all_layers",
    "chain",
    "check",
    "from_spec",
    "merge",
    "need_factors",
    "per_leaf",
    "per_site",
    "register",
    "sizes",
    "stable_hash",
    "typed_key",
    "unmerge",
    "without_tuned",
]
