"""The tensors of a Hugging Face folder: safetensors, whole or sharded; strict and without pickles."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("float32", "float16", "bfloat16")


def read_json(path: Path) -> dict:
    """A JSON object from a file; a missing or broken one is an error that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder is no Hugging Face model")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def read_tensors(folder: Path, ignored: re.Pattern) -> dict[str, np.ndarray]:
    """The tensors of the folder's safetensors files, as float32, but for the ignored names.

    Raises:
      FileNotFoundError: there is no safetensors file (only pickles, perhaps), or a shard is missing.
      ValueError: a file is damaged, or does not hold what the index says; a tensor is of another
        type than float32, float16 and bfloat16, or not finite.
    """
    if (folder / WEIGHTS).is_file():
        return _read(folder / WEIGHTS, ignored)
    if (folder / INDEX).is_file():
        return _read_shards(folder, ignored)
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} holds {', '.join(pickles)} but no {WEIGHTS}. Pickles can run any code and are "
            "not read here; convert them where you trust them: transformers."
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")


def _read_shards(folder: Path, ignored: re.Pattern) -> dict[str, np.ndarray]:
    index = folder / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict):
        raise ValueError(f"{index} has no weight_map")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(where.values())):
        found = _read(folder / shard, ignored)
        named = {name for name, file in where.items() if file == shard and not ignored.fullmatch(name)}
        if wrong := sorted(named ^ set(found)):
            raise ValueError(f"{folder / shard} and {index.name} disagree about {', '.join(wrong)}")
        tensors |= found
    return tensors


def _read(path: Path, ignored: re.Pattern) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if not ignored.fullmatch(name)]
            return {name: _float32(file.get_tensor(name), name, path) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): fetch it again") from error


def _float32(tensor: np.ndarray, name: str, path: Path) -> np.ndarray:
    if str(tensor.dtype) not in _FLOATS:
        raise ValueError(f"{path}: {name} is {tensor.dtype}, not float32, float16 or bfloat16")
    tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} has entries that are not finite")
    return tensor


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """A ValueError that names every missing, extra or misshapen tensor, if there is one."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is not part of the model" for name in found if name not in expected]
    wrong += [
        f"{name} has shape {found[name]}, not {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ValueError(f"{source}: " + "; ".join(wrong[:10] + more))
