"""PEFT's adapters, both ways: a folder of adapter_config.json and adapter_model.safetensors.

    model, params, tokenizer = hf.load("gpt2-folder")
    method, delta = peft.load("adapter-folder", params)
    peft.save("another-folder", method, delta, params=params)

What PEFT saved, loaded and saved again comes back byte for byte; `method.spec["peft"]` keeps what the arrays do not
hold. Reading is strict: where PEFT warns, or silently loads a part, this is an error.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lora_jax.checkpoints import replaced_together
from lora_jax.core.arrays import is_frozen
from lora_jax.core.selection import select
from lora_jax.core.transforms import Delta, ParamTransform, chain
from lora_jax.interop import folders
from lora_jax.interop.peft.config import complete, to_json
from lora_jax.interop.peft.export import export
from lora_jax.interop.peft.files import CONFIG, WEIGHTS, adapter_files
from lora_jax.interop.peft.kind import Model, Resolved, Tensor
from lora_jax.interop.peft.kinds import kind_of
from lora_jax.interop.peft.modules import model_of, prefix_in, resolve
from lora_jax.interop.peft.tensors import PREFIX, all_equal, array_of, check_names, name_in_file, tensors_of, to_delta
from lora_jax.interop.tensor_files import FLOATS, read_file
from lora_jax.methods.arguments import brief
from lora_jax.methods.token_rows import token_rows
from lora_jax.methods.tune import tune


@brief
def load(folder: str | os.PathLike, params: Any) -> tuple[ParamTransform, Delta]:
    """An adapter that PEFT wrote: LoRA, DoRA, PiSSA, VeRA, IA3, LoKr or a registered kind, for any family of `hf.load`.

    `params` are its base's as `interop.hf.load` gives them, in the loop layout (the method works in either).

    Returns:
      `(method, delta)`: `method.apply(params, delta)` is what PEFT computes; the delta is float32, as there. A fused
      layer's A is in it once, under `@shared/`. It also has a trained head, biases and token rows. What DoRA and PiSSA
      take from the base is computed from these params: `fixed_norm`, `fixed_a` and `fixed_b`.

    Raises:
      FileNotFoundError: no such folder, or a file is missing (also where there is only a pickled adapter_model.bin).
      ValueError: a damaged file; a field that is wrong, unknown or unsupported; a missing, extra, misshapen, wrongly
        typed or non-finite tensor; an adapter for another base; a tied embedding that it adapts in one use alone.

    An example is in `save`.
    """
    config_file, file = adapter_files(Path(folder).expanduser())
    config, in_file = folders.read_json(config_file), read_file(file)
    folders.check_not_empty({name: array.shape for name, array in in_file.items()}, file)
    arrays = {name.removeprefix(PREFIX): array for name, array in in_file.items()}
    classifies = config.get("task_type") == "SEQ_CLS" or any(name.startswith("score.") for name in arrays)
    model = model_of(params, prefix_in(arrays, str(file)), classifies, str(file))
    resolved, tensors = _resolve(config, model, str(config_file))
    check_names(tensors, in_file, model, str(file))
    delta = to_delta(tensors, arrays)
    transforms, from_base = resolved.kind.method(resolved)
    for path, factors in from_base.items():
        delta[path] |= factors
    copies = [tensor for tensor in tensors if tensor.copy and tensor.name in arrays]
    for tensor in copies:
        if not np.array_equal(array_of(tensor, delta, model).astype(arrays[tensor.name].dtype), arrays[tensor.name]):
            what = "the base's" if tensor.copy == "base" else "the adapter's own"
            raise ValueError(f"{file}: {PREFIX}{tensor.name} is no copy of {what} {tensor.path}: of another base?")
    if tuned := [tensor.path for tensor in tensors if tensor.factor == "value" and not tensor.copy]:
        transforms = [*transforms, tune(model.select(tuned))]
    for name, indices in resolved.tokens.items():
        transforms = [*transforms, token_rows(select(model.modules[name].path("weight")), indices=indices)]
    method = transforms[0] if len(transforms) == 1 else chain(*transforms)
    dtypes = {name: str(array.dtype) for name, array in sorted(arrays.items()) if array.dtype != np.float32}
    one_dtype = len(set(dtypes.values())) == 1 and len(dtypes) == len(arrays)
    kept = {
        "config": config,
        "prefix": model.prefix,
        "dtypes": next(iter(dtypes.values())) if one_dtype else dtypes,  # those that are not float32
        "copies": sorted(tensor.name for tensor in copies),
    }
    return method._replace(spec=method.spec | {"peft": kept}), delta


@brief
def save(
    folder: str | os.PathLike, method: ParamTransform, delta: Delta, *, params: Any, base: str | None = None
) -> None:
    """Writes an adapter that PEFT's `PeftModel.from_pretrained(base, folder)` loads, as the same function.

    A method of `load` is written as it was read. Otherwise LoRA, DoRA, VeRA, IA3 or LoKr, tuned heads and biases, bias
    deltas, token rows and chains of them take PEFT's form: query, key and value kernels of GPT-2, each with an A of
    its own, become one c_attn of the sum of their ranks and alphas (Hugging Face's layer is fused); where their alpha /
    rank differs, it is multiplied into B. A part of c_attn that is not adapted gets zeros, DoRA's norm of the base, or
    IA3's ones.

    PiSSA becomes LoRA of twice the rank, as PEFT converts it, so that no singular values need be computed again. One
    that `load` read is written as PiSSA, unless the A's of query, key and value differ, of which PEFT has one.

    The folder is made, or its two files are replaced, both or none; other files stay. `params` are the base's, in the
    loop layout; `base` is its name for PEFT's users, where the adapter does not come with one
    (base_model_name_or_path).

    Raises:
      ValueError: something that PEFT cannot represent, by its name; a delta that is not this method's, or not finite.

    >>> import tempfile, jax
    >>> from lora_jax.interop import hf
    >>> from lora_jax.models import gpt2
    >>> model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    >>> params = jax.jit(model.init)(jax.random.key(0), jax.numpy.ones((1, 4), "int32"))["params"]
    >>> import lora_jax as lj
    >>> from lora_jax.interop import peft
    >>> method = lj.lora(lj.select("**/attn/out/kernel"), rank=2)
    >>> delta = method.init(jax.random.key(1), params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     peft.save(folder, method, delta, params=params)
    ...     loaded, same = peft.load(folder, params)
    >>> print(same)
    Delta: 1 paths, 32 numbers
      h_0/attn/out/kernel: a float32(8, 2), b float32(2, 8)
    """
    config, arrays = (_as_loaded if "peft" in method.spec else _exported)(method, delta, params)
    for name, array in arrays.items():
        if str(array.dtype) not in FLOATS:
            raise ValueError(f"{name} is {array.dtype}; an adapter is {', '.join(FLOATS)}")
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{name} has entries that are not finite; an adapter like that is not saved")
    if base and not config.get("base_model_name_or_path"):
        config = {**config, "base_model_name_or_path": base}
    named = {name_in_file(name): array for name, array in arrays.items()}
    with replaced_together(folder, last=CONFIG) as new:
        (new / WEIGHTS).write_bytes(safetensors.numpy.save(named, metadata={"format": "pt"}))
        (new / CONFIG).write_bytes(to_json(config))


def _resolve(config: Mapping[str, Any], model: Model, source: str) -> tuple[Resolved, list[Tensor]]:
    """A config applied to a model, and the tensors of its adapter."""
    kind = kind_of(config, source)
    resolved = resolve(complete(config, kind, source, model.modules), model, source, kind)
    return resolved, tensors_of(resolved)


def _as_loaded(method: ParamTransform, delta: Delta, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and arrays of a method that `load` made."""
    kept, source = method.spec["peft"], "method.spec"
    config = kept["config"]
    classifies = config.get("task_type") == "SEQ_CLS" or any(key.startswith("score/") for key in delta)
    model = model_of(params, kept["prefix"], classifies, source)
    resolved, tensors = _resolve(config, model, source)
    replicated = (tensor for tensor in tensors if tensor.replicated)  # what PEFT has once must still be the same
    if not all(all_equal(delta.get(key, {}).get(factor) for key, factor in tensor.entries) for tensor in replicated):
        return _exported(method, delta, params)
    if _resolve(json.loads(to_json(config)), model, source)[0].adapted != resolved.adapted:
        # Sorting the keys, as PEFT does, made another pattern the first that matches.
        config = config | {
            "rank_pattern": {name: rank for name, (rank, _) in resolved.adapted.items()},
            "alpha_pattern": {name: alpha for name, (_, alpha) in resolved.adapted.items()},
        }
    arrays, dtypes = _arrays(tensors, kept["copies"], delta, model), kept["dtypes"]
    return config, {name: _as_stored(array, name, dtypes) for name, array in arrays.items()}


def _exported(method: ParamTransform, delta: Delta, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and arrays of any other method."""
    model, config, exported = export(method, delta, params)
    _, tensors = _resolve(json.loads(to_json(config)), model, "the adapter")
    # PEFT writes copies of the biases in its own wrappers, and of embeddings and heads adapted by these names.
    by_name = {"embed_tokens", "lm_head"} & {*config["target_modules"]}
    ends = (".bias", ".base_layer.weight") if by_name else (".bias",)
    copies = [tensor.name for tensor in tensors if tensor.copy and tensor.name.endswith(ends)]
    return config, _arrays(tensors, copies, exported, model)


def _arrays(tensors: list[Tensor], copies: list[str], delta: Delta, model: Model) -> dict[str, np.ndarray]:
    expected = {entry for tensor in tensors if not tensor.copy for entry in tensor.entries}
    entries = {(key, factor) for key, factors in delta.items() for factor in factors}
    entries = {entry for entry in entries if entry in expected or not is_frozen(entry[1])}  # of the base
    if wrong := sorted(":".join(entry) for entry in entries ^ expected):
        raise ValueError(f"the delta is not this method's: {', '.join(wrong[:3])} is missing or too much")
    return {t.name: array_of(t, delta, model) for t in tensors if not t.copy or t.name in copies}


def _as_stored(array: np.ndarray, name: str, dtypes: Any) -> np.ndarray:
    """In the dtype that its file had, where that is exact."""
    dtype = dtypes if isinstance(dtypes, str) else dtypes.get(name, "float32")
    cast = array.astype(np.dtype(dtype))
    return cast if np.array_equal(cast.astype(array.dtype), array) else array
