"""Adapting a large model as a transform of its parameter tree: LoRA and its relatives, in JAX."""

from lora_jax import controlflow, products  # noqa: F401  (their rules register themselves)
from lora_jax.arrays import Adapted, LowRank, Tuned
from lora_jax.freezing import freeze_base, labels, partition, rejoin
from lora_jax.lifting import DenseWeight, lift
from lora_jax.methods.lora import lora
from lora_jax.methods.rows import rows
from lora_jax.methods.shift import shift
from lora_jax.methods.tune import tune
from lora_jax.selection import Absent, Selection, select
from lora_jax.transforms import (
    Delta,
    ParamTransform,
    Report,
    chain,
    check,
    from_spec,
    merge,
    register,
    stable_hash,
    unmerge,
    without_tuned,
)

__all__ = [
    "Absent",
    "Adapted",
    "Delta",
    "DenseWeight",
    "LowRank",
    "ParamTransform",
    "Report",
    "Selection",
    "Tuned",
    "chain",
    "check",
    "freeze_base",
    "from_spec",
    "labels",
    "lift",
    "lora",
    "merge",
    "partition",
    "register",
    "rejoin",
    "rows",
    "select",
    "shift",
    "stable_hash",
    "tune",
    "unmerge",
    "without_tuned",
]
