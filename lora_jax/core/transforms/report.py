"""What a method would train, as a table."""

from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.arrays import is_frozen
from lora_jax.core.selection import flatten, left_out
from lora_jax.core.transforms.registry import from_spec
from lora_jax.core.transforms.transform import ParamTransform, keys_of, shapes_of


class Row(NamedTuple):
    """One leaf that a method changes, or a key of what several share."""

    path: str
    shape: tuple[int, ...]
    axes: str
    method: str
    factors: str
    trained: int


class Report(NamedTuple):
    """What a method trains; prints as a table. `total` is the number of the base's parameters.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> report = lj.check(lj.lora(lj.select("kernel"), rank=1), {"kernel": jnp.ones((3, 2))})
    >>> report.trained, report.total, [row.factors for row in report.rows]
    (5, 6, ['a (3, 1), b (1, 2)'])
    """

    rows: list[Row]
    trained: int
    total: int

    def __str__(self) -> str:
        header = ("path", "shape", "axes", "method", "factors", "trained", "share")
        rows = [(*map(str, row[:-1]), f"{row.trained:,}", f"{row.trained / self.total:.4%}") for row in self.rows]
        lines = [header, *rows]
        widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
        table = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        trained = f"trained: {self.trained:,} of {self.total:,} parameters ({self.trained / self.total:.4%})"
        return "\n".join([*table, trained])

    def __repr__(self) -> str:
        return f"Report({len(self.rows)} leaves, {str(self).splitlines()[-1]})"


def check(method: ParamTransform, params: Any) -> Report:
    """What a method would train on these params (arrays or ShapeDtypeStructs); raises on what cannot work.

    >>> import jax, lora_jax as lj
    >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
    >>> print(lj.check(lj.lora(lj.select("kernel"), rank=8), params))
    path    shape         axes  method  factors                  trained  share
    kernel  (4096, 4096)  io    lora    a (4096, 8), b (8, 4096)  65,536   0.3906%
    trained: 65,536 of 16,777,216 parameters (0.3906%)
    """
    (delta, adapted), flat = shapes_of(method, params), flatten(params)[0]
    names, others = dict[str, str](), dict[str, str]()
    for spec in method.spec["of"] if method.spec["method"] == "chain" else [method.spec]:
        part = method if spec is method.spec else from_spec(spec)
        names |= dict.fromkeys(keys_of(part, params), spec["method"])
        others |= left_out(spec.get("select", ()), flat, spec.get("exclude", ()))
    rows = []
    for path, factors in delta.items():
        w = adapted.get(path)
        shown = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in sorted(factors.items()))
        trained = sum(leaf.size for name, leaf in factors.items() if not is_frozen(name))
        shape, axes = (tuple(w.shape), w.axes) if w is not None else ((), "")
        rows.append(Row(path, shape, axes, names.get(path, ""), shown, trained))
    rows += [Row(path, (), "", "", f"none: {dtype} does not train", 0) for path, dtype in others.items()]
    sizes = (int(np.prod(leaf.shape)) for _, leaf in flat if hasattr(leaf, "shape"))
    return Report(rows, sum(row.trained for row in rows), max(sum(sizes), 1))
