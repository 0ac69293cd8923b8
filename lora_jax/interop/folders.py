"""The files of a Hugging Face folder, and none outside it: JSON, and tensors in safetensors, whole or sharded."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.interop.lazy import Lazy
from lora_jax.interop.tensor_files import LARGEST_JSON, open_file, parse_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Recipe(NamedTuple):
    """How a tensor of a folder is made of parameters: `make(*arrays)` of the arrays at `paths` of the loop layout."""

    paths: tuple[str, ...]
    make: Callable[..., Any]


def inside(folder: str | os.PathLike, name: str) -> Path:
    """The path of a file in a folder, whether it exists or not.

    Raises:
      ValueError: the name or a symlink leads out of the folder. Links from `models--x--y/snapshots/<commit>/` into
        `models--x--y/blobs/`, the layout of the Hub's cache, are allowed.
    """
    if not name.isprintable() or "\\" in name or name in ("", ".", "..") or os.path.basename(name) != name:
        raise ValueError(f"{folder}: {name!r} is not the plain name of a file in this folder")
    path = Path(folder) / name
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if not target.is_relative_to(home) and not _in_same_cache(target, home):
        raise ValueError(f"{path} is a symlink to {target}, outside its folder: copy the file here if you trust it")
    return path


def _in_same_cache(target: Path, home: Path) -> bool:
    """Whether `home` is a snapshot in the Hub's cache, and `target` a blob of the same model."""
    return any(
        model.name.startswith("models--")
        and home.is_relative_to(model / "snapshots")
        and target.is_relative_to(model / "blobs")
        for model in home.parents
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, as strict as `tensor_files.parse_json`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is larger than 16 MiB, no JSON object, or a symlink out of its folder.
    """
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
            f"{folder} holds {', '.join(pickles)} but no {WEIGHTS}. Pickles can run any code and are "
            "not read here; convert them where you trust them: transformers."
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
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
    tensors, _ = open_file(path, ignored=ignored)
    return {name: tensor.astype("float32") for name, tensor in tensors.items()}


def check_fields(fields: Mapping[str, Any], only: Mapping[str, Any], source: str) -> None:
    """A ValueError where a field of config.json has another value than the one that is supported."""
    for name, value in only.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{source}: config.json has {name}={fields[name]!r}; only {value!r} is supported")


def check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """A ValueError that names every missing, extra or misshapen tensor, if there is one."""
    wrong = [f"{name} is missing" for name in expected if name not in shapes]
    wrong += [f"{name} is not part of the model" for name in shapes if name not in expected]
    wrong += [
        f"{name} has shape {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ValueError(f"{source}: " + "; ".join(wrong[:10] + more))
