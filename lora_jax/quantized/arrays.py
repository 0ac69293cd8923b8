"""`Quantized`: the codes of a frozen weight, in the place of the weight in params or under an adapted array."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lora_jax.core.arrays import Encoded, PathLabel, adapted_array, is_adapted, static
from lora_jax.core.selection import CLASS, Selection, check_globs, flatten
from lora_jax.core.transforms import Params
from lora_jax.core.transforms.transform import need_params
from lora_jax.quantized.kinds import KINDS, Codes, Kind, gguf_blocks

BITS = {4: "nf4", 8: "int8"}


@adapted_array
class Quantized(Encoded):
    """A quantized weight: rows of codes, one row for each output unit, or for each word of an embedding.

    Attributes:
      codes: one of the arrays of the kind (`kinds.KINDS`); scale, minimum, nested and offset are the others, None where
        it has none.
      inner: the sizes of the axes along a row, inputs or of an embedding features, which the codes have as one.
      rows: the class of the axes of the rows, "o" or of an embedding "i".
      values: the dtype of the values, that of the product.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> w = lj.quantize({"kernel": jnp.ones((64, 2))}, lj.select("kernel"), bits=8)["kernel"]
    >>> w.shape, w.codes.dtype.name, w.axes
    ((64, 2), 'int8', 'io')
    """

    frozen = ("codes", "scale", "minimum", "nested", "offset")
    codes: Array
    scale: Array
    minimum: Array | None = None
    nested: Array | None = None
    offset: Array | None = None
    kind: str = static()
    inner: tuple[int, ...] = static()
    rows: str = static(default="o")
    values: Any = static(default=np.dtype("float32"))
    core: str = static()
    path: str = static(default=PathLabel())

    @property
    def layout(self) -> dict[str, str]:  # type: ignore[override]
        blocks = "I" if self.rows == "o" else "O"
        layout = KINDS[self.kind].layout
        return {name: axes.replace("R", self.rows).replace("B", blocks) for name, axes in layout.items()}

    @property
    def ndim(self) -> int:
        return len(self._lead) + len(self.inner)

    @property
    def shape(self) -> tuple[int, ...]:
        lead, inner = self._lead, iter(self.inner)
        stacked, rows = iter(lead), iter(lead[self.axes.count("s") :])
        sizes = {"s": stacked, self.rows: rows}
        return tuple(next(sizes.get(CLASS[letter], inner)) for letter in self.axes)

    @property
    def dtype(self) -> Any:
        return self.values

    @property
    def base(self) -> Any:  # type: ignore[override]
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def _lead(self) -> tuple[int, ...]:
        """The sizes of the stacked axes and of the rows."""
        return self.codes.shape[: self.codes.ndim - len(self.layout["codes"]) + 2]

    def cast(self, dtype: Any) -> Self:
        return self.replace(values=np.dtype(dtype))

    def materialize(self) -> Array:
        return self.astype(self.values)

    def astype(self, dtype: Any) -> Array:
        """The values, computed in float32 and rounded once."""
        numbers = KINDS[self.kind].decode({name: getattr(self, name) for name in self.layout})
        numbers = numbers[..., : math.prod(self.inner)].astype(dtype)
        order = order_of(self.axes, self.rows)
        return numbers.reshape(*self._lead, *self.inner).transpose(np.argsort(order).tolist())

    def resized(self, axes: str, shape: Sequence[int]) -> dict[str, Any]:
        inner = (n for n, letter in zip(shape, axes, strict=True) if CLASS[letter] not in ("s", self.rows))
        return {"inner": tuple(inner)}

    def transposed(self) -> Self:
        core = self.core.translate(str.maketrans("ivko", "oooi"))
        return self.replace(core=core, rows="i" if self.rows == "o" else "o")

    def within(self, function: Callable, x: Array, *rest: Array) -> Array:
        x_type = jax.typeof(x)

        @jax.custom_vjp
        def product(x: Array, w: Quantized, *rest: Array) -> Array:
            return function(x, _after(w, x).materialize(), *rest)

        def forward(x: Array, w: Quantized, *rest: Array) -> Any:
            return product(x, w, *rest), (w, (x, *rest) if rest else ())

        def backward(kept: Any, g: Array) -> Any:
            w, inputs = kept
            if not jnp.issubdtype(x_type.dtype, jnp.floating):
                return (None, None, *(None for _ in inputs[1:]))
            array = _after(w, g).materialize()
            if not inputs:  # linear in x, which then need not be kept
                return *jax.linear_transpose(lambda x: function(x, array), x_type)(g), None
            _, pull = jax.vjp(lambda x, *rest: function(x, array, *rest), *inputs)
            of_x, *of_rest = pull(g)
            return of_x, None, *of_rest

        product.defvjp(forward, backward)
        return product(x, self, *rest)


def order_of(axes: str, rows: str) -> list[int]:
    """The axes in the order stacked, rows, along a row."""
    place = {"s": 0, rows: 1}
    return sorted(range(len(axes)), key=lambda axis: (place.get(CLASS[axes[axis]], 2), axis))


def _after(w: Quantized, x: Array) -> Quantized:
    """w, whose codes the compiler then cannot decode before x is there: those of all layers at once, or once for
    forward and backward pass."""

    def barrier(codes: Codes, x: Array) -> Codes:
        return lax.optimization_barrier((codes, x))[0]

    def on_cpu(codes: Codes, x: Array) -> Codes:  # whose compiler drops barriers: what depends on x it cannot know
        never = lax.slice(x, [0] * x.ndim, [1] * x.ndim).reshape(()) > jnp.inf
        return {name: array ^ never.astype(array.dtype) for name, array in codes.items()}

    aval: Any = jax.typeof(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.size or getattr(aval, "vma", None):
        return w
    codes = {"codes": w.codes} | ({"scale": w.scale} if jnp.issubdtype(w.scale.dtype, jnp.integer) else {})
    if any(aval.sharding.spec):  # an explicit mesh
        return w.replace(**barrier(codes, x))
    return w.replace(**lax.platform_dependent(codes, x, cpu=on_cpu, default=barrier))


def quantize(params: Params, selection: Selection, *, bits: int = 4) -> Params:
    """The same params with the selected weights in 8 or 4 bits, frozen: `Quantized` leaves.

    `lift` meets them alone or under an adapted array: each product makes the dense weight anew, in the dtype that the
    model computes in, and keeps it no longer than it takes. All methods adapt them as they do plain arrays: they see
    their values. `tune` trains a dense copy, in float32. `merge` makes them dense.

    Args:
      params: arrays, or shapes (ShapeDtypeStruct).
      selection: the weights, each with input and output axes: a scale is for an output unit and, in 4 bits, 64 inputs
        that follow one another; an input size that is no multiple is filled up. Of an embedding ("vo") it is for a word
        and its features. Norms and biases, and an embedding or head where every bit counts, are better left out.
      bits: 8, int8 with one scale an output unit; or 4, nf4 with scales in 8 bits, 4.13 bits a number (QLoRA).

    Raises:
      ValueError: other bits, a leaf without input or output axes, or one that is quantized or adapted already.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = lj.quantize({"kernel": jnp.ones((64, 2))}, lj.select("kernel"), bits=4)
    >>> params["kernel"].nbytes, lj.lift(lambda p, x: x @ p["kernel"])(params, jnp.ones((1, 64))).tolist()
    (74, [[64.0, 64.0]])
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits!r}: weights are quantized to {' or '.join(map(str, BITS))}")
    need_params(params, "quantize")
    if not isinstance(selection, Selection):
        raise TypeError(f"quantize takes a selection, lora_jax.select('**/kernel'); got {selection!r:.60}")
    check_globs(selection.globs, params, selection.exclude)
    if selection.layers:
        raise ValueError(f"quantize takes whole leaves, not layers={selection.layers} of a stack")
    chosen = selection.leaves(params)
    flat, treedef = flatten(params, is_adapted)

    def leaf_of(path: str, leaf: Any) -> Any:
        return encoded(path, leaf, selection.axes_of(path, leaf), BITS[bits]) if path in chosen else leaf

    return jax.tree.unflatten(treedef, [leaf_of(path, leaf) for path, leaf in flat])


def encoded(path: str, leaf: Any, axes: str, kind: str) -> Quantized:
    """One array as codes of this kind."""
    if is_adapted(leaf):
        raise ValueError(f"{path} is quantized or adapted already ({leaf})")
    rows = _rows_of(path, axes)
    sizes = [leaf.shape[axis] for axis in order_of(axes, rows)]
    lead = len(axes) - sum(CLASS[letter] not in ("s", rows) for letter in axes)
    inner, core = tuple(sizes[lead:]), axes.lstrip("s")
    if math.prod(leaf.shape) == 0:
        raise ValueError(f"{path} has shape {tuple(leaf.shape)}: it has no numbers")
    encode = functools.partial(_encode, axes=axes, rows=rows, kind=kind)
    arrays = jax.eval_shape(encode, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else encode(jnp.asarray(leaf))
    fields = {"kind": kind, "inner": inner, "rows": rows, "values": np.dtype(leaf.dtype), "core": core}
    return Quantized(**arrays, **fields, path=PathLabel(path))


@functools.partial(jax.jit, static_argnames=("axes", "rows", "kind"))
def _encode(x: Array, *, axes: str, rows: str, kind: str) -> dict[str, Array]:
    how: Kind = KINDS[kind]
    order, stacked = order_of(axes, rows), axes.count("s")
    lead = [x.shape[axis] for axis in order if CLASS[axes[axis]] in ("s", rows)]
    flat = x.astype(jnp.float32).transpose(order).reshape(*lead, -1)
    short = -flat.shape[-1] % (how.block or 1)
    return how.encode(jnp.pad(flat, [(0, 0)] * len(lead) + [(0, short)]), stacked)  # type: ignore[misc]


def from_gguf(
    name: str, raw: np.ndarray, shape: Sequence[int], axes: str, *, dtype: Any = jnp.float32, path: str = ""
) -> Quantized:
    """A matrix of a GGUF file as a leaf of params, with the file's own blocks: its values are those that
    `gguf.quants.dequantize` gives, bit for bit.

    Args:
      name: the type, "Q4_0", "Q4_1" or "Q8_0".
      raw: (rows, bytes of a row) uint8, a row for an output unit, of an embedding for a word.
      shape, axes: of the leaf, without stacked axes: `(in, out)` and "io" of a kernel. Leaves of several layers are
        stacked by `jax.tree.map(jnp.stack, ...)`.
      dtype: of the values, where the model computes in another one.

    Raises:
      ValueError: another type, or other sizes than the leaf's.

    >>> import numpy as np
    >>> from lora_jax.quantized import from_gguf
    >>> block = np.float16(0.5).tobytes() + bytes(range(32))  # of Q8_0: a scale and 32 numbers of 8 bits
    >>> raw = np.frombuffer(block, np.uint8)[None]  # one output unit of 32 inputs
    >>> from_gguf("Q8_0", raw, (32, 1), "io").materialize()[:4, 0].tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
    arrays, rows = gguf_blocks(name, raw), _rows_of(path, axes)
    inner = tuple(n for n, letter in zip(shape, axes, strict=True) if CLASS[letter] != rows)
    lead = [n for n, letter in zip(shape, axes, strict=True) if CLASS[letter] == rows]
    numbers = arrays["codes"].shape[1] * KINDS[name].block
    if "s" in axes or math.prod(lead) != len(raw) or math.prod(inner) != numbers:
        raise ValueError(f"{path}: {len(raw)} rows of {numbers} numbers are no leaf {tuple(shape)} with axes {axes!r}")
    placed: dict[str, Any] = {field: jnp.asarray(x.reshape(*lead, *x.shape[1:])) for field, x in arrays.items()}
    fields: dict[str, Any] = {"kind": name, "inner": inner, "rows": rows, "values": np.dtype(dtype), "core": axes}
    return Quantized(**placed, **fields, path=PathLabel(path))


def _rows_of(path: str, axes: str) -> str:
    """The class of the axes of the rows; a ValueError where there are none, or none along a row."""
    if not {"i", "o"} <= {CLASS[letter] for letter in axes}:
        raise ValueError(f"{path} with axes {axes!r}: a quantized leaf needs input and output axes")
    return "i" if "v" in axes else "o"
