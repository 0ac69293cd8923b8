"""The files of a Hugging Face folder, and none outside it: JSON, and tensors in safetensors, whole or sharded."""

import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from lora_jax.interop.lazy import Lazy
from lora_jax.interop.tensor_files import LARGEST_JSON, open_file, parse_json

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
    """A JSON object from a file, as strict as `tensor_files.parse_json`; a FileNotFoundError where there is none, and a
    ValueError where it is larger than 16 MiB, no JSON object, or a symlink out of its folder."""
    path = inside(path.parent, path.name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path} is no JSON that is read here: {size} bytes, more than {LARGEST_JSON}")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


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
    return {name: tensor.astype("float32") for name, tensor in open_file(path, ignored=ignored).items()}


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
