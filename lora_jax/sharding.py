"""Where each array lives on a mesh: ordered rules over paths, as NamedShardings for `jax.jit`.

    mesh = make_mesh({"data": 2, "fsdp": 4})
    rules = gpt2_rules(config.vocab_size, mesh)
    adapted = jax.eval_shape(method.apply, params, delta)
    params = jax.device_put(params, shardings(params, mesh, rules))
    delta = jax.device_put(delta, shardings(delta, mesh, rules, adapted))

A low-rank A takes the input sharding of its kernel, B the output sharding, and the optimizer's
state follows the delta. The compiler adds the communication; nothing here does.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.arrays import factor_axes, is_adapted
from lora_jax.models.encoder import Encoder
from lora_jax.selection import flatten, look_up, path_of
from lora_jax.taps import untapped

AXES = ("data", "fsdp", "tensor")

Rules = Mapping[str, P]  # glob -> PartitionSpec, the first match wins


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor` over the first devices.

    Args:
      shape: the size of each axis; an axis that is left out has size 1.
      devices: all of this process group's, unless said.

    Raises:
      ValueError: an axis of another name, a size below 1, or more devices asked for than there are.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := set(shape) - set(AXES):
        raise ValueError(f"mesh axes are {', '.join(AXES)}, not {', '.join(sorted(unknown))}")
    sizes = tuple(shape.get(name, 1) for name in AXES)
    count = math.prod(sizes)
    if min(sizes) < 1 or count > len(devices):
        named = dict(zip(AXES, sizes, strict=True))
        raise ValueError(f"a mesh {named} needs {count} devices, there are {len(devices)}")
    # Auto: the compiler propagates shardings through models that name none.
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices[:count])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For every array of a batch: its examples spread over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def gpt2_rules(vocab_size: int, mesh: Mesh) -> Rules:
    """Rules for `models.gpt2`, in both layouts.

    Kernels shard one axis over `fsdp` and the other over `tensor`: query, key, value and up end in
    `tensor`, out and down begin with it (Shoeybi et al. 2019, Megatron-LM, section 3). The token
    table shards its rows over `tensor` where they divide (a padded vocabulary; GPT-2's 50,257 does
    not), else its features.
    """
    rows = _table(vocab_size, mesh)
    tables = {"**/wte/embedding": rows, "**/lm_head/kernel": P(*reversed(rows)), "**/wpe/embedding": _FEATURES}
    return _layers() | tables | {"**": P()}


def encoder_rules(vocab_size: int, mesh: Mesh) -> Rules:
    """Rules for `models.encoder`, as GPT-2's; the head is replicated."""
    tables = {"**/word/embedding": _table(vocab_size, mesh), "**/position/embedding": _FEATURES}
    return _layers() | tables | {"**": P()}


def rules_for(model: Any, mesh: Mesh) -> Rules:
    """The rules of one of our models."""
    make = encoder_rules if isinstance(model, Encoder) else gpt2_rules
    return make(model.config.vocab_size, mesh)


_FEATURES = P(None, ("fsdp", "tensor"))


def _table(rows: int, mesh: Mesh) -> P:
    return P("tensor", "fsdp") if rows % mesh.shape["tensor"] == 0 else _FEATURES


def _layers() -> dict[str, P]:
    block = {
        "attn/{query,key,value}/kernel": P("fsdp", "tensor"),
        "attn/{query,key,value}/bias": P("tensor"),
        "attn/out/kernel": P("tensor", "fsdp"),
        "mlp/up/kernel": P("fsdp", "tensor"),
        "mlp/up/bias": P("tensor"),
        "mlp/down/kernel": P("tensor", "fsdp"),
    }
    return {f"**/h_*/{glob}": spec for glob, spec in block.items()} | {
        f"**/h/{glob}": P(None, *spec) for glob, spec in block.items()
    }


def shardings(tree: Any, mesh: Mesh, rules: Rules, adapted: Any = None) -> Any:
    """A NamedSharding for every leaf, in the structure of the tree.

    Args:
      tree: parameters, adapted parameters, a delta, an optimizer's state, or what holds such.
      mesh: from `make_mesh`.
      rules: glob -> PartitionSpec of a parameter, the first match wins. Scalars are replicated.
      adapted: `method.apply(params, delta)`, of which shapes suffice (`jax.eval_shape`): says how
        the factors of a delta, and what has their path in an optimizer's state, follow the
        weights. Not needed for parameters.

    Raises:
      ValueError: no rule matches, a rule names more axes than its leaf has, or one does not divide.
    """
    known = dict(_specs(tree if adapted is None else adapted, rules))

    def place(keys: tuple, leaf: Any) -> NamedSharding:
        path = path_of(keys)
        spec = _find(path, known, rules) if leaf.ndim else P()
        _check(path, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def _specs(tree: Any, rules: Rules) -> Iterator[tuple[str, P]]:
    """(path, spec) of every parameter; of an adapted one also those of base and factors."""
    for path, leaf in flatten(untapped(tree)[0], is_leaf=is_adapted)[0]:
        spec = look_up(rules, path, "sharding rules") if leaf.ndim else P()
        yield path, spec
        if not is_adapted(leaf):
            continue
        yield f"{path}/base", spec
        yield f"{path}/value", spec
        of_axis: dict[Any, Any] = dict(enumerate(spec))
        for name, layout in leaf.layout.items():
            axes = factor_axes(layout, leaf.axes)
            yield f"{path}/{name}", P(*(of_axis.get(axis) for axis in axes))


def _find(path: str, known: Mapping[str, P], rules: Rules) -> P:
    """That of the longest known end of the path (`0/mu/h_0/...` ends in `h_0/...`), or by rule."""
    parts = path.split("/")
    for start in range(len(parts)):
        if (end := "/".join(parts[start:])) in known:
            return known[end]
    return look_up(rules, path, "sharding rules")


def _check(path: str, shape: Sequence[int], spec: P, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"{path} has shape {shape}, but its rule {spec} names {len(spec)} axes")
    for size, names in zip(shape, spec, strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        ways = math.prod(mesh.shape[name] for name in names)
        if size % ways:
            raise ValueError(
                f"{path} has shape {shape}: {size} does not divide over the {ways} devices of "
                f"{', '.join(names)}; pad it, or change its rule {spec} or the mesh"
            )
