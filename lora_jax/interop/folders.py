"""The files of a Hugging Face folder, and none outside it: JSON, and tensors in safetensors, whole or sharded."""

import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from lora_jax.data import json_files
from lora_jax.interop.lazy import Lazy
from lora_jax.interop.tensor_files import open_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Shapes = Mapping[str, tuple[int, ...]]  # by name


def inside(folder: str | os.PathLike, name: str) -> Path:
    """The path of a file in a folder, whether it exists or not; a ValueError where the name or a link leads out of it.
    Links from `models--x--y/snapshots/<commit>/` into `models--x--y/blobs/`, as in the Hub's cache, are allowed."""
    if not name.isprintable() or "\\" in name or name in ("", ".", "..") or os.path.basename(name) != name:
        raise ValueError(f"{folder}: {name!r} is not the plain name of a file in this folder")
    path = Path(folder) / name
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    is_blob_of_snapshot = any(
        model.name.startswith("models--")
        and home.is_relative_to(model / "snapshots")
        and target.is_relative_to(model / "blobs")
        for model in home.parents
    )
    if not (target.is_relative_to(home) or is_blob_of_snapshot):
        raise ValueError(f"{path} is a symlink to {target}, outside its folder: copy the file here if you trust it")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """`data.json_files.read_json`, and a ValueError where the file is a symlink out of its folder."""
    return json_files.read_json(inside(path.parent, path.name))


def open_tensors(folder: Path, ignored: re.Pattern) -> dict[str, Lazy]:
    """The tensors of the folder's safetensors files, without those of ignored names; they will be read as float32.

    Raises:
      FileNotFoundError: there is no safetensors file (only pickles, perhaps), or a shard is missing.
      ValueError: a file is damaged, outside the folder, or does not hold what the index says; a tensor is of another
        type than float32, float16 and bfloat16, or (when it is read) not finite.
    """
    if inside(folder, WEIGHTS).is_file():
        return _open(folder / WEIGHTS, ignored)
    if inside(folder, INDEX).is_file():
        return _open_shards(folder, ignored)
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} holds {', '.join(pickles)} but no {WEIGHTS}. Pickles can run any code and are not read here; "
            "convert them where you trust them: "
            "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")


def _open_shards(folder: Path, ignored: re.Pattern) -> dict[str, Lazy]:
    index = folder / INDEX
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict):
        raise ValueError(f"{index} has no weight_map")
    if wrong := [name for name, file in file_of.items() if not isinstance(file, str)]:
        raise ValueError(f"{index}: the file of {wrong[0]} is {file_of[wrong[0]]!r}, not a name")
    tensors: dict[str, Lazy] = {}
    for shard in sorted(set(file_of.values())):
        in_shard = _open(inside(folder, shard), ignored)
        expected = {name for name, file in file_of.items() if file == shard and not ignored.fullmatch(name)}
        if differing := sorted(expected ^ set(in_shard)):
            raise ValueError(f"{folder / shard} and {index.name} disagree about {', '.join(differing)}")
        tensors |= in_shard
    return tensors


def _open(path: Path, ignored: re.Pattern) -> dict[str, Lazy]:
    tensors = open_file(path, ignored=ignored)
    check_not_empty({name: tensor.shape for name, tensor in tensors.items()}, path)
    return {name: tensor.astype("float32") for name, tensor in tensors.items()}


def check_not_empty(shapes: Shapes, source: str | os.PathLike) -> None:
    """A ValueError where a tensor has no entries, that says how DeepSpeed writes such."""
    if empty := [name for name, shape in shapes.items() if 0 in shape]:
        raise ValueError(
            f"{source}: tensors without entries: {first_ten(empty)}. Was it saved under DeepSpeed ZeRO-3, which leaves "
            "them so unless it gathers them? Save again with stage3_gather_16bit_weights_on_model_save, or make the "
            "weights from its checkpoint with zero_to_fp32.py"
        )


def check_shapes(
    shapes: Shapes, expected: Shapes, source: str, *, optional: Container[str] = (), of: str = "model"
) -> None:
    """A ValueError that names every missing, extra or misshapen tensor of a model or an adapter, if there is one."""
    wrong = [f"{name} is missing" for name in expected if name not in shapes and name not in optional]
    wrong += [f"{name} is not part of the {of}" for name in shapes if name not in expected]
    both = [name for name in expected if name in shapes]
    wrong += [f"{n} has shape {shapes[n]}, not {expected[n]}" for n in both if shapes[n] != expected[n]]
    if wrong:
        raise ValueError(f"{source}: {first_ten(wrong, '; ')}")


def first_ten(items: list[str], separator: str = ", ") -> str:
    """The items in one line, where they are many the first ten and the number of the others."""
    more = [f"and {len(items) - 10} more"] if len(items) > 10 else []
    return separator.join(items[:10] + more)
