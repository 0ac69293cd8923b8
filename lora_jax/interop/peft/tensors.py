"""Which tensors a PEFT adapter holds, and which array of a delta each one is; both ways.

A fused layer (GPT-2's c_attn) has one A, which its three kernels share here, and one B, whose columns are theirs.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.core.transforms import Delta
from lora_jax.interop.hf.architectures import Module, expand_braces
from lora_jax.interop.peft.modules import Model, Resolved

PREFIX = "base_model.model."


class Tensor(NamedTuple):
    """A tensor of the file, and the arrays of the delta that hold the same numbers.

    Attributes:
      name, shape: in the file; the name is without PREFIX.
      path: of the leaf that it changes, with braces where the layer is fused.
      factor: its name in the delta.
      transposed: whether the file has the axes in the other order.
      copy: "" for a part of the adapter; "value" for a second copy of one, "base" for weights of the base. A file may
        lack copies.
      key: the delta's key where it is not `path`.
      leading_axis: whether the file has one more axis in front, of size 1.
      replicated: whether each part of a fused layer has the whole tensor, rather than its share of the last axis.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    factor: str
    transposed: bool = False
    copy: str = ""
    key: str = ""
    leading_axis: bool = False
    replicated: bool = False

    @property
    def entries(self) -> list[tuple[str, str]]:
        """The (key, factor) of the delta's arrays, in order along the last axis."""
        return [(key, self.factor) for key in expand_braces(self.key or self.path)]


def name_in_file(name: str) -> str:
    """A tensor's name in the file: PEFT's own modules are beside the model, all others inside it."""
    return name if name.startswith("base_model.") else PREFIX + name


def tensors_of(adapted: Iterable[list[Tensor]], resolved: Resolved) -> list[Tensor]:
    """The tensors of an adapter with this config.

    Args:
      adapted: those of the adapted modules, a list for each (`Kind.tensors`).

    Raises:
      ValueError: two of them change one parameter.
    """
    model, groups = resolved.model, list(adapted)
    for name in resolved.saved:
        for module in model.below(name):
            groups += [[_parameter(module, which, model)] for which in ("weight", "bias")[: 1 + module.bias]]
    for name, rows in resolved.tokens.items():
        module = model.modules[name]
        shape = (len(rows), model.shape(module, "weight")[-1])
        groups.append([Tensor(f"{name}.token_adapter.trainable_tokens_delta", shape, module.path("weight"), "rows")])
    groups += [[tensor] for tensor in _biases(resolved) + _embeddings(resolved)]
    changed_by: dict[str, str] = {}
    for group in groups:
        for path, name in {tensor.path: tensor.name for tensor in group if not tensor.copy}.items():
            if path in changed_by:
                message = f"{changed_by[path]} and {name} both change {path}: unsupported"
                raise ValueError(f"{resolved.source}: {message}")
            changed_by[path] = name
    return [tensor for group in groups for tensor in group]


def check_tie(resolved: Resolved) -> None:
    """A ValueError where an embedding and its head are one array for PEFT and two here, or the other way round.

    PEFT adapts a tied embedding's look-up alone, or its head alone; here both are one leaf.
    """
    model, source = resolved.model, resolved.source
    if not model.output:
        return
    if model.tied:
        for name in (*resolved.adapted, *(m.name for saved in resolved.saved for m in model.below(saved))):
            if name in (model.embedding, model.output):
                use = "look-up" if name == model.embedding else "head"
                raise ValueError(
                    f"{source} changes the {use} of {name} alone, but in these params token embedding and head are "
                    "one: load the model with hf.load(folder, tie=False)"
                )
    elif model.embedding in resolved.tokens:
        table, head = (model.leaves[model.modules[n].path("weight")] for n in (model.embedding, model.output))
        if np.array_equal(np.asarray(table), np.asarray(head).T):
            raise ValueError(
                f"{source} trains rows of {model.embedding}, which the head of a tied model follows, but in these "
                "params the head is a copy: load the model with hf.load(folder), without tie=False"
            )


def _parameter(module: Module, which: str, model: Model, name: str = "", copy: str = "") -> Tensor:
    """A module's "weight" or "bias" itself, by its own name or another."""
    transposed = module.torch_class == "Linear" and which == "weight"
    shape = model.shape(module, which)
    shape = shape[::-1] if transposed else shape
    return Tensor(name or f"{module.name}.{which}", shape, module.path(which), "value", transposed, copy)


def _saved_in(resolved: Resolved) -> dict[str, str]:
    """Every module that is saved, with the name of the saved module that it is or is inside of."""
    return {module.name: name for name in resolved.saved for module in resolved.model.below(name)}


def _biases(resolved: Resolved) -> list[Tensor]:
    tensors: list[Tensor] = []
    bias, model, saved_in = resolved.fields.get("bias", "none"), resolved.model, _saved_in(resolved)
    for module in model.modules.values():
        if not module.bias or bias == "none":
            continue
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
    """A tensor's array, from the delta's arrays or the base's leaves.

    Raises:
      ValueError: the delta lacks it, has it in another shape, or has several arrays for what PEFT has once.
    """
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
        key = tensor.entries[0][0]
        raise ValueError(f"{key}: {tensor.name} would have the shape {array.shape}, not {tensor.shape}")
    return array


def all_equal(arrays: Iterable[Any]) -> bool:
    """Whether all arrays hold the same numbers."""
    first, *others = arrays
    return all(np.array_equal(np.asarray(first), np.asarray(other)) for other in others)


def check_names(tensors: Iterable[Tensor], arrays: Mapping[str, np.ndarray], model: Model, source: str) -> None:
    """A ValueError that names every missing, extra or misshapen tensor of a file, if there is one."""
    expected = {name_in_file(tensor.name): tensor for tensor in tensors}
    extra = [name for name in arrays if name not in expected]
    missing = [name for name, tensor in expected.items() if name not in arrays and not tensor.copy]
    misshapen = [name for name, tensor in expected.items() if name in arrays and arrays[name].shape != tensor.shape]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is no part of the adapter" for name in extra]
    wrong += [f"{name} has shape {arrays[name].shape}, not {expected[name].shape}" for name in misshapen]
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        hint = _hint(extra, missing, any(expected[name].factor not in ("value", "rows") for name in misshapen), model)
        raise ValueError(f"{source} does not fit its config and these params: " + "; ".join(wrong[:10] + more) + hint)


def _hint(extra: list[str], missing: list[str], misshapen_factor: bool, model: Model) -> str:
    """The likely reason."""
    layers = (match for name in extra if (match := re.search(r"\.(\d+)\.", name)))
    if any(int(layer[1]) >= model.depth for layer in layers):
        return f". The adapter belongs to a base of another size: this one has {model.depth} layers"
    if misshapen_factor:
        return ". The adapter belongs to a base of another size, or is of another rank than its config says"
    if any(name.endswith("lora_magnitude_vector") for name in (*extra, *missing)):
        return ". DoRA (use_dora=true) has a lora_magnitude_vector for every adapted module, LoRA has none"
    for head in model.architecture.classifiers:
        if head.hint and any(name.startswith(f"{PREFIX}{module}.") for name in extra for module in head.modules):
            return f". {head.hint}"
    if any(not name.startswith("base_model.") for name in extra):
        return f". PEFT's names begin with {PREFIX}"
    return ""
