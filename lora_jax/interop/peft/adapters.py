"""PEFT's adapters, both ways: a folder of adapter_config.json and adapter_model.safetensors.

    model, params, tokenizer = hf.load("gpt2-folder")
    method, delta = peft.load("adapter-folder", params)
    peft.save("another-folder", method, delta, params=params)

What PEFT saved, loaded and saved again comes back byte for byte; `method.spec["peft"]` keeps what the arrays do not
say. Reading is strict: where PEFT warns, or loads a part and says nothing, this is an error.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lora_jax.checkpoints import write_atomically
from lora_jax.core.selection import select
from lora_jax.core.transforms import Delta, ParamTransform, chain
from lora_jax.interop.folders import inside, read_json
from lora_jax.interop.peft import config as peft_config
from lora_jax.interop.peft import export as peft_export
from lora_jax.interop.peft.kind import Family, selected
from lora_jax.interop.peft.kinds import family_of
from lora_jax.interop.peft.modules import Meant, Model, model_of, prefix_in, resolve
from lora_jax.interop.peft.tensors import (
    PREFIX,
    Tensor,
    alike,
    array_of,
    check_names,
    check_tie,
    filed,
    planned,
    to_delta,
)
from lora_jax.interop.tensor_files import FLOATS, read_file
from lora_jax.methods.rows import rows
from lora_jax.methods.tune import tune

_WEIGHTS = "adapter_model.safetensors"


def load(folder: str | os.PathLike, params: Any) -> tuple[ParamTransform, Delta]:
    """An adapter that PEFT wrote, for GPT-2, RoBERTa or BERT: LoRA, DoRA, PiSSA, VeRA, IA3 or LoKr.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      params: of its base as `interop.hf.load` gives them, in the loop layout (the method goes with either).

    Returns:
      `(method, delta)`: `method.apply(params, delta)` is what PEFT computes; the delta is float32, as there. A fused
      layer's A stands once in it, under `@shared/`. A trained head, biases and token rows are in it too. What DoRA and
      PiSSA take from the base is computed from these params: `fixed_norm`, `fixed_a` and `fixed_b`.

    Raises:
      FileNotFoundError: no such folder, or a file is missing (also where there is only a pickled adapter_model.bin).
      ValueError: a damaged file; a field that is wrong, unknown or unsupported; a missing, extra, misshapen, wrongly
        typed or non-finite tensor; an adapter for another base; a tied embedding that it adapts in one use alone.
    """
    folder = Path(folder)
    config = peft_config.find(folder)
    file = _weights(folder)
    found = read_json(config)
    family = family_of(found, str(config))
    fields = peft_config.complete(found, family.schema, str(config))
    arrays, _ = read_file(file)
    names = [name.removeprefix(PREFIX) for name in arrays]
    scored = fields["task_type"] == "SEQ_CLS" or any(name.startswith("score.") for name in names)
    model = model_of(params, prefix_in(names, str(file)), scored, str(file))
    meant, tensors = _planned(family, fields, model, str(config))
    check_names(tensors, arrays, model, str(file))
    arrays = {name.removeprefix(PREFIX): array for name, array in arrays.items()}
    delta = to_delta(tensors, arrays)
    own, fixed = family.method(meant, fields, model)
    for path, factors in fixed.items():
        delta[path] |= factors
    kept: dict[str, Any] = {"config": found, "prefix": model.prefix, "dtypes": _other_dtypes(arrays)}
    kept["copies"] = sorted(_checked_copies(tensors, arrays, delta, model, str(file)))
    method = _method(meant, tensors, own, model)
    return method._replace(spec=method.spec | {"peft": kept}), delta


def save(folder: str | os.PathLike, method: ParamTransform, delta: Delta, *, params: Any) -> None:
    """Writes an adapter that PEFT's `PeftModel.from_pretrained(base, folder)` loads, as the same function.

    A method of `load` goes back as it came. Otherwise LoRA, DoRA, VeRA, IA3 or LoKr, tuned heads and biases, `shift`
    and `rows`, and chains of them, take PEFT's form: query, key and value kernels of GPT-2, each with an A of its own,
    become one c_attn of the sum of their ranks and alphas (Hugging Face's layer is fused); where their alpha / rank
    differs, it goes into B. A part of c_attn that is not adapted gets zeros, DoRA's norm of the base, or IA3's ones.

    PiSSA becomes LoRA of twice the rank, as PEFT converts it, so that no singular value need be found again. One that
    `load` found goes back as PiSSA; as LoRA too, once the A's of query, key and value differ, for there PEFT has one.

    Args:
      folder: is made, or its two files are replaced; others stay.
      params: of the base, in the loop layout.

    Raises:
      ValueError: something that PEFT has no form for, by its name; a delta that is not this method's, or not finite.
    """
    config, arrays = (_of_peft if "peft" in method.spec else _ours)(method, delta, params)
    for name, array in arrays.items():
        if str(array.dtype) not in FLOATS:
            raise ValueError(f"{name} is {array.dtype}; an adapter is {', '.join(FLOATS)}")
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{name} has entries that are not finite; an adapter like that is not saved")
    named = {filed(name): array for name, array in arrays.items()}
    content = safetensors.numpy.save(named, metadata={"format": "pt"})
    write_atomically(Path(folder) / _WEIGHTS, content)
    write_atomically(Path(folder) / peft_config.CONFIG, peft_config.written(config))


def _planned(family: Family, fields: Mapping[str, Any], model: Model, source: str) -> tuple[Meant, list[Tensor]]:
    """What a config means on a model, and the tensors of its adapter."""
    meant = resolve(fields, model, source, family.rules)
    check_tie(meant, model, source)
    return meant, planned(family.tensors(meant, fields, model, source), meant, fields, model, source)


def _weights(folder: Path) -> Path:
    path = inside(folder, _WEIGHTS)
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").exists():
        raise FileNotFoundError(
            f"{folder} holds adapter_model.bin but no {_WEIGHTS}. Pickles can run any code and are not read here; "
            "convert it where you trust it: peft.PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{path} is missing")


def _other_dtypes(arrays: Mapping[str, np.ndarray]) -> Any:
    """The dtypes that are not float32: one name for all, or {tensor: name}."""
    dtypes = {name: str(array.dtype) for name, array in sorted(arrays.items()) if array.dtype != np.float32}
    kinds = set(dtypes.values())
    return kinds.pop() if len(kinds) == 1 and len(dtypes) == len(arrays) else dtypes


def _checked_copies(
    tensors: Iterable[Tensor], arrays: Mapping[str, np.ndarray], delta: Delta, model: Model, source: str
) -> list[str]:
    """The names of the copies that a file holds; a ValueError where one differs from what it is a copy of."""
    found = [tensor for tensor in tensors if tensor.copy and tensor.name in arrays]
    for tensor in found:
        stored, original = arrays[tensor.name], array_of(tensor, delta, model)
        if not np.array_equal(original.astype(stored.dtype), stored):
            what = "the base's" if tensor.copy == "base" else "the adapter's own"
            raise ValueError(f"{source}: {PREFIX}{tensor.name} is no copy of {what} {tensor.path}: of another base?")
    return [tensor.name for tensor in found]


def _method(meant: Meant, tensors: list[Tensor], own: list[ParamTransform], model: Model) -> ParamTransform:
    """The transform that a config means: of the adapted modules, and of what trains beside them."""
    methods = list(own)
    if tuned := [tensor.path for tensor in tensors if tensor.factor == "value" and not tensor.copy]:
        methods.append(tune(selected(tuned, model)))
    for name, indices in meant.tokens.items():
        methods.append(rows(select(model.modules[name].path("weight")), indices=indices))
    return methods[0] if len(methods) == 1 else chain(*methods)


def _of_peft(method: ParamTransform, delta: Delta, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and arrays of a method that `load` made."""
    kept = method.spec["peft"]
    config, family = kept["config"], family_of(kept["config"], "method.spec")
    fields = peft_config.complete(config, family.schema, "method.spec")
    scored = fields["task_type"] == "SEQ_CLS" or any(key.startswith("score/") for key in delta)
    model = model_of(params, kept["prefix"], scored, "method.spec")
    meant, tensors = _planned(family, fields, model, "method.spec")
    if fields.get("init_lora_weights") == "pissa" and not all(_one(tensor, delta) for tensor in tensors):
        return _ours(method, delta, params)
    if resolve(peft_config.complete(_reread(config), family.schema, ""), model, "", family.rules) != meant:
        # Sorting the keys, as PEFT does, made another pattern the first that matches.
        config = config | {
            "rank_pattern": {name: rank for name, (rank, _) in meant.adapted.items()},
            "alpha_pattern": {name: alpha for name, (_, alpha) in meant.adapted.items()},
        }
    arrays = _arrays(tensors, kept["copies"], delta, model)
    return config, {name: _as_stored(array, name, kept["dtypes"]) for name, array in arrays.items()}


def _one(tensor: Tensor, delta: Delta) -> bool:
    """Whether what PEFT has once is still one thing in the delta."""
    return not tensor.alike or alike(delta.get(key, {}).get(factor) for key, factor in tensor.places)


def _reread(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it will be read from its file."""
    return json.loads(peft_config.written(config))


def _ours(method: ParamTransform, delta: Delta, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and arrays of any other method."""
    model, config, made = peft_export.export(method, delta, params)
    family = family_of(config, "the adapter")
    fields = peft_config.complete(_reread(config), family.schema, "the adapter")
    _, tensors = _planned(family, fields, model, "the adapter")
    # PEFT writes the biases in its own wrappers along, and the weights of a head that is named so.
    head = "lm_head" in fields["target_modules"]
    ends = (".bias", ".base_layer.weight") if head else (".bias",)
    copies = [tensor.name for tensor in tensors if tensor.copy and tensor.name.endswith(ends)]
    return config, _arrays(tensors, copies, made, model)


def _arrays(tensors: list[Tensor], copies: list[str], delta: Delta, model: Model) -> dict[str, np.ndarray]:
    want = {place for tensor in tensors if not tensor.copy for place in tensor.places}
    have = {(key, factor) for key, factors in delta.items() for factor in factors}
    have = {place for place in have if place in want or not place[1].startswith("fixed_")}  # those are of the base
    if wrong := sorted(":".join(place) for place in have ^ want):
        raise ValueError(f"the delta is not this method's: it lacks, or has besides, {', '.join(wrong[:3])}")
    return {t.name: array_of(t, delta, model) for t in tensors if not t.copy or t.name in copies}


def _as_stored(array: np.ndarray, name: str, dtypes: Any) -> np.ndarray:
    """In the dtype that its file had, where that loses nothing."""
    dtype = dtypes if isinstance(dtypes, str) else dtypes.get(name, "float32")
    cast = array.astype(np.dtype(dtype))
    return cast if np.array_equal(cast.astype(array.dtype), array) else array
