"""PEFT's adapters, both ways: a folder of adapter_config.json and adapter_model.safetensors.

    model, params, tokenizer = hf.load("gpt2-folder")
    method, delta = peft.load("adapter-folder", params)
    peft.save("another-folder", method, delta, params=params)

What PEFT saved, loaded and saved again comes back byte for byte; `method.spec["peft"]` keeps what the arrays do not
say. Reading is strict: where PEFT warns, or loads a part and says nothing, this is an error.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lora_jax.checkpoints import write_atomically
from lora_jax.interop import peft_config, peft_export
from lora_jax.interop.folders import inside
from lora_jax.interop.peft_modules import Meant, Model, model_of, prefix_in, resolve
from lora_jax.interop.peft_tensors import PREFIX, Tensor, array_of, check_names, planned, to_delta
from lora_jax.interop.tensor_files import FLOATS, read_file
from lora_jax.methods.lora import lora
from lora_jax.methods.rows import rows
from lora_jax.methods.shift import shift
from lora_jax.methods.tune import tune
from lora_jax.selection import Selection, select
from lora_jax.transforms import Delta, ParamTransform, chain

_WEIGHTS = "adapter_model.safetensors"
_SCANNED = {"h/**/kernel": "sio", "h/**/{bias,scale}": "so"}  # so that the method also meets params in that layout


def load(folder: str | os.PathLike, params: Any) -> tuple[ParamTransform, Delta]:
    """A LoRA adapter that PEFT wrote, for GPT-2, RoBERTa or BERT.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      params: of its base as `interop.hf.load` gives them, in the loop layout (the method goes with either).

    Returns:
      `(method, delta)`: `method.apply(params, delta)` is what PEFT computes; the delta is float32, as there. A fused
      layer's A stands once in it, under `@shared/`. A trained head, biases and token rows are in it too.

    Raises:
      FileNotFoundError: no such folder, or a file is missing (also where there is only a pickled adapter_model.bin).
      ValueError: a damaged file; a field that is wrong, unknown or unsupported; a missing, extra, misshapen, wrongly
        typed or non-finite tensor; an adapter for another base; a tied embedding that it adapts in one use alone.
    """
    folder = Path(folder)
    config = peft_config.find(folder)
    file = _weights(folder)
    found = peft_config.read(config)
    fields = peft_config.complete(found, str(config))
    arrays, _ = read_file(file)
    names = [name.removeprefix(PREFIX) for name in arrays]
    scored = fields["task_type"] == "SEQ_CLS" or any(name.startswith("score.") for name in names)
    model = model_of(params, prefix_in(names, str(file)), scored, str(file))
    meant = resolve(fields, model, str(config))
    tensors = planned(meant, fields, model, str(config))
    check_names(tensors, arrays, model, str(file))
    arrays = {name.removeprefix(PREFIX): array for name, array in arrays.items()}
    delta = to_delta(tensors, arrays)
    kept: dict[str, Any] = {"config": found, "prefix": model.prefix, "dtypes": _other_dtypes(arrays)}
    kept["copies"] = sorted(_checked_copies(tensors, arrays, delta, model, str(file)))
    method = _method(meant, tensors, fields, model)
    return method._replace(spec=method.spec | {"peft": kept}), delta


def save(folder: str | os.PathLike, method: ParamTransform, delta: Delta, *, params: Any) -> None:
    """Writes an adapter that PEFT's `PeftModel.from_pretrained(base, folder)` loads, as the same function.

    A method of `load` goes back as it came. Otherwise LoRA, tuned heads and biases, `shift` and `rows`, and chains of
    them, take PEFT's form: query, key and value kernels of GPT-2, each with an A of its own, become one c_attn of the
    sum of their ranks and alphas (Hugging Face's layer is fused); where their alpha / rank differs, it goes into B.

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
    named = {PREFIX + name: array for name, array in arrays.items()}
    content = safetensors.numpy.save(named, metadata={"format": "pt"})
    write_atomically(Path(folder) / _WEIGHTS, content)
    write_atomically(Path(folder) / peft_config.CONFIG, peft_config.written(config))


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


def _method(meant: Meant, tensors: list[Tensor], fields: Mapping[str, Any], model: Model) -> ParamTransform:
    """The transform that a config means."""
    ranks, alphas, wide = {}, {}, False
    for name, (rank, alpha) in meant.adapted.items():
        path, most = model.modules[name].path("weight"), min(model.shape(model.modules[name], "weight"))
        ranks[path], alphas[path] = rank, alpha
        if rank > most:
            wide = True
            logging.warning("the adapter of %s has rank %d, more than min(in, out) = %d", name, rank, most)
    scales = {
        path: alpha / (ranks[path] ** 0.5 if fields["use_rslora"] else ranks[path]) for path, alpha in alphas.items()
    }
    methods = [
        lora(
            _select(ranks, model),
            rank=_by_glob(ranks, model),
            alpha=_by_glob(alphas, model),
            dropout=float(fields["lora_dropout"]),
            scale_rule="alpha/sqrt(r)" if fields["use_rslora"] else "alpha/r",
            shared=_globs([path for path in ranks if "{" in path], model),
            strict=not wide,
        )
    ]
    of = {factor: [t for t in tensors if t.factor == factor and not t.copy] for factor in ("shift", "value", "rows")}
    if of["shift"]:
        biases = {
            model.modules[name].path("bias"): scales[model.modules[name].path("weight")] for name in meant.adapted
        }
        methods.append(shift(_select(biases, model), scale=_by_glob(biases, model)))
    if of["value"]:
        methods.append(tune(_select([tensor.path for tensor in of["value"]], model)))
    for name, indices in meant.tokens.items():
        methods.append(rows(select(model.modules[name].path("weight")), indices=indices))
    return methods[0] if len(methods) == 1 else chain(*methods)


def _select(paths: Iterable[str], model: Model) -> Selection:
    return select(*_globs(paths, model), axes=_SCANNED)


def _globs(paths: Iterable[str], model: Model) -> list[str]:
    """Globs of these paths, and of no others: `**/attn/out/kernel` where all layers have it."""
    layers: dict[str, list[str]] = {}
    for path in paths:
        found = re.fullmatch(r"h_(\d+)/(.+)", path)
        layers.setdefault(found[2] if found else path, []).append(found[1] if found else "")
    globs = []
    for rest, numbers in layers.items():
        if numbers == [""]:
            globs.append(rest)
        elif len(numbers) == model.depth:
            globs.append(f"**/{rest}")
        else:
            which = numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}"
            globs.append(f"h_{which}/{rest}")
    return globs


def _by_glob(values: Mapping[str, Any], model: Model) -> Any:
    """The one value of all paths, or a mapping glob -> value."""
    distinct = list(dict.fromkeys(values.values()))
    if len(distinct) == 1:
        return distinct[0]
    return {
        glob: value for value in distinct for glob in _globs([path for path in values if values[path] == value], model)
    }


def _of_peft(method: ParamTransform, delta: Delta, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and arrays of a method that `load` made."""
    kept = method.spec["peft"]
    config, fields = kept["config"], peft_config.complete(kept["config"], "method.spec")
    scored = fields["task_type"] == "SEQ_CLS" or any(key.startswith("score/") for key in delta)
    model = model_of(params, kept["prefix"], scored, "method.spec")
    meant = resolve(fields, model, "method.spec")
    if resolve(peft_config.complete(_reread(config), "method.spec"), model, "method.spec") != meant:
        # Sorting the keys, as PEFT does, made another pattern the first that matches.
        config = config | {
            "rank_pattern": {name: rank for name, (rank, _) in meant.adapted.items()},
            "alpha_pattern": {name: alpha for name, (_, alpha) in meant.adapted.items()},
        }
    arrays = _arrays(planned(meant, fields, model, "method.spec"), kept["copies"], delta, model)
    return config, {name: _as_stored(array, name, kept["dtypes"]) for name, array in arrays.items()}


def _reread(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it will be read from its file."""
    return json.loads(peft_config.written(config))


def _ours(method: ParamTransform, delta: Delta, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and arrays of any other method."""
    model, config, made = peft_export.export(method, delta, params)
    fields = peft_config.complete(_reread(config), "the adapter")
    tensors = planned(resolve(fields, model, "the adapter"), fields, model, "the adapter")
    # PEFT writes the biases in its own wrappers along, and the weights of a head that is named so.
    head = "lm_head" in fields["target_modules"]
    ends = (".bias", ".base_layer.weight") if head else (".bias",)
    copies = [tensor.name for tensor in tensors if tensor.copy and tensor.name.endswith(ends)]
    return config, _arrays(tensors, copies, made, model)


def _arrays(tensors: list[Tensor], copies: list[str], delta: Delta, model: Model) -> dict[str, np.ndarray]:
    have = {(key, factor) for key, factors in delta.items() for factor in factors}
    want = {place for tensor in tensors if not tensor.copy for place in tensor.places}
    if wrong := sorted(":".join(place) for place in have ^ want):
        raise ValueError(f"the delta is not this method's: it lacks, or has besides, {', '.join(wrong[:3])}")
    return {t.name: array_of(t, delta, model) for t in tensors if not t.copy or t.name in copies}


def _as_stored(array: np.ndarray, name: str, dtypes: Any) -> np.ndarray:
    """In the dtype that its file had, where that loses nothing."""
    dtype = dtypes if isinstance(dtypes, str) else dtypes.get(name, "float32")
    cast = array.astype(np.dtype(dtype))
    return cast if np.array_equal(cast.astype(array.dtype), array) else array
