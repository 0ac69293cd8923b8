"""Adapting a model as a transform of its parameter tree: `init` makes a small Delta, `apply` puts it on the base."""

from lora_jax.core.transforms.merging import merge, unmerge, without_tuned
from lora_jax.core.transforms.registry import (
    Traits,
    from_spec,
    inserted_tokens,
    method_shardings,
    owners,
    register,
    traits_of,
)
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
    "Traits",
    "all_layers",
    "chain",
    "check",
    "from_spec",
    "inserted_tokens",
    "merge",
    "method_shardings",
    "need_factors",
    "owners",
    "per_leaf",
    "per_site",
    "register",
    "sizes",
    "stable_hash",
    "traits_of",
    "typed_key",
    "unmerge",
    "without_tuned",
]
