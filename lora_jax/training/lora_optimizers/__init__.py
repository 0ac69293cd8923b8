"""Optimizers made for LoRA: they know which A and B belong together.

A pair is a path of a delta that has A `(s.., i.., r)` and B `(s.., r, o..)`, or an A that several paths share with the
B's of those. Here both are tall matrices, x `(s.., m, r)` for A and y `(s.., n, r)` for B's transpose, so that what
they change is x y^T; m and n are the weight's inputs and outputs. What is in no pair (biases, heads, magnitudes,
vectors, factors of taps) takes plain Adam. They compute in float32, or wider where a factor is; updates have the
factor's dtype.

Each is an `optax.GradientTransformation` over a Delta, or a tree with one Delta in it, for `lora_jax.freeze_base` or
`config.optimizer.name`. A moment has the shape of its factor and lies on a mesh as that does; what is r x r is on every
device. A QR decomposition (`lora_rite`) needs its factor whole, and gathers one that is spread for the step.
"""

from lora_jax.training.lora_optimizers.muon import lora_muon, scale_by_lora_muon
from lora_jax.training.lora_optimizers.riemannian import lora_fa, riemannian, scale_by_riemannian, still_a
from lora_jax.training.lora_optimizers.rite import lora_rite, scale_by_lora_rite

__all__ = ["lora_fa", "lora_muon", "lora_rite", "riemannian", "scale_by_lora_muon", "scale_by_lora_rite"]
__all__ += ["scale_by_riemannian", "still_a"]
