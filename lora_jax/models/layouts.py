"""Two layouts of a model's layers: looped (`h_0`, `h_1`, ...) or scanned (`h`, one more axis). The axes and sharding
rules, in both, of what our models have in common, and conversions.

Both conversions take any pytree: parameters, deltas, optimizer states, whole training states. In every dict of it they
change the keys that name layers, by themselves (`h_3`, in params) or at the beginning of a path
(`h_3/attn/query/kernel`, `@shared/h_3/attn`, in deltas). All else stays as it is.
"""

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

AXES = {
    "h_*/**/kernel": "io",
    "h_*/**/{bias,scale}": "o",
    "h/**/kernel": "sio",
    "h/**/{bias,scale}": "so",
    "**/embedding": "vo",
}

# Kernels shard one axis over the mesh's `fsdp` and the other over `tensor`: query, key, value, gate and up end in
# `tensor`, out and down begin with it (Shoeybi et al. 2019, Megatron-LM, section 3).
_BLOCK = {
    "attn/{query,key,value}/kernel": P("fsdp", "tensor"),
    "attn/{query,key,value}/bias": P("tensor"),
    "attn/out/kernel": P("tensor", "fsdp"),
    "mlp/{gate,up}/kernel": P("fsdp", "tensor"),
    "mlp/{gate,up}/bias": P("tensor"),
    "mlp/down/kernel": P("tensor", "fsdp"),
}
# Biases and norms after a row-parallel product are replicated.
RULES = (
    {f"**/h_*/{glob}": spec for glob, spec in _BLOCK.items()}
    | {f"**/h/{glob}": P(None, *spec) for glob, spec in _BLOCK.items()}
    | dict.fromkeys(("**/{ln_*,norm}/{scale,bias}", "**/{out,down}/bias"), P())
)
FEATURES = P(None, ("fsdp", "tensor"))  # of a table (rows, features)

_LAYER = re.compile(r"(@shared/)?h_(\d+)(/.*)?")
_STACK = re.compile(r"(@shared/)?h(/.*)?")


def table_spec(rows: int, mesh: Mesh | AbstractMesh) -> P:
    """The spec of an embedding (rows, features): rows over `tensor` where they divide (a padded vocabulary; GPT-2's
    50,257 does not), else its features."""
    return P("tensor", "fsdp") if rows % mesh.shape["tensor"] == 0 else FEATURES


def block_rules(key_heads: int, size: int, mesh: Mesh | AbstractMesh) -> dict[str, P]:
    """RULES for layers with so many heads of keys and values, of that size. Heads that do not divide over `tensor` are
    on all of its devices (`layers.gathered`), which is logged; their kernels are spread where their features divide."""
    devices = mesh.shape["tensor"]
    if key_heads % devices:
        log_replicated(key_heads, devices, key_heads * size % devices == 0)
    if key_heads * size % devices == 0:
        return RULES
    unsplit = {"kernel": P("fsdp", None), "bias": P()}
    rules = {f"**/h_*/attn/{{key,value}}/{name}": spec for name, spec in unsplit.items()}
    return rules | {f"**/h/attn/{{key,value}}/{name}": P(None, *spec) for name, spec in unsplit.items()} | RULES


@functools.cache  # once a process: a plan asks for the rules of many meshes
def log_replicated(key_heads: int, devices: int, spread: bool) -> None:
    logging.warning(
        "%d heads of keys and values do not divide over the %d devices of tensor: each device has all outputs of "
        "attn/key and attn/value; their kernels %s",
        key_heads,
        devices,
        "are spread over features" if spread else "stay whole along it",
    )


def to_scanned(tree: Any, stack: Callable[[list], Any] = jnp.stack) -> Any:
    """The tree with its layers stacked along a leading axis, as a model with `scan_layers` has it.

    `stack` makes one leaf of those of all layers, in order; for leaves that are no arrays.

    Raises:
      ValueError: layers are missing (a delta for some of them only), or differ in their leaves.

    >>> import jax.numpy as jnp
    >>> from lora_jax.models.gpt2 import to_loop, to_scanned
    >>> tree = {"wte": jnp.ones(2), "h_0": {"bias": jnp.zeros(3)}, "h_1": {"bias": jnp.ones(3)}}
    >>> to_scanned(tree)["h"]["bias"].shape
    (2, 3)
    >>> to_loop(to_scanned(tree))["h_1"]["bias"].tolist()
    [1.0, 1.0, 1.0]
    """
    return _map_dicts(lambda node: _stack(node, stack), tree)


def in_stack(path: str) -> tuple[str, int | None]:
    """The path in the scanned layout of a parameter of the loop layout, and its layer; None of one outside layers.

    >>> in_stack("h_3/attn/query/kernel")
    ('h/attn/query/kernel', 3)
    """
    match = _LAYER.fullmatch(path)
    return (f"{match[1] or ''}h{match[3] or ''}", int(match[2])) if match else (path, None)


def to_loop(tree: Any) -> Any:
    """The inverse of `to_scanned`: one subtree a layer.

    Raises:
      ValueError: the stacked leaves differ in their number of layers, or none is there to tell it.

    An example is in `to_scanned`.
    """
    depths: set[int] = set()

    def note(node: dict) -> dict:
        stacks = [value for key, value in node.items() if _stack_name(key, value)]
        depths.update(leaf.shape[0] for leaf in jax.tree.leaves(stacks))
        return node

    _map_dicts(note, tree)  # of the whole tree first: an optimizer state may hold no array in one of its stacks
    if len(depths) > 1:
        raise ValueError(f"stacked leaves have different numbers of layers: {sorted(depths)}")
    return _map_dicts(lambda node: _unstack(node, max(depths, default=None)), tree)


def _map_dicts(change: Callable[[dict], dict], tree: Any) -> Any:
    """The tree with `change` applied to every dict in it, outer ones first."""
    if isinstance(tree, dict):
        tree = change(tree)
    if jax.tree_util.all_leaves([tree]):
        return tree
    children, treedef = jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)
    return jax.tree.unflatten(treedef, [_map_dicts(change, child) for child in children])


def _stack(node: dict, stack: Callable[[list], Any]) -> dict:
    changed: dict[str, Any] = {}
    stacks: dict[str, dict[int, Any]] = {}
    for key, value in node.items():
        name, layer = in_stack(str(key))
        if layer is None:
            changed[key] = value
        else:
            stacks.setdefault(name, {})[layer] = value
    depth = 1 + max((layer for layers in stacks.values() for layer in layers), default=-1)
    for key, layers in stacks.items():
        if missing := sorted(set(range(depth)) - set(layers)):
            raise ValueError(f"{key} has layers {sorted(layers)} but not {missing}: only all can be stacked")
        parts = [layers[i] for i in range(depth)]
        if len({(jax.tree.structure(part), str(jax.tree.map(np.shape, part))) for part in parts}) > 1:
            raise ValueError(f"{key}: the layers differ in their leaves and cannot be stacked")
        changed[key] = jax.tree.map(lambda *leaves: stack(list(leaves)), *parts)
    return type(node)(changed)


def _stack_name(key: Any, value: Any) -> re.Match | None:
    # A leaf that happens to be called `h` is no stack of layers.
    return None if jax.tree_util.all_leaves([value]) else _STACK.fullmatch(str(key))


def _unstack(node: dict, depth: int | None) -> dict:
    changed: dict[str, Any] = {}
    for key, value in node.items():
        if (name := _stack_name(key, value)) is None:
            changed[key] = value
            continue
        if depth is None:
            raise ValueError(f"{key} holds no array that tells the number of layers")
        start, end = name.groups("")
        for i in range(depth):
            changed[f"{start}h_{i}{end}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
    return type(node)(changed)
