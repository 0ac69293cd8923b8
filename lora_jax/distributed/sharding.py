"""Where each array lives on a mesh: ordered rules over paths, as NamedShardings for `jax.jit`::

    mesh = make_mesh({"data": 2, "fsdp": 4})
    rules = rules_for(model, mesh)
    adapted = jax.eval_shape(method.apply, params, delta)
    params = jax.device_put(params, shardings(params, mesh, rules))
    delta = jax.device_put(delta, shardings(delta, mesh, rules, adapted))

A low-rank A takes the input sharding of its kernel, B the output sharding, and the optimizer's state follows the delta.
The compiler adds the communication; nothing here does. `table` shows what lies where.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax import NamedSharding, P
from jax.sharding import AxisType, Mesh

from lora_jax.core.arrays import factor_axes, is_adapted
from lora_jax.core.globs import matches_any
from lora_jax.core.lifting.taps import untapped
from lora_jax.core.selection import CLASS, flatten, look_up, path_of
from lora_jax.core.transforms import method_shardings
from lora_jax.models.family import family_of

AXES = ("data", "fsdp", "tensor")

Shape = tuple[int, ...]
Rules = Mapping[str, P]  # glob -> PartitionSpec, the first match wins


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor` over the first devices (of all, if none are given). `shape` has
    their sizes; an axis that is left out has size 1.

    Raises:
      ValueError: an axis of another name, a size below 1, or more devices than there are.

    >>> dict(make_mesh({"data": 1}).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    if unknown := set(shape) - set(AXES):
        raise ValueError(f"mesh axes are {', '.join(AXES)}, not {', '.join(sorted(unknown))}")
    sizes = tuple(shape.get(name, 1) for name in AXES)
    count = math.prod(sizes)
    if min(sizes) < 1 or count > len(devices):
        named = dict(zip(AXES, sizes, strict=True))
        raise ValueError(f"a mesh {named} needs {count} devices, there are {len(devices)}")
    types = (AxisType.Auto,) * len(AXES)  # the compiler propagates shardings through models that name none
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices[:count])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For every array of a batch: its examples spread over `data` and `fsdp`.

    >>> batch = jax.device_put({"tokens": jax.numpy.ones((4, 8))}, batch_sharding(make_mesh({})))
    """
    return NamedSharding(mesh, P(("data", "fsdp")))


def on_mesh(model: Any, mesh: Mesh) -> Any:
    """One of our models with its activations between layers spread over the mesh: examples over `data` and `fsdp`,
    positions over `tensor` (sequence parallelism, Korthikanti et al. 2022, arXiv 2205.05198). Without it the compiler
    keeps all of what remat stores on each device of `tensor`. Under `jax.jit` lengths need not divide."""
    if mesh.size == 1:
        return model
    residual = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    return type(model)(dataclasses.replace(model.config, residual=residual))


def rules_for(model: Any, mesh: Mesh) -> Rules:
    """The sharding rules of a model, those of its family; for `shardings`, which refuses a leaf that no rule names."""
    return family_of(model).sharding_rules(model.config, mesh)


def shardings(
    tree: Any, mesh: Mesh, rules: Rules, adapted: Any = None, *, misfits: Literal["error", "replicate"] = "error"
) -> Any:
    """A NamedSharding for every leaf, in the structure of the tree.

    Args:
      tree: parameters, adapted parameters, a delta, an optimizer's state, or what holds such.
      rules: of parameters. Scalars are replicated, and so is, with a warning, what a method keeps under a weight's path
        along no axis of it, where no rule names it.
      adapted: `method.apply(params, delta)`, of which shapes suffice (`jax.eval_shape`): says how the factors of a
        delta, and what has their path in an optimizer's state, follow the weights. What lacks an axis of its factor
        (Adafactor's state) follows the others where its shape tells which they are. Not needed for parameters.
      misfits: what becomes of an axis that does not divide over the devices of its rule. "replicate": it stays whole,
        and a warning says so.

    Raises:
      ValueError: no rule matches, a rule names more axes than its leaf has, or one does not divide.

    >>> from jax.sharding import PartitionSpec
    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 4), "float32")}
    >>> placed = shardings(params, make_mesh({}), {"**/kernel": PartitionSpec("fsdp", "tensor")})
    >>> tuple(placed["kernel"].spec)
    ('fsdp', 'tensor')
    """
    specs = dict(_specs(tree if adapted is None else adapted, rules, mesh))
    # factors of taps, in a delta and on a tree, and what weights share are replicated unless a method's traits say else
    rules = {**rules, **method_shardings(), "**/@*/**": P(), "taps/**": P()}

    def place(keys: tuple, leaf: Any) -> NamedSharding:
        path = path_of(keys)
        spec = _find(path, leaf.shape, specs, rules, mesh) if leaf.ndim else P()
        return NamedSharding(mesh, _fitting(path, leaf.shape, spec, mesh, misfits))

    return jax.tree_util.tree_map_with_path(place, tree)


class Placement(NamedTuple):
    """A mesh, and the rules that say where on it each array lies: what `shardings` and `batch_sharding` need."""

    mesh: Mesh
    rules: Rules

    @classmethod
    def of(cls, model: Any, mesh: Mesh) -> "Placement":
        """A model's, by its family's rules."""
        return cls(mesh, rules_for(model, mesh))

    @classmethod
    def one_device(cls) -> "Placement":
        """Everything on the first device."""
        return cls(make_mesh({}), {"**": P()})

    @property
    def replicated(self) -> NamedSharding:
        """On every device."""
        return NamedSharding(self.mesh, P())

    def shardings(self, tree: Any, adapted: Any = None) -> Any:
        """`shardings` of a tree on this mesh, by these rules."""
        return shardings(tree, self.mesh, self.rules, adapted)


def _specs(tree: Any, rules: Rules, mesh: Mesh) -> Iterator[tuple[str, tuple[P, Shape]]]:
    """(path, (spec, shape)) of every parameter; of an adapted one also those of base and factors."""
    for path, leaf in flatten(untapped(tree)[0], is_leaf=is_adapted)[0]:
        spec = look_up(rules, path, "sharding rules") if leaf.ndim else P()
        yield path, (spec, leaf.shape)
        if not is_adapted(leaf):
            continue
        yield from ((f"{path}/{name}", (spec, leaf.shape)) for name in ("base", "value"))
        yield from _factor_specs(path, leaf, spec, mesh)
        if is_adapted(leaf.base):
            yield from _factor_specs(f"{path}/base", leaf.base, spec, mesh)


def _factor_specs(path: str, leaf: Any, spec: P, mesh: Mesh) -> Iterator[tuple[str, tuple[P, Shape]]]:
    """(path, (spec, shape)) of the factors of an adapted array, along the axes that each follows. Codes that have all
    input (or output) axes as one, I (or O), go as the first of those does, where their number divides."""
    of_axis: dict[Any, Any] = dict(enumerate(spec))
    for joined, kind in (("I", "i"), ("O", "o")):
        first = next((axis for axis, letter in enumerate(leaf.axes) if CLASS[letter] == kind), None)
        of_axis[joined] = of_axis.get(first)
    for name, layout in leaf.layout.items():
        axes = factor_axes(layout, leaf.axes)
        shape = getattr(getattr(leaf, name), "shape", ())
        entries = [of_axis.get(axis) for axis in axes]
        for n, (axis, size) in enumerate(zip(axes, shape, strict=False)):
            if axis in ("I", "O") and size % _ways(entries[n], mesh):
                entries[n] = None
        yield f"{path}/{name}", (P(*entries), shape)


def _ways(names: Any, mesh: Mesh) -> int:
    """The devices that an entry of a spec spreads an axis over."""
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))


def _follow(shape: Shape, spec: P, followed: Shape) -> P:
    """The spec of a leaf with the path of one of that spec and shape: along the axes that both have."""
    if shape == followed:
        return spec
    entries = [*spec, *[None] * (len(followed) - len(spec))]
    if len(shape) == len(followed):
        return P(*(entry if n == m else None for entry, n, m in zip(entries, shape, followed, strict=False)))
    lacking = [n for n in range(len(followed)) if followed[:n] + followed[n + 1 :] == shape]
    left = {P(*entries[:n], *entries[n + 1 :]) for n in lacking}
    return left.pop() if len(left) == 1 else P()


def _find(path: str, shape: Shape, specs: Mapping[str, tuple[P, Shape]], rules: Rules, mesh: Mesh) -> P:
    """That of the longest end of the path that has one (`0/mu/h_0/...` ends in `h_0/...`), or by rule; P() for what
    a method keeps under a weight's path beside the factors."""
    parts = path.split("/")
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    for end in ends:
        if end in specs:
            return _follow(shape, *specs[end])
    if any(end.rpartition("/")[0] in specs for end in ends) and not matches_any(rules, path):
        if mesh.size > 1:
            logging.warning("%s lies along no axis of its weight, and no rule names it: it stays whole", path)
        return P()
    return look_up(rules, path, "sharding rules")


def _fitting(path: str, shape: Sequence[int], spec: P, mesh: Mesh, misfits: str) -> P:
    if len(spec) > len(shape):
        raise ValueError(f"{path} has shape {shape}, but its rule {spec} names {len(spec)} axes")
    fitting = list(spec)
    for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
        ways = _ways(names, mesh)
        if size % ways == 0:
            continue
        names = (names,) if isinstance(names, str) else names
        problem = f"{path} has shape {shape}: {size} does not divide over the {ways} devices of {', '.join(names)}"
        if misfits == "error":
            raise ValueError(f"{problem}; pad it, change its rule {spec} or the mesh, or say misfits='replicate'")
        logging.warning("%s: it stays whole along this axis", problem)
        fitting[axis] = None
    return P(*fitting)


def table(tree: Any, places: Any) -> str:
    """What lies where, for reading: path, type and shape, spec, and bytes on each device, with their sum, of a tree of
    arrays or ShapeDtypeStructs and their `shardings`.

    >>> from jax.sharding import PartitionSpec
    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 4), "float32")}
    >>> text = table(params, shardings(params, make_mesh({}), {"**": PartitionSpec()}))
    >>> "128" in text  # bytes
    True
    """
    rows, total = [("path", "array", "spec", "bytes per device")], 0
    for (path, leaf), place in zip(flatten(tree)[0], jax.tree.leaves(places), strict=True):
        size = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += size
        rows.append((path, f"{leaf.dtype}{tuple(leaf.shape)}", str(tuple(place.spec)), f"{size:,}"))
    rows.append(("all", "", "", f"{total:,}"))
    widths = [*(max(len(row[n]) for row in rows) for n in range(3)), 0]
    return "\n".join("  ".join(map(str.ljust, row, widths)) for row in rows)
