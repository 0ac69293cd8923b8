"""Which tensors a PEFT adapter holds, and where each stands in a delta; both ways.

A fused layer (GPT-2's c_attn) has one A, which its three kernels share here, and one B, whose columns are theirs.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft_modules import Meant, Model, Module, expanded
from lora_jax.transforms import Delta

PREFIX = "base_model.model."


class Tensor(NamedTuple):
    """A tensor of the file: its name (without PREFIX) and shape there, and what it is here.

    `path` is ours, with braces where theirs is fused; `factor` that of the delta; `turned` whether the axes are in the
    other order there. `copy` is "" for what the adapter is made of; "value" for what PEFT writes a second time, and
    "base" for weights of the base that it writes along: these may be left out.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    factor: str
    turned: bool = False
    copy: str = ""

    @property
    def places(self) -> list[tuple[str, str]]:
        """The (key, factor) of the delta that stand side by side in it."""
        paths = expanded(self.path)
        if self.factor == "a" and len(paths) > 1:
            return [("@shared/" + self.path.rsplit("/", 2)[0], "a")]
        return [(path, self.factor) for path in paths]


def planned(meant: Meant, fields: Mapping[str, Any], model: Model, source: str) -> list[Tensor]:
    """The tensors of an adapter with this config.

    Raises:
      ValueError: the adapter does something to these parameters that cannot be said here.
    """
    _check_tie(meant, model, source)
    tensors = []
    for name, (rank, _) in meant.adapted.items():
        tensors += _adapted(model.modules[name], rank, fields["lora_bias"], model, source)
    for name in meant.saved:
        for module in model.below(name):
            tensors += [_whole(module, which, model) for which in ("weight", "bias")[: 1 + module.bias]]
    for name, rows in meant.tokens.items():
        module = model.modules[name]
        size = (len(rows), model.shape(module, "weight")[-1])
        tensors.append(Tensor(f"{name}.token_adapter.trainable_tokens_delta", size, module.path("weight"), "rows"))
    tensors += _biases(meant, fields["bias"], model) + _embeddings(meant, model)
    seen: dict[str, str] = {}
    for tensor in tensors:
        if not tensor.copy and tensor.factor != "a":
            if (other := seen.setdefault(tensor.path, tensor.name)) != tensor.name:
                raise ValueError(f"{source}: {other} and {tensor.name} both change {tensor.path}: unsupported")
    return tensors


def _check_tie(meant: Meant, model: Model, source: str) -> None:
    """PEFT adapts a tied embedding's look-up alone, or its head; here both are one leaf. Without a head all is well."""
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


def _adapted(module: Module, rank: int, lora_bias: bool, model: Model, source: str) -> list[Tensor]:
    path, (rows, columns) = module.path("weight"), model.shape(module, "weight")
    names = ("embedding_A", "embedding_B") if module.kind == "Embedding" else ("A.weight", "B.weight")
    tensors = [
        Tensor(f"{module.name}.lora_{names[0]}", (rank, rows), path, "a", turned=True),
        Tensor(f"{module.name}.lora_{names[1]}", (columns, rank), path, "b", turned=True),
    ]
    if lora_bias:
        if not module.bias:
            raise ValueError(f"{source}: lora_bias=true, but {module.name} has no bias that could take it")
        tensors.append(Tensor(f"{module.name}.lora_B.bias", (columns,), module.path("bias"), "shift"))
    return tensors


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
            pieces = np.split(array.T if tensor.turned else array, len(tensor.places), axis=-1)
            for (key, factor), piece in zip(tensor.places, pieces, strict=True):
                delta.setdefault(key, {})[factor] = jnp.asarray(np.ascontiguousarray(piece))
    return delta


def array_of(tensor: Tensor, delta: Mapping[str, Mapping[str, Any]], model: Model) -> np.ndarray:
    """A tensor's array, of the delta's or the base's leaves.

    Raises:
      ValueError: the delta lacks it, or has it in another shape.
    """
    if tensor.copy == "base":
        found = [model.leaves[path] for path, _ in tensor.places]
    else:
        found = [delta.get(key, {}).get(factor) for key, factor in tensor.places]
    if any(leaf is None for leaf in found):
        raise ValueError(f"the delta lacks {':'.join(tensor.places[0])}")
    array = np.concatenate([np.asarray(leaf) for leaf in found], axis=-1)
    array = np.ascontiguousarray(array.T if tensor.turned else array)
    if array.shape != tensor.shape:
        raise ValueError(f"{tensor.places[0][0]}: {tensor.name} would have the shape {array.shape}, not {tensor.shape}")
    return array


def check_names(tensors: Iterable[Tensor], arrays: Mapping[str, np.ndarray], model: Model, source: str) -> None:
    """A ValueError that names every missing, extra or misshapen tensor of a file, if there is one."""
    wanted = {PREFIX + tensor.name: tensor for tensor in tensors}
    extra = [name for name in arrays if name not in wanted]
    missing = [name for name, tensor in wanted.items() if name not in arrays and not tensor.copy]
    misshapen = [name for name, tensor in wanted.items() if name in arrays and arrays[name].shape != tensor.shape]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is no part of the adapter" for name in extra]
    wrong += [f"{name} has shape {arrays[name].shape}, not {wanted[name].shape}" for name in misshapen]
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        hint = _hint(extra, misshapen, model)
        raise ValueError(f"{source} does not fit its config and these params: " + "; ".join(wrong[:10] + more) + hint)


def _hint(extra: list[str], misshapen: list[str], model: Model) -> str:
    """What the likely reason is."""
    layer = re.compile(r"\.(?:h|layer)\.(\d+)\.")
    depth = 1 + max((int(found[1]) for name in model.modules if (found := layer.search(f".{name}."))), default=-1)
    if any((found := layer.search(name)) and int(found[1]) >= depth for name in extra):
        return f". The adapter belongs to a base of another size: this one has {depth} layers"
    if any(re.search(r"lora_(A|embedding_B)", name) for name in misshapen):
        return ". The adapter belongs to a base of another size, or of another rank than its config says"
    if any(name.startswith(f"{PREFIX}score.") for name in extra):
        return '. A GPT-2 has no head "score" here: give params | {"score": {"kernel": zeros (width, labels)}}'
    if any(name.startswith(f"{PREFIX}classifier.") for name in extra):
        return '. The params have no such head: hf.load(folder, head="classification", labels=...) makes one'
    if any(not name.startswith(PREFIX) for name in extra):
        return f". PEFT's names begin with {PREFIX}"
    return ""
