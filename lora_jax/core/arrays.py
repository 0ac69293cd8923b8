"""Adapted arrays: what stands in a parameter tree where a weight stood, and knows how to multiply.

An `Adapted` array is a frozen dataclass of `base` and factors (its pytree leaves) and static fields. `layout` names the
axes of each factor: s, i, o stand for all axes of that class of the base, in the base's order, any other letter for one
axis of its own. Slicing, transposing, scanning, vmapping and sharding follow from it (`lifting/axis_ops.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.core.dropout import drop
from lora_jax.core.selection import CLASS, OneLeaf

T = TypeVar("T")


class PathLabel(str):
    """The path of an adapted array, for messages. All are equal, so that layers of equal shapes compile once.

    >>> import lora_jax as lj
    >>> lj.PathLabel("h_0/kernel") == lj.PathLabel("h_1/kernel"), str(lj.PathLabel("h_0/kernel"))
    (True, 'h_0/kernel')
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PathLabel)

    __ne__ = object.__ne__  # the opposite of __eq__; str has its own

    def __hash__(self) -> int:
        return 0


Label = PathLabel  # its name before


def static(**kwargs: Any) -> Any:
    """A field of an adapted array that is not an array."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, eq_default=False, kw_only_default=True, field_specifiers=(static,))
def adapted_array(cls: type[T]) -> type[T]:
    """Makes a class with annotated fields a frozen dataclass and a pytree: a kind of adapted array."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)(cls))


class Op(Protocol):
    """The equation that an adapted weight meets, with the weight's axes in the order `(i.., o..)`."""

    @property
    def drops_input(self) -> bool:
        """Whether dropout applies to the input, as it does except to the ids of an embedding lookup."""

    def __call__(self, x: Array, w: Array) -> Array:
        """x times a weight `(i.., o..)`, ending in `o..`."""

    def down(self, x: Array, a: Array) -> Array:
        """x times a factor `(i.., r)`, ending in r."""

    def up(self, z: Array, b: Array) -> Array:
        """The plain product of z's last axis with b `(r, o..)`, ending in `o..`."""

    def scale_input(self, x: Array, w: Array, scale: Array) -> Array:
        """x times w with its input axes scaled by `(i..)`: x is, instead; of ids their rows, of a window w."""


class Adapted:
    """The protocol of adapted arrays. A method's kind defines layout, materialize, remove and product.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, method = {"kernel": jnp.ones((3, 2))}, lj.lora(lj.select("kernel"), rank=1)
    >>> w = method.apply(params, method.init(jax.random.key(0), params))["kernel"]
    >>> isinstance(w, lj.Adapted), w.shape, w.axes, w.materialize().shape
    (True, (3, 2), 'io', (3, 2))
    """

    layout: ClassVar[dict[str, str]] = {}
    frozen: ClassVar[tuple[str, ...]] = ("base", "key", "scale")  # fields that do not train
    exact: ClassVar[tuple[str, ...]] = ()  # factors that keep their dtype where the base is cast to another
    base: Any
    core: str
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def indivisible(self) -> bool:
        """Whether the factors cannot follow a slice of an input or output axis, so that a slice is dense."""
        return isinstance(self, Encoded) or is_adapted(self.base)

    @property
    def axes(self) -> str:
        """One letter an axis, stacked ones too. (`core` lacks those: vmap, scan and indexing add and take them.)"""
        return "s" * (self.ndim - len(self.core)) + self.core

    def replace(self, **fields: Any) -> Self:
        """The same array with other fields."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

    def materialize(self) -> Array:
        """The dense array: summed in float32, rounded once to the base's dtype."""
        raise NotImplementedError

    def remove(self) -> Array:
        """The base, given that `base` is the merged array; a ValueError where the method cannot be undone."""
        raise ValueError(f"{self.path}: {type(self).__name__} cannot be unmerged; keep the base")

    def product(self, x: Array, op: Op) -> Array:
        """x times the adapted weight, whose axes are `(i.., o..)` here, without stacked ones."""
        raise NotImplementedError

    def transposed(self) -> "Adapted | None":
        """The same array with input and output exchanged, or None where there is no such form."""
        return None

    def ready(self) -> "Adapted":
        """The same array with what is derived from whole factors; `lift` calls it once, before they are sliced."""
        return self

    def _unlifted(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"adapted array at {self.path}: wrap the function with lora_jax.lift, or merge")

    __jax_array__ = __array__ = __getitem__ = __iter__ = __neg__ = __pow__ = __matmul__ = __rmatmul__ = _unlifted
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _unlifted

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"adapted array at {self.path} has no {name}: wrap with lora_jax.lift, or merge")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path}, {self.axes!r}, shape={self.shape})"


def is_adapted(node: Any) -> bool:
    """Whether this is an adapted array."""
    return isinstance(node, Adapted)


class Encoded(Adapted, OneLeaf):
    """A frozen array that is kept in another form than its values (of 4 bits, say). It is a leaf of params as a plain
    array is, and may be the base of any adapted one.

    A kind has `shape`, `dtype` (of its values), `layout` (of all its arrays), and defines

    - `astype(dtype)`: the dense array; `cast(dtype)`: the same codes, with values of another dtype;
    - `within(function, x, *rest)`: `function(x, array, *rest)` with the array there no longer than that takes, in the
      backward pass too;
    - `resized(axes, shape)`: the fields that change where the input and output axes become these;
    - `base`: a ShapeDtypeStruct of the values.
    """

    def product(self, x: Array, op: Op) -> Array:
        return op(x, self)  # type: ignore[arg-type]


def dense(w: Any) -> Any:
    """A plain array, which an adapted one stands for."""
    return w.materialize() if is_adapted(w) else w


def is_changed(node: Any) -> bool:
    """Whether this is an array that a method changes: adapted, and not merely encoded."""
    return is_adapted(node) and not isinstance(node, Encoded)


def ready(w: Adapted) -> Adapted:
    """`w.ready()`, with frozen fields that have no gradient. They lose it here, before anything slices them: the
    backward pass of a scan reads its inputs again, but keeps what is computed from a layer's."""
    frozen = {name: x for name, x in arrays_of(w).items() if is_frozen(name, w.frozen)}
    return w.replace(**lax.stop_gradient(frozen)).ready()


def arrays_of(w: Adapted) -> dict[str, Any]:
    """The fields of an adapted array that are no static ones."""
    names = (field.name for field in dataclasses.fields(w) if not field.metadata.get("static"))  # type: ignore[arg-type]
    return {name: getattr(w, name) for name in names}


def is_frozen(name: str, frozen: Sequence[str] = ()) -> bool:
    """Whether a factor, or a field of an adapted array with these frozen ones, does not train."""
    return name.startswith("fixed_") or name in frozen


def factor_axes(layout: str, axes: str) -> list[int | str]:
    """The axes of a factor with this layout: the base axis it follows, or its own letter.

    >>> factor_axes("sir", "sio")
    [0, 1, 'r']
    """
    of_class = {kind: [j for j, letter in enumerate(axes) if CLASS[letter] == kind] for kind in "sio"}
    return [axis for letter in layout for axis in of_class.get(letter, [letter])]


def sides(w: Adapted) -> tuple[int, ...]:
    """How many entries a weight has along its window, its other input axes and its output axes."""
    return tuple(math.prod(n for n, x in zip(w.shape, w.axes, strict=True) if x in side) for side in ("k", "iv", "o"))


def scaled(y: Array, scale: Array) -> Array:
    """y with its last axes scaled by an array that broadcasts to them, rounded once to y's dtype."""
    wide = widened(y.dtype)
    spread = lax.expand_dims(scale.astype(wide), range(y.ndim - scale.ndim))
    return (y.astype(wide) * spread).astype(y.dtype)


def einsum(layouts: str, axes: str, *arrays: Array) -> Array:
    """`jnp.einsum` of factors, which are named by their layouts, and of W, which has the base's own axes."""

    def subscripts(layout: str) -> str:  # base axis j is the j-th capital letter, a factor's own axes keep theirs
        positions = range(len(axes)) if layout == "W" else factor_axes(layout, axes)
        return "".join(chr(65 + a) if isinstance(a, int) else a for a in positions)

    inputs, output = layouts.split("->")
    names = ",".join(map(subscripts, inputs.split(",")))
    return jnp.einsum(f"{names}->{subscripts(output)}", *arrays, precision="highest")


def widened(dtype: Any) -> Any:
    """The dtype of sums: float32, or wider where the base's is."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def rounded_sum(base: Array, delta: Array, dtype: Any) -> Array:
    """base + delta, summed in delta's dtype and rounded once."""
    return (base.astype(delta.dtype) + delta).astype(dtype)


@adapted_array
class Weight(Adapted):
    """The base, frozen, with the fields that most kinds of adapted arrays have."""

    base: Array
    core: str = static()
    path: str = static(default=PathLabel())

    def product(self, x: Array, op: Op) -> Array:
        return op(x, self.base)

    def materialize(self) -> Array:
        return dense(self.base)

    @property
    def flipped(self) -> str:
        """`core` with input and output exchanged."""
        return self.core.translate(str.maketrans("ivko", "oooi"))


@adapted_array
class Summed(Weight):
    """base + delta()."""

    def delta(self) -> Array:
        """The change in the base's axes, float32 (or wider)."""
        return self.ready().delta()

    def materialize(self) -> Array:
        return rounded_sum(self.base, self.delta(), self.dtype)

    def remove(self) -> Array:
        return rounded_sum(self.base, -self.delta(), self.dtype)


@adapted_array
class LowRank(Summed):
    """LoRA: base + scale * A B, with A `(s.., i.., r)` and B `(s.., r, o..)` (Hu et al. 2021, section 4.1).

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> base, a, b = jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.ones((1, 2))
    >>> lj.LowRank(base=base, core="io", path="kernel", a=a, b=b, scale=jnp.array(2.0)).materialize()[0]
    Array([3., 3.], dtype=float32)
    """

    layout: ClassVar = {"a": "sir", "b": "sro", "scale": "s", "key": "s"}
    a: Array
    b: Array
    scale: Array
    key: Array | None = None
    dropout: float = static(default=0.0)

    def product(self, x: Array, op: Op) -> Array:
        y = op(x, self.base)
        return y + self.branch(self.dropped(x, op), op).astype(y.dtype)

    def branch(self, x: Array, op: Op) -> Array:
        """scale * x A B."""
        z = op.down(x, self.a)
        return op.up(z * self.scale.astype(z.dtype), self.b)

    def dropped(self, x: Array, op: Op) -> Array:
        """x after dropout, the branch's input; ids stay."""
        key = self.key if self.dropout and op.drops_input else None
        return x if key is None else drop(key, x, self.dropout)

    def delta(self) -> Array:
        a, b, scale = (factor.astype(widened(self.dtype)) for factor in (self.a, self.b, self.scale))
        return einsum("sir,sro->W", self.axes, einsum("sir,s->sir", self.axes, a, scale), b)

    def transposed(self) -> Self:
        rank = factor_axes(self.layout["b"], self.axes).index("r")
        a, b = jnp.moveaxis(self.b, rank, -1), jnp.moveaxis(self.a, -1, rank)
        return self.replace(a=a, b=b, core=self.flipped)


@adapted_array
class Tuned(Adapted):
    """A leaf that trains itself. `lift` puts its value in its place.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params, method = {"bias": jnp.zeros(2)}, lj.tune(lj.select("bias"))
    >>> method.apply(params, lj.Delta({"bias": {"value": jnp.ones(2)}}))["bias"].value
    Array([1., 1.], dtype=float32)
    """

    frozen: ClassVar = ()
    value: Array
    path: str = static(default=PathLabel())

    @property
    def base(self) -> Array:  # type: ignore[override]
        return self.value

    @property
    def axes(self) -> str:
        return ""

    def materialize(self) -> Array:
        return self.value


def map_adapted(fn: Callable, tree: Any) -> Any:
    """`fn` of every adapted array in the tree; other leaves stay."""
    return jax.tree.map(lambda leaf: fn(leaf) if is_adapted(leaf) else leaf, tree, is_leaf=is_adapted)
