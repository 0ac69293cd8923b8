"""Adapting a large model as a transform of its parameter tree: LoRA and its relatives, in JAX."""

from lora_jax.core.arrays import Adapted, LowRank, PathLabel, Tuned
from lora_jax.core.freezing import combine, freeze_base, labels, partition, rejoin
from lora_jax.core.lifting import control_flow, rules  # noqa: F401  (they register the rules of primitives)
from lora_jax.core.lifting.interpreter import DenseWeight, lift
from lora_jax.core.lifting.taps import Tapped, sites
from lora_jax.core.selection import Absent, Selection, select
from lora_jax.core.transforms.builders import Target, per_site, per_target
from lora_jax.core.transforms.merging import merge, unmerge
from lora_jax.core.transforms.registry import Traits, from_spec, register, traits_of
from lora_jax.core.transforms.report import Report, check
from lora_jax.core.transforms.transform import Axes, Delta, Factors, Params, ParamTransform, Spec, chain, stable_hash
from lora_jax.methods import arithmetic
from lora_jax.methods.adapter import adapter
from lora_jax.methods.arguments import brief as _brief
from lora_jax.methods.arguments import of_methods as _of_methods
from lora_jax.methods.bank import bank
from lora_jax.methods.bias_delta import bias_delta, shift
from lora_jax.methods.compacter import compacter
from lora_jax.methods.dora import dora
from lora_jax.methods.ia3 import ia3
from lora_jax.methods.lokr import lokr
from lora_jax.methods.lora import lora
from lora_jax.methods.pissa import pissa
from lora_jax.methods.prefix import prefix_embedding, prefix_layer
from lora_jax.methods.token_rows import rows, token_rows
from lora_jax.methods.tune import tune, without_tuned
from lora_jax.methods.vera import vera
from lora_jax.quantized import Quantized, quantize

__version__ = "0.1.0"
# Their errors, too, end at the user's own line.
check, chain, from_spec = _of_methods(check, count=1), _of_methods(chain), _brief(from_spec)

__all__ = ["Absent", "Adapted", "Axes", "Delta", "DenseWeight", "Factors", "LowRank", "ParamTransform", "Params"]
__all__ += ["PathLabel", "Quantized", "Report", "Selection", "Spec", "Tapped", "Target", "Traits", "Tuned"]
__all__ += ["adapter", "arithmetic", "bank", "bias_delta", "chain", "check", "combine", "compacter", "dora"]
__all__ += ["freeze_base", "from_spec", "ia3", "labels", "lift", "lokr", "lora", "merge", "partition", "per_site"]
__all__ += [
    "per_target",
    "pissa",
    "prefix_embedding",
    "prefix_layer",
    "quantize",
    "register",
    "rejoin",
    "rows",
    "select",
    "shift",
]
__all__ += ["sites", "stable_hash", "token_rows", "traits_of", "tune", "unmerge", "vera", "without_tuned"]
