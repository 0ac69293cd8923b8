"""The updates of a PEFT adapter from its folder alone: no base, no model, any architecture."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop import folders
from lora_jax.interop.peft.config import complete, rank_and_alpha
from lora_jax.interop.peft.files import adapter_files
from lora_jax.interop.peft.kinds import kind_of
from lora_jax.interop.peft.tensors import PREFIX
from lora_jax.interop.tensor_files import read_file
from lora_jax.methods.changes import Update

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?")


def updates(folder: str | os.PathLike) -> dict[str, Update]:
    """`{module: Update}` of a LoRA that PEFT wrote, for `lora_jax.analysis`: its folder suffices, whatever its base.

    The modules have PEFT's names (`transformer.h.0.attn.c_attn`); a fused layer is one weight. a is (1, inputs, r), and
    b, which has the scale, (1, r, outputs), float32; of a convolution the inputs are channels times window. What a file
    holds besides (a trained head, biases) is left out.

    Raises:
      FileNotFoundError: no such folder, or a file is missing.
      ValueError: a damaged file; a field that is wrong, unknown or unsupported; a factor without the other, or of
        another rank than the config says; no LoRA, or one whose change depends on its base (DoRA, PiSSA): load it with
        `peft.load(folder, params)` and take `analysis.updates(method, delta, params)`.

    >>> from lora_jax.interop import peft
    >>> peft.updates("no-adapter")
    Traceback (most recent call last):
      ...
    FileNotFoundError: there is no folder no-adapter
    """
    config_file, file = adapter_files(Path(folder).expanduser())
    config = folders.read_json(config_file)
    arrays = {name.removeprefix(PREFIX): array for name, array in read_file(file).items()}
    factors: dict[str, dict[str, np.ndarray]] = {}
    for match, array in ((_FACTOR.fullmatch(name), array) for name, array in arrays.items()):
        if match:
            factors.setdefault(match["module"], {})[match["factor"]] = array.astype(np.float32)
    fields = _fields(config, str(config_file), factors)
    if not factors:
        raise ValueError(f"{file} has no factors of a LoRA: its names begin with {[*arrays][:3]}")
    return {module: _update(module, pair, fields, str(file)) for module, pair in sorted(factors.items())}


def _fields(config: Mapping[str, Any], source: str, modules: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config; a ValueError for any adapter but a LoRA whose factors tell what it changes."""
    kind = kind_of(config, source)
    fields = complete(config, kind, source, list(modules))
    way_out = "read it with peft.load(folder, params)"
    if kind.name != "LoRA":
        raise ValueError(f"{source}: {kind.name} is no LoRA, of which the factors alone tell the change: {way_out}")
    for name, value in (("use_dora", True), ("init_lora_weights", "pissa")):
        if fields[name] == value:
            raise ValueError(f"{source}: with {name}={value!r} the change depends on the base: {way_out}")
    return fields


def _update(module: str, pair: Mapping[str, np.ndarray], fields: Mapping[str, Any], source: str) -> Update:
    rank, alpha = rank_and_alpha(fields, module, "lora_alpha")
    if len(pair) < 2:
        raise ValueError(f"{source}: {module} has lora_{next(iter(pair))} but not the other factor")
    a, b = (pair[name].reshape(len(pair[name]), -1) for name in "AB")
    if (len(a), b.shape[1]) != (rank, rank):
        shapes = f"A {pair['A'].shape} and B {pair['B'].shape}"
        raise ValueError(f"{source}: {module} has {shapes}, but its config says rank {rank}")
    scale = alpha / (rank**0.5 if fields["use_rslora"] else rank)
    return Update(jnp.asarray(a.T)[None], jnp.asarray(np.float32(scale) * b.T)[None])
