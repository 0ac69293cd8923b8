"""Which tensors a PEFT adapter holds, and where each stands in a delta; both ways.

A fused layer (GPT-2's c_attn) has one A, which its three kernels share here, and one B, whose columns are theirs.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.core.transforms import Delta
from lora_jax.interop.peft.modules import Meant, Model, Module, expanded

PREFIX = "base_model.model."


class Tensor(NamedTuple):
    """A tensor of the file: its name (without PREFIX) and shape there, and what it is here.

    `path` is that of the leaf which it changes, with braces where theirs is fused; `key` that in the delta where it is
    another; `factor` that of the delta. The array here may differ: `turned`, the axes are in the other order there;
    `row`, theirs has one axis more, of size 1; `alike`, under each of a fused layer's keys stands the whole here, not a
    part. `copy` is "" for what the adapter is made of; "value" for what PEFT writes a second time, and "base" for
    weights of the base that it writes along: these may be left out.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    factor: str
    turned: bool = False
    copy: str = ""
    key: str = ""
    row: bool = False
    alike: bool = False

    @property
    def places(self) -> list[tuple[str, str]]:
        """The (key, factor) of the delta that stand side by side in it, or are alike."""
        return [(key, self.factor) for key in expanded(self.key or self.path)]


def filed(name: str) -> str:
    """A tensor's name in the file: PEFT's own modules stand beside the model, not in it."""
    return name if name.startswith("base_model.") else PREFIX + name


def planned(
    own: Iterable[list[Tensor]], meant: Meant, fields: Mapping[str, Any], model: Model, source: str
) -> list[Tensor]:
    """The tensors of an adapter with this config.

    Args:
      own: those of the adapted modules, a list for each.

    Raises:
      ValueError: the adapter does something to these parameters that cannot be said here.
    """
    groups = list(own)
    for name in meant.saved:
        for module in model.below(name):
            groups += [[_whole(module, which, model)] for which in ("weight", "bias")[: 1 + module.bias]]
    for name, rows in meant.tokens.items():
        module = model.modules[name]
        size = (len(rows), model.shape(module, "weight")[-1])
        groups.append([Tensor(f"{name}.token_adapter.trainable_tokens_delta", size, module.path("weight"), "rows")])
    groups += [[tensor] for tensor in _biases(meant, fields.get("bias", "none"), model) + _embeddings(meant, model)]
    seen: dict[str, str] = {}
    for group in groups:
        for path, name in {tensor.path: tensor.name for tensor in group if not tensor.copy}.items():
            if path in seen:
                raise ValueError(f"{source}: {seen[path]} and {name} both change {path}: unsupported")
            seen[path] = name
    return [tensor for group in groups for tensor in group]


def check_tie(meant: Meant, model: Model, source: str) -> None:
    """A ValueError where an embedding and its head are one for PEFT, and two here, or the other way round.

    PEFT adapts a tied embedding's look-up alone, or its head; here both are one leaf. Without a head all is well.
    """
    if model.tied and model.output:
        for name in (*meant.adapted, *(m.name for saved in meant.saved for m in model.below(saved))):
            if name in (model.embedding, model.output):
                use = "look-up" if name == model.embedding else "head"
                raise ValueError(
                    f"{source} changes the {use} of {name} alone, but in these params token embedding and head are "
                    "one: load the model with hf.load(folder, tie=False)"
                )
    elif model.embedding in meant.tokens and model.output:
        table, head = (model.leaves[path] for path in ("wte/embedding", "lm_head/kernel"))
        if np.array_equal(np.asarray(table), np.asarray(head).T):
            raise ValueError(
                f"{source} trains rows of {model.embedding}, which the head of a tied model follows, but in these "
                "params the head is a copy: load the model with hf.load(folder), without tie=False"
            )


def _whole(module: Module, which: str, model: Model, name: str | None = None, copy: str = "") -> Tensor:
    """A weight or bias itself, by its own name or another."""
    turned = module.kind == "Linear" and which == "weight"
    shape = model.shape(module, which)
    shape = shape[::-1] if turned else shape
    return Tensor(name or f"{module.name}.{which}", shape, module.path(which), "value", turned, copy)


def _biases(meant: Meant, bias: str, model: Model) -> list[Tensor]:
    tensors: list[Tensor] = []
    saved = {module.name: wrapper for wrapper in meant.saved for module in model.below(wrapper)}
    for module in model.modules.values():
        if not module.bias or bias == "none":
            continue
        if module.name in meant.adapted:
            tensors.append(_whole(module, "bias", model, f"{module.name}.base_layer.bias"))
        elif bias == "all" and module.name not in saved:
            tensors.append(_whole(module, "bias", model))
        elif bias == "all":  # PEFT takes all names that end in .bias, those of its own wrapper too
            wrapper, inner = saved[module.name], module.name.removeprefix(saved[module.name])
            trained = f"{wrapper}.modules_to_save{f'.default{inner}' if inner else ''}.bias"
            tensors.append(_whole(module, "bias", model, trained, "value"))
            tensors.append(_whole(module, "bias", model, f"{wrapper}.original_module{inner}.bias", "base"))
    return tensors


def _embeddings(meant: Meant, model: Model) -> list[Tensor]:
    """What PEFT writes along of adapted heads and embeddings, and of those of a vocabulary that was made larger."""
    saved = {module.name for wrapper in meant.saved for module in model.below(wrapper)}
    tensors = []
    for name in (model.embedding, model.output):
        if not name or name in saved or name in meant.tokens:
            continue
        of = model.modules[model.embedding] if model.tied else model.modules[name]
        inner = "base_layer.weight" if name in meant.adapted else "weight"
        tensors.append(_whole(of, "weight", model, f"{name}.{inner}", "base"))
    return tensors


def to_delta(tensors: Iterable[Tensor], arrays: Mapping[str, np.ndarray]) -> Delta:
    """The delta of an adapter's arrays (names without PREFIX), in float32."""
    delta = Delta()
    for tensor in tensors:
        if not tensor.copy:
            array = arrays[tensor.name].astype(np.float32)
            array = array.T if tensor.turned else array
            array = array[0] if tensor.row else array
            count = len(tensor.places)
            pieces = [array.copy() for _ in range(count)] if tensor.alike else np.split(array, count, axis=-1)
            for (key, factor), piece in zip(tensor.places, pieces, strict=True):
                delta.setdefault(key, {})[factor] = jnp.asarray(np.ascontiguousarray(piece))
    return delta


def array_of(tensor: Tensor, delta: Mapping[str, Mapping[str, Any]], model: Model) -> np.ndarray:
    """A tensor's array, of the delta's or the base's leaves.

    Raises:
      ValueError: the delta lacks it, has it in another shape, or has several for what PEFT has once.
    """
    if tensor.copy == "base":
        found = [model.leaves[path] for path, _ in tensor.places]
    else:
        found = [delta.get(key, {}).get(factor) for key, factor in tensor.places]
    if any(leaf is None for leaf in found):
        raise ValueError(f"the delta lacks {':'.join(tensor.places[0])}")
    if tensor.alike and not alike(found):
        keys = " and ".join(key for key, _ in tensor.places)
        raise ValueError(f"{tensor.name} is one for {keys}, but these differ: PEFT has no form for that")
    array = np.concatenate([np.asarray(leaf) for leaf in found[: 1 if tensor.alike else None]], axis=-1)
    array = array[None] if tensor.row else array
    array = np.ascontiguousarray(array.T if tensor.turned else array)
    if array.shape != tensor.shape:
        raise ValueError(f"{tensor.places[0][0]}: {tensor.name} would have the shape {array.shape}, not {tensor.shape}")
    return array


def alike(found: Iterable[Any]) -> bool:
    """Whether all of these arrays are equal."""
    first, *others = found
    return all(np.array_equal(np.asarray(first), np.asarray(other)) for other in others)


def check_names(tensors: Iterable[Tensor], arrays: Mapping[str, np.ndarray], model: Model, source: str) -> None:
    """A ValueError that names every missing, extra or misshapen tensor of a file, if there is one."""
    wanted = {filed(tensor.name): tensor for tensor in tensors}
    extra = [name for name in arrays if name not in wanted]
    missing = [name for name, tensor in wanted.items() if name not in arrays and not tensor.copy]
    misshapen = [name for name, tensor in wanted.items() if name in arrays and arrays[name].shape != tensor.shape]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is no part of the adapter" for name in extra]
    wrong += [f"{name} has shape {arrays[name].shape}, not {wanted[name].shape}" for name in misshapen]
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        hint = _hint(extra, missing, misshapen, model)
        raise ValueError(f"{source} does not fit its config and these params: " + "; ".join(wrong[:10] + more) + hint)


def _hint(extra: list[str], missing: list[str], misshapen: list[str], model: Model) -> str:
    """What the likely reason is."""
    layer = re.compile(r"\.(?:h|layer)\.(\d+)\.")
    depth = 1 + max((int(found[1]) for name in model.modules if (found := layer.search(f".{name}."))), default=-1)
    if any((found := layer.search(name)) and int(found[1]) >= depth for name in extra):
        return f". The adapter belongs to a base of another size: this one has {depth} layers"
    if any(re.search(r"(lora|vera|ia3|lokr)_", name) for name in misshapen):
        return ". The adapter belongs to a base of another size, or is of another rank than its config says"
    if any(name.endswith("lora_magnitude_vector") for name in (*extra, *missing)):
        return ". DoRA (use_dora=true) has a lora_magnitude_vector for every adapted module, LoRA has none"
    if any(name.startswith(f"{PREFIX}score.") for name in extra):
        return '. A GPT-2 has no head "score" here: give params | {"score": {"kernel": zeros (width, labels)}}'
    if any(name.startswith(f"{PREFIX}classifier.") for name in extra):
        return '. The params have no such head: hf.load(folder, head="classification", labels=...) makes one'
    if any(not name.startswith("base_model.") for name in extra):
        return f". PEFT's names begin with {PREFIX}"
    return ""
