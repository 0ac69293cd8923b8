"""Hugging Face folders, both ways: config.json, model.safetensors and tokenizer.json."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from lora_jax.checkpoints import replaced_together
from lora_jax.core import transforms
from lora_jax.core.arrays import is_adapted
from lora_jax.distributed import processes
from lora_jax.interop.folders import INDEX, WEIGHTS, check_shapes
from lora_jax.interop.hf import encoder, gpt2, llama  # noqa: F401  (they register their formats)
from lora_jax.interop.hf.checks import check_sizes, with_source, without_other_head
from lora_jax.interop.hf.families import Format, HeadOptions, Stored, format_of, layouts
from lora_jax.interop.hf.sources import is_gguf, local, open_source
from lora_jax.interop.lazy import placed, stacked
from lora_jax.interop.tensor_files import FLOATS
from lora_jax.methods.arguments import brief
from lora_jax.models import shapes
from lora_jax.models.family import family_of
from lora_jax.models.layouts import in_stack, to_scanned

Tensors = Iterator[tuple[str, np.ndarray]]
SHARD = 5_000_000_000  # bytes of one file of weights, above which there are several

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@brief
def load(
    folder_or_hub_id: str | os.PathLike,
    *,
    head: str | None = None,
    labels: int | None = None,
    tie: bool | None = None,
    key: Array | None = None,
    scan_layers: bool = False,
    dtype: str = "float32",
    place: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> tuple[nn.Module, dict, Tokenizer | None]:
    """A model, its parameters and its tokenizer from a folder, a GGUF file or the Hugging Face Hub.

    Args:
      folder_or_hub_id: a folder, a file whose name ends in .gguf, or else a name on the Hub ("openai-community/gpt2").
      head: the head that is wanted; made anew, with a warning, where the files have none. GPT-2 has "lm" only, and has
        it anyway unless the files say that it is untied and lack it. Encoders have "classification", "regression", or
        by default what the files have. The head of another task, such as token classification, is left out, with a
        warning, where a head is asked for.
      labels: how many outputs the head has; one of another number is not used. By default as many as the files', and of
        a regression that is new one.
      tie: whether GPT-2's head is the token embedding; None: as config.json says. False copies it.
      key: the key of a head that is made anew; an encoder's has one by default.
      scan_layers, dtype, place: of `read`.

    Returns:
      `(model, params, tokenizer)`: the parameters as nested dicts, by default float32 in the loop layout (`h_0`, ...);
      the tokenizer is None where there is no tokenizer.json, or none in the GGUF file. `model.config` has no dropout,
      whatever config.json says: its rates concern training only. `save(..., like=folder)` writes them again.

    Raises:
      FileNotFoundError: neither such a folder nor such a model, or files are missing.
      ValueError: damaged files; a missing, extra, misshapen or non-finite tensor; a config field that changes the
        function and is not supported; a size that is not the tensors'; a missing head that is not asked for, or the
        head of another task.

    An example is in `save`.
    """
    model, stored, tokenizer = unread(folder_or_hub_id, head=head, labels=labels, tie=tie, key=key)
    if scan_layers:
        model = type(model)(dataclasses.replace(model.config, scan_layers=True))
    return model, read(stored, scan_layers=scan_layers, dtype=dtype, place=place), tokenizer


def unread(
    folder_or_hub_id: str | os.PathLike,
    *,
    head: str | None = None,
    labels: int | None = None,
    tie: bool | None = None,
    key: Array | None = None,
    trained: bool = False,
) -> tuple[Any, dict, Tokenizer | None]:
    """As `load`, in float32 and the loop layout, but the leaves are `lazy.Lazy`: the files are open to look at, names,
    types and shapes are checked, and no weight is read. `trained`: the caller has a trained head for a new one, of
    which then no warning tells.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> from lora_jax.interop import hf
    >>> from lora_jax.models import gpt2
    >>> model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     hf.save(folder, model, params)
    ...     model, stored, tokenizer = hf.unread(folder)
    ...     print(hf.shapes_of(stored)["wte"]["embedding"].shape, hf.untrained(model, folder))
    ...     same = hf.read(stored, dtype="bfloat16")
    (32, 8) ()
    >>> str(same["wte"]["embedding"].dtype)
    'bfloat16'
    """
    source = open_source(local(folder_or_hub_id))
    format, fields, name = source.format, source.fields, source.name
    tensors, options = source.tensors(), HeadOptions(head, labels, tie, key, trained)
    check_sizes(format, format.config_of(fields, name), tensors, name)
    tensors = without_other_head(format, fields, tensors, name, options)
    model, flat = format.from_hf(format, fields, tensors, name, options)
    return model, unflatten_dict(flat, sep="/"), source.tokenizer(model.config.vocab_size)


def read(
    stored: dict,
    *,
    scan_layers: bool = False,
    dtype: str = "float32",
    place: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> dict:
    """The parameters of `unread`, one after the other: the host holds little more than one besides what is read.

    Args:
      stored: of `unread`.
      scan_layers: the layers as stacks, for a model with `scan_layers`.
      dtype: "float32", "bfloat16" or "float16". A classification head, and what is made anew, stay float32: they are
        there to be trained.
      place: where a parameter goes, by its path and shape in the layout asked for; by default JAX's default device.
        Each device's part is read from the files by itself: no parameter is whole anywhere, and a process of several
        reads what its own devices hold.

    Raises:
      ValueError: a file was damaged since; a tensor is not finite, or too large for the dtype.

    An example is in `unread`.
    """
    flat = _in_layout(stored, scan_layers, dtype)
    if place is None:
        return unflatten_dict({path: jnp.asarray(leaf.read()) for path, leaf in flat.items()}, sep="/")
    places = {path: place(path, leaf.shape) for path, leaf in flat.items()}  # all, before the first is read
    return unflatten_dict({path: placed(leaf, places[path]) for path, leaf in flat.items()}, sep="/")


def _in_layout(stored: dict, scan_layers: bool, dtype: str) -> dict[str, Any]:
    """The parameters of `unread` by their paths, not read yet, in a layout and a dtype."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(FLOATS)}")
    flat = {path: leaf.astype(dtype) for path, leaf in flatten_dict(stored, sep="/").items()}
    return to_scanned(flat, stacked) if scan_layers else flat


def shapes_of(stored: dict, *, scan_layers: bool = False, dtype: str = "float32") -> dict:
    """What `read` gives, as ShapeDtypeStructs: nothing is read. An example is in `unread`."""
    flat = _in_layout(stored, scan_layers, dtype)
    return unflatten_dict({path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items()}, sep="/")


def blocks(source: str | os.PathLike, model: nn.Module) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors of a GGUF file as they lie in it: path in the loop layout -> (type, bytes of each row), of parameters
    that are one tensor with a row for each output, or each word. Arguments as `load`'s, and the model that it gave.

    Raises:
      ValueError: the source is no GGUF file.

    An example is in `gguf.open_file`.
    """
    if not is_gguf(path := local(source)):
        raise ValueError(f"{source} is no GGUF file: only such a file has blocks of its own")
    from lora_jax.interop import gguf  # slow to import, and seldom needed

    format, file = format_of(family_of(model).name, str(source)), gguf.open_file(path)
    names = layouts(format.architecture, _shapes(model, scanned=False), prefixed=True)
    matrices = {name for name, tensor in file.tensors.items() if name.endswith("weight") and len(tensor.shape) == 2}
    return {stored.paths[0]: file.raw(name) for name, stored in names.items() if name in matrices}


def without_weights(folder: str | os.PathLike) -> nn.Module:
    """The model that a folder's config.json, or a GGUF file, describes, an encoder without pooler and head; no weights
    are read. Raises what `load` raises of config.json.

    An example is in `save`.
    """
    source = open_source(Path(folder))
    config = source.format.config_of(source.fields, source.name)
    if source.has_weights:
        check_sizes(source.format, config, source.tensors(), source.name)
    return family_of(config).model(config)


def untrained(model: nn.Module, source: str | os.PathLike) -> tuple[str, ...]:
    """Globs of the parameters besides the head that the files lack and `load` makes anew, for every method to train.

    An example is in `unread`.
    """
    format = format_of(family_of(model).name, str(source))
    needed = format.head_needs(model.config)
    names = open_source(local(source)).tensors() if needed else ()
    return tuple(glob for end, glob in needed.items() if not any(name.endswith(end) for name in names))


@brief
def save(
    folder: str | os.PathLike,
    model: nn.Module,
    params: Any,
    tokenizer: Tokenizer | None = None,
    *,
    merge: bool = False,
    like: str | os.PathLike | None = None,
    shard_size: int = SHARD,
) -> None:
    """Writes a folder that `load` and transformers' `from_pretrained` read.

    Parameters of either layout, of float32, float16 or bfloat16, are stored as they are. Files of the same names are
    replaced when all new ones are complete, all or none, and weights under other names that the new ones make obsolete
    are deleted; others stay. A save that is broken off at any moment leaves what `load` reads as the old model or as
    the new one.

    Args:
      folder: made where it is missing.
      model: of `lora_jax.models`.
      params: its parameters, on one device or on many; the host holds one file's at a time. Where they are spread over
        several processes, all call this, and the first one writes.
      tokenizer: for tokenizer.json.
      merge: the parameters are adapted (`method.apply(params, delta)`), and are merged one by one as they are written:
        the files are those of `save(..., lora_jax.merge(params))`.
      like: the folder or the Hub's name of the model that this one was made from. What its config.json says besides
        what the model's config holds is kept: dropout rates, ids of tokens, and where the head is of the same kind and
        size, `id2label` and `problem_type`.
      shard_size: bytes of weights in one file; where there are more, there are several and an index.

    Raises:
      ValueError: the parameters are not the model's (the names and shapes are shown), or cannot be merged; a tensor is
        not finite, such as a merged one beyond float16's range; `like` is of another family.
      TypeError: adapted parameters without `merge`, or a model of no known family.

    >>> import tempfile, jax
    >>> from lora_jax.interop import hf
    >>> from lora_jax.models import gpt2
    >>> model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    >>> params = jax.jit(model.init)(jax.random.key(0), jax.numpy.ones((1, 4), "int32"))["params"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     hf.save(folder, model, params)
    ...     loaded, same, tokenizer = hf.load(folder)
    ...     described = hf.without_weights(folder)
    >>> loaded.config == described.config == model.config
    True
    """
    format = format_of(family_of(model).name, str(folder))
    leaves = flatten_dict(jax.eval_shape(transforms.merge, params) if merge else params, sep="/")
    scanned = any(path.startswith("h/") for path in leaves)
    check_shapes({path: leaf.shape for path, leaf in leaves.items()}, _shapes(model, scanned), "params")
    for leaf in leaves.values():
        if is_adapted(leaf):
            np.asarray(leaf)  # an error that says how to merge it
    dtypes = {str(leaf.dtype) for leaf in leaves.values()}
    fields = format.fields_of(model.config)  # type: ignore[attr-defined]
    fields["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    if like is not None:
        fields = _with_source(format, fields, like)
    names = layouts(format.architecture, _shapes(model, scanned=False), prefixed=True)
    tensors = _tensors(flatten_dict(params, sep="/"), names, scanned)
    spread = any(isinstance(x, Array) and not x.is_fully_addressable for x in jax.tree.leaves(params))
    if not spread or jax.process_index() == 0:
        _write(Path(folder), fields, tensors, tokenizer, shard_size)
    else:
        for _ in tensors:  # takes its part in bringing them together
            pass
    if spread:
        multihost_utils.sync_global_devices(f"written {folder}")


def _with_source(format: Format, fields: dict[str, Any], like: str | os.PathLike) -> dict[str, Any]:
    source = open_source(local(like)).fields
    if source["model_type"] != fields["model_type"]:
        raise ValueError(f"like={like} is a {source['model_type']}, but the model is a {fields['model_type']}")
    return with_source(format, fields, source)


def _shapes(model: Any, scanned: bool) -> dict[str, tuple[int, ...]]:
    return shapes.of_params(type(model)(dataclasses.replace(model.config, scan_layers=scanned)))


def _tensors(flat: dict[str, Any], names: dict[str, Stored], scanned: bool) -> Tensors:
    """The tensors of the files one by one; those of one stack follow one another, so that it is merged once."""
    groups: dict[tuple[str, ...], list[tuple[str, int | None, Stored]]] = {}
    for name, layout in names.items():
        layer_of_path = [in_stack(path) if scanned else (path, None) for path in layout.paths]
        groups.setdefault(tuple(path for path, _ in layer_of_path), []).append((name, layer_of_path[0][1], layout))
    for paths, tensors in groups.items():
        leaves = [_merged(flat[path]) for path in paths]
        for name, layer, layout in tensors:
            parts = (processes.on_host(leaf if layer is None else leaf[layer]) for leaf in leaves)
            tensor = layout.join(*parts)
            if not np.isfinite(tensor).all():
                limit = f", or beyond the range of {tensor.dtype}" if tensor.itemsize < 4 else ""
                raise ValueError(f"{name} has entries that are not finite{limit}: a model like that is not saved")
            yield name, tensor


def _merged(leaf: Any) -> Any:
    """What is adapted, dense: where its base lies, if that is on many devices."""
    place = getattr(leaf.base, "sharding", None) if is_adapted(leaf) else None
    if place is None or len(place.device_set) == 1:
        return transforms.merge(leaf) if is_adapted(leaf) else leaf
    return jax.jit(transforms.merge, out_shardings=place)(leaf)


def _write(folder: Path, fields: dict, tensors: Tensors, tokenizer: Tokenizer | None, shard_size: int) -> None:
    with replaced_together(folder, last="config.json", obsolete=_WEIGHTS.fullmatch) as new:
        (new / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        _write_weights(new, tensors, shard_size)
        if tokenizer is not None:
            (new / "tokenizer.json").write_bytes(tokenizer.to_str(pretty=True).encode())


def _write_weights(folder: Path, tensors: Tensors, shard_size: int) -> None:
    """One file, or several and their index."""
    shards: list[list[str]] = []  # the tensors of each
    size = parameters = 0
    for held in _packed(tensors, shard_size):
        file = folder / f"{len(shards)}.safetensors"
        try:
            save_file(held, file, metadata={"format": "pt"})
        except SafetensorError as error:  # of the disk: what is held is valid
            raise OSError(f"{file.name}: {error}") from error
        shutil.copymode(folder / "config.json", file)  # the library: for the owner alone
        shards.append(list(held))
        size += sum(tensor.nbytes for tensor in held.values())
        parameters += sum(tensor.size for tensor in held.values())
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    for n, name in enumerate(names):
        (folder / f"{n}.safetensors").rename(folder / name)
    if count > 1:
        file_of = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _packed(tensors: Tensors, most: int) -> Iterator[dict[str, np.ndarray]]:
    """As many tensors at a time as fit into `most` bytes, but one at least."""
    held: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > most:
            yield held
            held.clear()  # here, not a new one: the reader still has this one
        held[name] = tensor
    yield held
