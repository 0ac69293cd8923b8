"""The base of a config: what train, evaluate and generate begin with."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict
from tokenizers import Tokenizer

import lora_jax as lj
from lora_jax import Delta, ParamTransform, checkpoints
from lora_jax.core.globs import matches_any
from lora_jax.core.selection import CLASS, flatten, look_up
from lora_jax.distributed import processes, sharding
from lora_jax.interop import hf
from lora_jax.models.family import family_of, function_fields
from lora_jax.models.layouts import in_stack
from lora_jax.quantized.arrays import from_gguf
from lora_jax.quantized.kinds import GGUF
from lora_jax.runs.tasks import Task, task_in

PUBLIC = "huggingface.co/gpt2, gpt2-medium, gpt2-large, FacebookAI/roberta-base and FacebookAI/roberta-large"


class Base(NamedTuple):
    """A pretrained model, computed as the config says (dtype, scan_layers, remat)."""

    model: Any  # of lora_jax.models
    params: Any
    tokenizer: Tokenizer  # special tokens in texts are ordinary characters to it
    identity: dict[str, Any]  # `checkpoints.identity`, of config and tokenizer too
    placement: sharding.Placement
    new: tuple[str, ...] = ()  # globs of what the source lacks and every method has to train

    @property
    def source(self) -> str:
        """Where it was loaded from."""
        return self.identity["source"]

    def __repr__(self) -> str:
        return f"Base({self.source})"


def mesh_of(config: ConfigDict) -> Mesh:
    """The mesh that a config says, over the devices of all processes; a ValueError where there are fewer devices, or a
    process has none of them."""
    mesh = sharding.make_mesh(config.mesh.to_dict())
    processes.check_mesh(mesh)
    return mesh


class Unread(NamedTuple):
    """A base whose files are open and of which no weight is read."""

    model: Any
    shapes: Any  # of the params, ShapeDtypeStructs
    new: tuple[str, ...]  # of `Base`
    read: Callable[[], Base]


def load(
    config: ConfigDict,
    source: str | None = None,
    mesh: Mesh | None = None,
    task: Task | None = None,
    *,
    head_trained: bool = False,
) -> Base:
    """The base at `source`, or where the config says; with the head of the task (by default the config's), new unless
    it is there. The identity is the same whatever the mesh, the layout and the dtype.

    With a mesh of several devices each device's part of a parameter is read from the files by itself, by its family's
    rules: no process holds all of a parameter. `head_trained`: a trained head replaces a new one, which no warning
    then names.

    Raises:
      FileNotFoundError: it or its tokenizer is not there.
      ValueError: a model of another kind than the config's task.
    """
    return unread(config, source, mesh, task, head_trained=head_trained).read()


def unread(
    config: ConfigDict,
    source: str | None = None,
    mesh: Mesh | None = None,
    task: Task | None = None,
    *,
    head_trained: bool = False,
) -> Unread:
    """The base that `load` gives, before a weight is read; arguments and errors as there."""
    source, task = source or config.base, task or task_in(config)
    if not source:
        kinds = "a folder with config.json, model.safetensors and tokenizer.json, a GGUF file, or a name on the Hub"
        raise ValueError(f"the config names no base: {kinds}")
    head = {**task.head, "key": jax.random.key(config.seed), "trained": head_trained} if task.head else {}
    try:
        stored_model, stored, tokenizer = hf.unread(source, **head)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. The paper's bases are public: {PUBLIC}") from None
    if tokenizer is None:
        raise FileNotFoundError(
            f"{source} has no tokenizer: a folder needs the base's tokenizer.json, a GGUF file its own"
        )
    tokenizer.encode_special_tokens = True  # as `data.tokenizing.plain`, which then makes no copies
    check_task(stored_model, config.data.name, source, task)
    new = hf.untrained(stored_model, source)
    mesh = sharding.make_mesh({}) if mesh is None else mesh
    settings = dataclasses.replace(stored_model.config, **model_fields(config, stored_model.config))
    model = sharding.on_mesh(type(stored_model)(settings), mesh)
    placement = sharding.Placement.of(model, mesh)
    shapes = hf.shapes_of(stored, scan_layers=settings.scan_layers, dtype=settings.param_dtype)

    def read() -> Base:
        params, digests = _read(config, model, stored, placement, source, new, tokenizer)
        return Base(model, params, tokenizer, digests, placement, new)

    return Unread(model, shapes, new, read)


def _read(
    config: ConfigDict,
    model: Any,
    stored: Any,
    placement: sharding.Placement,
    source: str,
    new: tuple[str, ...],
    tokenizer: Tokenizer,
) -> tuple[Any, dict[str, Any]]:
    """Parameters and identity of a base."""
    mesh, settings = placement.mesh, model.config

    def place(path: str, shape: tuple[int, ...]) -> Sharding:
        return placement.shardings({path: jax.ShapeDtypeStruct(shape, jnp.float32)})[path]

    layout = {"scan_layers": settings.scan_layers, "dtype": settings.param_dtype}
    params = hf.read(stored, **layout, place=None if mesh.size == 1 else place)
    # Digests are of the loop layout in float32: what was read otherwise is read again for them, tensor by tensor.
    as_digested = mesh.size == 1 and layout == {"scan_layers": False, "dtype": "float32"}
    # no other process reads all of it
    digests = processes.on_primary(lambda: identity(model, params if as_digested else stored, source, new, tokenizer))
    if bits := config.model.get("base_bits"):
        params, digests = quantized(model, params, bits, source, new), digests | {"bits": bits}
        if mesh.size > 1:  # the blocks of a file are not placed yet
            params = jax.device_put(params, placement.shardings(params))
    return params, digests


def model_fields(config: ConfigDict, shape: Any) -> dict[str, Any]:
    """The fields of a model's config, `shape`, that a run's config sets; those that are off and that the model does not
    have are left out.

    Raises:
      ValueError: the run's config sets a field that the model does not have.
    """
    names = {field.name for field in dataclasses.fields(shape)}
    fields = {name: value for name, value in config.model.to_dict().items() if name != "base_bits"}
    if wrong := [f"model.{name}={fields[name]}" for name in fields if name not in names and fields[name]]:
        raise ValueError(f"{', '.join(wrong)}: a {family_of(shape).name} has no such option, set it to 0")
    return {name: value for name, value in fields.items() if name in names}


def quantized(model: Any, params: Any, bits: str, source: str = "", new: Sequence[str] = ()) -> Any:
    """Params with the matrices of the layers in so many bits: not the tables of embeddings, the heads, and what is
    `new`. With "file" all matrices and tables that a GGUF file has in blocks of Q4_0, Q4_1 or Q8_0 keep those.

    Raises:
      ValueError: "file", and the source is no GGUF file or has no such blocks; or the model has no such matrix.
    """
    if bits == "file":
        return _as_in_file(model, params, source)
    family = family_of(model)
    heads = {*family.head_params, *(family.output_head.params(model.config) if family.output_head else ())}

    def is_chosen(path: str) -> bool:
        axes = look_up(family.axes, path, "axes")
        is_matrix = {"i", "o"} <= {CLASS[letter] for letter in axes} and "v" not in axes
        return is_matrix and path.partition("/")[0] not in heads and not matches_any(new, path)

    if not (chosen := [path for path, _ in flatten(params)[0] if is_chosen(path)]):
        raise ValueError(f"base_bits={bits!r}: {source} has no matrix besides its embeddings and its head")
    return lj.quantize(params, lj.select(*chosen, axes=family.axes), bits=int(bits))


def _as_in_file(model: Any, params: Any, source: str) -> Any:
    axes, layers = family_of(model).axes, collections.defaultdict(list)
    scanned = model.config.scan_layers
    for path, (kind, raw) in hf.blocks(source, model).items():
        layers[in_stack(path)[0] if scanned else path].append((kind, raw))
    kept = 0

    def leaf_of(path: str, leaf: Any) -> Any:
        nonlocal kept
        kinds = {kind for kind, _ in layers.get(path, ())}
        if len(kinds) != 1 or not kinds <= set(GGUF):  # other types, or several in one stack, are dense
            return leaf
        kept += 1
        stacked = len(layers[path]) if scanned and path.startswith("h/") else 0
        shape, letters = leaf.shape[bool(stacked) :], look_up(axes, path, "axes").lstrip("s")
        parts = [from_gguf(*part, shape, letters, dtype=leaf.dtype, path=path) for part in layers[path]]
        return jax.tree.map(lambda *fields: jnp.stack(fields), *parts) if stacked else parts[0]

    flat, treedef = flatten(params)
    made = jax.tree.unflatten(treedef, [leaf_of(path, leaf) for path, leaf in flat])
    if not kept:
        raise ValueError(f"base_bits='file': {source} has no matrix in blocks of {', '.join(GGUF)}")
    return made


def check_task(model: Any, name: str, source: str, task: Task) -> None:
    """A ValueError unless the model, or the one of that config, can be trained for the task, which has that name."""
    family = family_of(model)
    if (task.text and not family.init_cache) or (task.head and not family.with_head):
        needed = "generates text" if task.text else "classifies"
        raise ValueError(f"{source} is a {family.name}, but {name} needs a model that {needed}")


def identity(
    model: Any, params: Any, source: str, new: Sequence[str] | None = None, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """`checkpoints.identity` of what stands below the heads, and of the model's config: a head trains, and so is part
    of the delta; the same base is the same with whatever head it was loaded, and without. `new`: of `Base`, if it is
    known."""
    new = hf.untrained(model, source) if new is None else new
    heads = {*family_of(model).head_params, *(glob.partition("/")[0] for glob in new)}
    below = {name: part for name, part in params.items() if name not in heads}
    return checkpoints.identity(below, source, config=function_fields(model), tokenizer=tokenizer)


def adapter(path: Path, base: Base) -> tuple[ParamTransform, Delta]:
    """Method and delta of an adapter's file or folder; a ValueError where it is damaged, or another base's."""
    method, delta, info = checkpoints.load_adapter(path)
    checkpoints.check_base(info["base"], base.identity, path)
    return method, delta
