"""Which tensors a PEFT adapter holds, and which array of a delta each one is; both ways.

A fused layer (GPT-2's c_attn) has one A, which its three kernels share here, and one B, whose columns are theirs.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.transforms import Delta
from lora_jax.interop.folders import check_shapes
from lora_jax.interop.hf.families import Module, depth
from lora_jax.interop.peft.kind import Model, Resolved, Tensor

PREFIX = "base_model.model."


def name_in_file(name: str) -> str:
    """A tensor's name in the file: PEFT's own modules are beside the model, all others inside it."""
    return name if name.startswith("base_model.") else PREFIX + name


def tensors_of(resolved: Resolved) -> list[Tensor]:
    """The tensors of an adapter with this config; a ValueError where two of them change one parameter, or an embedding
    and its head are one array for PEFT or here, but not for both."""
    _check_tie(resolved)
    model, modules = resolved.model, resolved.model.modules
    groups = [resolved.kind.tensors(resolved, modules[name], options) for name, options in resolved.adapted.items()]
    saved = [module for name in resolved.saved for module in model.below(name)]
    groups += [[_parameter(module, which, model)] for module in saved for which in module.parameters]
    for name, rows in resolved.tokens.items():
        shape = (len(rows), model.shape(modules[name], "weight")[-1])
        full_name = f"{name}.token_adapter.trainable_tokens_delta"
        groups.append([Tensor(full_name, shape, modules[name].path("weight"), "rows")])
    groups += [[tensor] for tensor in _biases(resolved) + _embeddings(resolved)]
    changed_by: dict[str, str] = {}
    for group in groups:
        for path, name in {tensor.path: tensor.name for tensor in group if not tensor.copy}.items():
            if path in changed_by:
                raise ValueError(f"{resolved.source}: {changed_by[path]} and {name} both change {path}: unsupported")
            changed_by[path] = name
    return [tensor for group in groups for tensor in group]


def _check_tie(resolved: Resolved) -> None:
    """PEFT adapts a tied embedding's look-up alone, or its head alone; here both are one leaf."""
    model, source = resolved.model, resolved.source
    if model.output and model.tied:
        for use, name in (("look-up", model.embedding), ("head", model.output)):
            if name in resolved.adapted or name in _saved_in(resolved):
                raise ValueError(
                    f"{source} changes the {use} of {name} alone, but in these params token embedding and head are "
                    "one: load the model with hf.load(folder, tie=False)"
                )
    elif model.output and model.embedding in resolved.tokens:
        table, head = (model.leaves[model.modules[n].path("weight")] for n in (model.embedding, model.output))
        if np.array_equal(np.asarray(table), np.asarray(head).T):
            raise ValueError(
                f"{source} trains rows of {model.embedding}, which the head of a tied model follows, but in these "
                "params the head is a copy: load the model with hf.load(folder), without tie=False"
            )


def _parameter(module: Module, which: str, model: Model, name: str = "", copy: str = "") -> Tensor:
    """A module's "weight" or "bias" itself, by its own name or another."""
    layout, name = module.stored(which), name or f"{module.name}.{which}"
    shape = layout.shape({path: tuple(model.leaves[path].shape) for path in layout.paths})
    return Tensor(name, shape, module.path(which), "value", layout.transposed, copy)


def _saved_in(resolved: Resolved) -> dict[str, str]:
    """Every module that is saved, with the name of the saved module that it is or is inside of."""
    return {module.name: name for name in resolved.saved for module in resolved.model.below(name)}


def _biases(resolved: Resolved) -> list[Tensor]:
    tensors: list[Tensor] = []
    bias, model, saved_in = resolved.fields.get("bias", "none"), resolved.model, _saved_in(resolved)
    for module in [module for module in model.modules.values() if module.bias and bias != "none"]:
        if module.name in resolved.adapted:
            tensors.append(_parameter(module, "bias", model, f"{module.name}.base_layer.bias"))
        elif bias == "all" and module.name not in saved_in:
            tensors.append(_parameter(module, "bias", model))
        elif bias == "all":  # PEFT takes all names that end in .bias, those of its own wrapper too
            wrapper = saved_in[module.name]
            inner = module.name.removeprefix(wrapper)
            trained = f"{wrapper}.modules_to_save{f'.default{inner}' if inner else ''}.bias"
            tensors.append(_parameter(module, "bias", model, trained, "value"))
            tensors.append(_parameter(module, "bias", model, f"{wrapper}.original_module{inner}.bias", "base"))
    return tensors


def _embeddings(resolved: Resolved) -> list[Tensor]:
    """The copies that PEFT writes of the embedding and the head where it adapts one, or the vocabulary was enlarged."""
    model, tensors = resolved.model, []
    for name in (model.embedding, model.output):
        if not name or name in _saved_in(resolved) or name in resolved.tokens:
            continue
        module = model.modules[model.embedding if model.tied else name]
        weight = "base_layer.weight" if name in resolved.adapted else "weight"
        tensors.append(_parameter(module, "weight", model, f"{name}.{weight}", "base"))
    return tensors


def to_delta(tensors: Iterable[Tensor], arrays: Mapping[str, np.ndarray]) -> Delta:
    """The delta of an adapter's arrays (names without PREFIX), in float32."""
    delta = Delta()
    for tensor in tensors:
        if not tensor.copy:
            array = arrays[tensor.name].astype(np.float32)
            array = array.T if tensor.transposed else array
            array = array[0] if tensor.leading_axis else array
            count = len(tensor.entries)
            pieces = [array.copy() for _ in range(count)] if tensor.replicated else np.split(array, count, axis=-1)
            for (key, factor), piece in zip(tensor.entries, pieces, strict=True):
                delta.setdefault(key, {})[factor] = jnp.asarray(np.ascontiguousarray(piece))
    return delta


def array_of(tensor: Tensor, delta: Mapping[str, Mapping[str, Any]], model: Model) -> np.ndarray:
    """A tensor's array, from the delta's arrays or the base's leaves; a ValueError where the delta lacks it, has it in
    another shape, or has several arrays for what PEFT has once."""
    if tensor.copy == "base":
        arrays = [model.leaves[path] for path, _ in tensor.entries]
    else:
        arrays = [delta.get(key, {}).get(factor) for key, factor in tensor.entries]
    if any(array is None for array in arrays):
        raise ValueError(f"the delta lacks {':'.join(tensor.entries[0])}")
    if tensor.replicated:
        if not all_equal(arrays):
            keys = " and ".join(key for key, _ in tensor.entries)
            raise ValueError(f"{tensor.name} is one for {keys}, but these differ: PEFT has no form for that")
        arrays = arrays[:1]
    array = np.concatenate([np.asarray(array) for array in arrays], axis=-1)
    array = array[None] if tensor.leading_axis else array
    array = np.ascontiguousarray(array.T if tensor.transposed else array)
    if array.shape != tensor.shape:
        what = f"{tensor.entries[0][0]}: {tensor.name}"
        raise ValueError(f"{what} would have the shape {array.shape}, not {tensor.shape}")
    return array


def all_equal(arrays: Iterable[Any]) -> bool:
    """Whether all arrays hold the same numbers."""
    first, *others = arrays
    return all(np.array_equal(np.asarray(first), np.asarray(other)) for other in others)


def check_names(tensors: Iterable[Tensor], arrays: Mapping[str, np.ndarray], model: Model, source: str) -> None:
    """A ValueError that names every missing, extra or misshapen tensor of a file, if there is one."""
    expected = {name_in_file(tensor.name): tensor for tensor in tensors}
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    copies = {name for name, tensor in expected.items() if tensor.copy}
    fit = f"{source} does not fit its config and these params"
    try:
        check_shapes({name: x.shape for name, x in arrays.items()}, shapes, fit, optional=copies, of="adapter")
    except ValueError as error:
        raise ValueError(f"{error}{_hint(expected, arrays, model)}") from None


def _hint(expected: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], model: Model) -> str:
    """The likely reason."""
    extra = [name for name in arrays if name not in expected]
    misshapen = [t for name, t in expected.items() if name in arrays and arrays[name].shape != t.shape]
    layers = (match for name in extra if (match := re.search(r"\.(\d+)\.", name)))
    if any(int(layer[1]) >= (count := depth(model.leaves)) for layer in layers):
        return f". The adapter belongs to a base of another size: this one has {count} layers"
    if any(tensor.factor not in ("value", "rows") for tensor in misshapen):
        return ". The adapter belongs to a base of another size, or is of another rank than its config says"
    if any(name.endswith("lora_magnitude_vector") for name in expected.keys() ^ arrays.keys()):
        return ". DoRA (use_dora=true) has a lora_magnitude_vector for every adapted module, LoRA has none"
    for head in model.architecture.classifiers:
        if head.hint and any(name.startswith(f"{PREFIX}{module}.") for name in extra for module in head.modules):
            return f". {head.hint}"
    return f". PEFT's names begin with {PREFIX}" if any(not name.startswith("base_model.") for name in extra) else ""
