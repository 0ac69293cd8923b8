"""Checkpoints of loralib (github.com/microsoft/LoRA), the LoRA authors' own library.

Only safetensors are read here; `experiments.convert` makes them from the authors' torch files. With W (out, in), its
Linear and Embedding have A (r, in) and B (out, r). Its MergedLinear, a fused query, key and value of which n are
adapted, has A (r n, in) and B (out n, r): n products of rank r, which are n kernels with factors of their own here.
"""

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.selection import select
from lora_jax.core.transforms import Delta, ParamTransform, chain
from lora_jax.interop import lazy
from lora_jax.interop.folders import first_ten
from lora_jax.interop.hf.families import Module
from lora_jax.interop.peft.kind import Model
from lora_jax.interop.peft.modules import model_of, prefix_in
from lora_jax.interop.tensor_files import read_file
from lora_jax.methods.arguments import brief
from lora_jax.methods.lora import lora
from lora_jax.methods.tune import tune

# Buffers: GPT-2's causal masks, whose name lora_state_dict(bias="all") takes for a bias, and position counters.
IGNORED = re.compile(r"(.*\.)?(h\.\d+\.attn\.(masked_)?bias|embeddings\.position_ids)")
_SAME = 1e-5  # of the largest entry: merging and unmerging leaves rounding errors
_FACTORS = ("lora_A", "lora_B")


@brief
def load(
    file: str | os.PathLike,
    params: Any,
    *,
    alpha: float,
    enabled: Sequence[bool] = (True, False, True),
    unmerged: bool = False,
) -> tuple[ParamTransform, Delta]:
    """The adapter in a checkpoint of the authors' GPT-2 (NLG) or RoBERTa (NLU), or of a model with the same names.

    >>> model, params, _ = hf.load("gpt2-medium")  # doctest: +SKIP
    >>> method, delta = loralib.load("e2e.safetensors", params, alpha=32)  # doctest: +SKIP

    Args:
      file: safetensors with the names of loralib's `lora_state_dict`; `module.` before all of them is taken off.
      params: the base's, of `hf.load`, in the loop layout. An adapted `wte` needs `hf.load(folder, tie=False)`.
      alpha: the authors' lora_alpha, which is not in the file: scale = alpha / r. Their GPT-2s have 32, their
        RoBERTa-base 16.
      enabled: the authors' enable_lora, also not in the file: which of query, key and value a fused `c_attn` adapts.
      unmerged: that the adapter is not merged into the model's weights, where the file has those too. They are
        compared with the base's; biases that differ were trained.

    Returns:
      `(method, delta)` with float32 factors: `lora` with paths of its own, in a chain with `tune` where the file has
      a classifier or biases.

    Raises:
      FileNotFoundError: there is no such file.
      TypeError: adapted params.
      ValueError: it is damaged; a tensor is unknown, alone without its partner, misshapen or not finite; it has
        weights beside the adapter, and `unmerged` is false, or they are not the base's.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha!r}: give the number that the adapter was trained with")
    if len(enabled) != 3 or not any(enabled):
        raise ValueError(f"enabled={enabled!r}: say for query, key and value whether they are adapted")
    tensors = read_file(file, ignored=IGNORED)
    if all(name.startswith("module.") for name in tensors):  # DistributedDataParallel's
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    model = model_of(params, prefix_in(tensors, str(file)), False, str(file))
    factors, others = _sorted_out(tensors, model, file)
    if not factors:
        raise ValueError(f"{file} has no tensors of LoRA; their names end in .lora_A and .lora_B")
    delta, ranks = Delta(), {}
    for name, pair in factors.items():
        for path, (a, b) in _kernels(model.modules[name], pair, model, enabled, file).items():
            delta[path], ranks[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}, a.shape[-1]
    trained = _trained(others, model, unmerged, file)
    delta |= Delta({path: {"value": jnp.asarray(value)} for path, value in trained.items()})
    if too_high := [path for path, r in ranks.items() if r > min(model.leaves[path].shape)]:
        full_rank = min(model.leaves[too_high[0]].shape)
        logging.warning("%s: %s has a rank above its full one, %d", file, too_high[0], full_rank)
    rank = ranks if len(set(ranks.values())) > 1 else next(iter(ranks.values()))
    method = lora(select(*ranks), rank=rank, alpha=alpha, strict=not too_high)
    return (chain(method, tune(select(*trained))) if trained else method), delta


def _sorted_out(
    tensors: Mapping[str, np.ndarray], model: Model, file: Any
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """`{module: {"lora_A": ..., "lora_B": ...}}`, and weights and biases by name; all as float32."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    unknown = []
    for full_name, tensor in tensors.items():
        name = full_name.replace("lm_head.decoder.", "lm_head.")  # the authors' GPT-2 has one more module there
        owner, _, parameter = name.rpartition(".")
        module = model.modules.get(owner)
        if module and parameter in _FACTORS and module.torch_class in ("Linear", "Conv1D", "Embedding"):
            factors.setdefault(owner, {})[parameter] = tensor.astype(np.float32, copy=False)
        elif module and (module.bias if parameter == "bias" else parameter == "weight" and module.torch_class):
            others[name] = tensor.astype(np.float32, copy=False)
        else:
            unknown.append(full_name)
    if unknown:
        raise ValueError(f"{file}: the base has no place for {first_ten(unknown)}")
    return factors, others


def _kernels(
    module: Module, factors: Mapping[str, np.ndarray], model: Model, enabled: Sequence[bool], file: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{path: (a (in, r), b (r, out))}` from A and B of one module."""
    if missing := [name for name in _FACTORS if name not in factors]:
        raise ValueError(f"{file}: {module.name}.{missing[0]} is missing, while its partner is there")
    if model.tied and module.name in (model.embedding, model.output):
        raise ValueError(
            f"{file}: loralib adapts {module.name} alone, but in these params token embedding and head are one: load "
            "the base with hf.load(folder, tie=False)"
        )
    paths = module.paths("weight")
    fused = len(paths) > 1
    if fused:
        paths = [path for path, on in zip(paths, enabled, strict=True) if on]
    a, b = factors["lora_A"], factors["lora_B"]
    n, (width, out), r = len(paths), model.leaves[paths[0]].shape, b.shape[-1] if b.ndim else 0
    for name, factor, shape in (("lora_A", a, (n * r, width)), ("lora_B", b, (n * out, r))):
        if factor.shape != shape or not r:
            given = f" (of rank {r}, with enabled={tuple(enabled)})" if fused else f" (of rank {r})"
            raise ValueError(f"{file}: {module.name}.{name} has shape {factor.shape}, not {shape}{given}")
    return {path: (a[g * r : (g + 1) * r].T, b[g * out : (g + 1) * out].T) for g, path in enumerate(paths)}


def _trained(others: Mapping[str, np.ndarray], model: Model, unmerged: bool, file: Any) -> dict[str, np.ndarray]:
    """`{path: value}` of what was trained besides: a classifier, biases. Weights are checked, as `unmerged` says."""
    frozen = [name for name in others if name.endswith(".weight") and not name.startswith("classifier.")]
    if frozen and not unmerged:
        raise ValueError(
            f"{file} has weights ({frozen[0]}, ...) beside the adapter. Saved after model.eval(), which merges, they "
            "hold it already, and it would count twice: the file is a trained base then. Saved from a model that "
            "trains, or with merge_weights=False: say unmerged=True, and they are compared with the base's"
        )
    trained: dict[str, np.ndarray] = {}
    for name, tensor in others.items():
        owner, _, parameter = name.rpartition(".")
        module = model.modules[model.embedding if model.tied and owner == model.output else owner]
        layout = module.stored(parameter)
        base = layout.join(*(np.asarray(model.leaves[path], np.float32) for path in layout.paths))
        if tensor.shape != base.shape:
            raise ValueError(f"{file}: {name} has shape {tensor.shape}, not {base.shape}")
        if name in frozen:
            if not np.allclose(tensor, base, rtol=0, atol=_SAME * np.abs(base).max()):
                raise ValueError(f"{file}: {name} is not the base's: the adapter is merged into it, or another base")
        elif not (frozen and parameter == "bias" and np.array_equal(tensor, base)):
            trained |= {path: np.asarray(part) for path, part in layout.split(lazy.of(tensor, name)).items()}
    return trained
