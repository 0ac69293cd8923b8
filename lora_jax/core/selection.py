"""Which leaves of a parameter tree a transform meets, and which of their axes are input and output.

A *path* is the keys of `jax.tree_util.tree_flatten_with_path` joined by "/"; a *glob* (`globs`) matches a whole path.
*Axes* are one letter an axis: `i` input, `o` output, `s` stacked, `k` spatial and `v` looked up (both count as input).
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.core.globs import alternatives, matches, matches_any, plainest

CLASS = {"i": "i", "v": "i", "k": "i", "o": "o", "s": "s"}  # what the letter of an axis counts as
_DEFAULT_AXES = {"kernel": "io", "embedding": "vo", "weight": "oi"}
_LETTERS = "i input, o output, k window, s stacked, v vocabulary"
_FLOATS = "only floating-point arrays train (lora_jax.quantize makes weights of 8 or 4 bits to adapt)"
_USES = {3: " for a convolution, ioo or iio for heads, sio if stacked", 4: " for a convolution, siio for stacked heads"}


class Absent(NamedTuple):
    """Stands where a tuned leaf was taken out of the base (`without_tuned`): a static node without a buffer.

    >>> import jax, lora_jax as lj
    >>> jax.tree.leaves({"bias": lj.Absent((2,), "float32")})
    []
    """

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


class OneLeaf:
    """A pytree node that counts as one leaf of params: it has shape, dtype and axes of the array that it stands for."""


jax.tree_util.register_pytree_node(Absent, lambda absent: ((), tuple(absent)), lambda static, _: Absent(*static))


def path_of(keys: tuple) -> str:
    """The keys of `tree_flatten_with_path` as one path; the trailing `.value` of an nnx variable is dropped."""
    if keys and getattr(keys[-1], "name", None) == "value":
        keys = keys[:-1]
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def flatten(params: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> tuple[list[tuple[str, Any]], Any]:
    """`[(path, leaf)], treedef`; Absent, OneLeaf, and what `is_leaf` accepts, are leaves."""
    one = lambda node: isinstance(node, Absent | OneLeaf) or is_leaf(node)  # noqa: E731
    flat, treedef = jax.tree.flatten_with_path(params, is_leaf=one)
    return [(path_of(keys), leaf) for keys, leaf in flat], treedef


def strings(value: str | Iterable[str]) -> tuple[str, ...]:
    """One string, or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def look_up(value: Any, path: str, what: str) -> Any:
    """`value` itself, or the first match of a mapping glob -> value; no match is a ValueError."""
    if not isinstance(value, Mapping):
        return value
    for glob, chosen in value.items():
        if matches(glob, path):
            return chosen
    raise ValueError(f"{what}: no glob of {list(value)} matches {path!r}; add one, '**' for the rest")


class Selection(NamedTuple):
    """What `select` returns: call it on params to get `{path: axes}`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> selection = lj.select("*/kernel", axes={"conv/*": "kio"}, exclude="out/*")
    >>> selection({"conv": {"kernel": jnp.ones((3, 4, 8))}, "out": {"kernel": jnp.ones((8, 2))}})
    {'conv/kernel': 'kio'}
    """

    globs: tuple[str, ...]
    axes: str | Mapping[str, str] | None = None
    layers: tuple[int, ...] | None = None
    exclude: tuple[str, ...] = ()
    ndim: int | None = None

    def __call__(self, params: Any) -> dict[str, str]:
        """`{path: axes}` of the selected leaves, in the tree's order.

        Raises:
          ValueError: a glob, or an alternative in its braces, matches no leaf; unnamed axes beyond two.
        """
        check_globs(self.globs, params, self.exclude)
        return {path: self.axes_of(path, leaf) for path, leaf in self.leaves(params).items()}

    def leaves(self, params: Any) -> dict[str, Any]:
        """`{path: leaf}` of the selected floating-point leaves; a glob that matches none is a ValueError.

        One matching alternative in braces suffices: specs of old files may have others.
        """
        leaves, every = _float_leaves(flat := flatten(params)[0]), dict(flat)
        selected = {path for glob in self.globs for path in _matching(glob, leaves, flat)}
        selected -= {path for glob in self.exclude for path in _matching(glob, every, flat)}
        stacked = {path: (self._named(path) or "").count("s") for path in selected}
        selected = {path for path, n in stacked.items() if self.ndim in (None, leaves[path].ndim - n)}
        layers = set(self.layers or (0,))
        chosen = {p: leaf for p, leaf in leaves.items() if p in selected and self._layers_of(p, leaf) & layers}
        if not chosen:
            options = [f"{name}={value!r}" for name, value in self.spec().items() if name not in ("select", "axes")]
            raise ValueError(f"select({', '.join([*map(repr, self.globs), *options])}) leaves no parameter")
        present = set().union(*(self._layers_of(path, leaf) for path, leaf in chosen.items()))
        if self.layers and (missing := sorted(set(self.layers) - present)):
            raise ValueError(f"layers={self.layers}: {next(iter(chosen))} and its like have no layer {missing[0]}")
        return chosen

    def axes_of(self, path: str, leaf: Any) -> str:
        """The axes of one leaf: as named in `axes`, else by the leaf's name and number of axes."""
        of_leaf = getattr(leaf, "axes", None)  # of one that is quantized
        axes = self._named(path) or of_leaf
        name, window = re.split(r"[/.]", path)[-1], "k" * (leaf.ndim - 2)
        if axes is None and leaf.ndim < 3:
            axes = _DEFAULT_AXES.get(name, "io") if leaf.ndim == 2 else "o" * leaf.ndim
        if axes is None or len(axes) != leaf.ndim or set(axes) - set(CLASS):
            named = "no axes are named" if axes is None else f"axes={axes!r}"
            proposed = f"oi{window}" if name == "weight" else f"{window}io"  # of Equinox; of Flax, Haiku and Keras
            hint = f"select(..., axes={{{path!r}: {proposed!r}}}){_USES.get(leaf.ndim, '')}; {_LETTERS}"
            raise ValueError(f"{path} has shape {tuple(leaf.shape)} but {named}: name its {leaf.ndim} axes, {hint}")
        if of_leaf and [CLASS[x] for x in axes] != [CLASS[x] for x in of_leaf]:
            raise ValueError(f"{path} was quantized with axes {of_leaf!r}, but the selection has {axes!r}")
        return axes

    def spec(self) -> dict[str, Any]:
        """This selection as JSON, the form that `from_spec` reads."""
        axes = dict(self.axes) if isinstance(self.axes, Mapping) else self.axes
        options: dict[str, Any] = {"axes": axes, "layers": list(self.layers or ()), "exclude": list(self.exclude)}
        options["ndim"] = self.ndim
        return {"select": list(self.globs)} | {name: value for name, value in options.items() if value}

    def _named(self, path: str) -> str | None:
        if not isinstance(self.axes, Mapping):
            return self.axes
        return next((axes for glob, axes in self.axes.items() if matches(glob, path)), None)

    def _layers_of(self, path: str, leaf: Any) -> set[int]:
        """The layers of a leaf: the entries of its stacked axis, or the number in its path."""
        if self.layers is None:
            return {0}
        if "s" in (axes := self._named(path) or ""):
            return set(range(leaf.shape[axes.index("s")]))
        number = re.search(r"(?:^|[/_])(\d+)(?=/|$)", path)
        return {int(number[1])} if number else set()


def check_globs(globs: Iterable[str], params: Any, exclude: Iterable[str] = ()) -> None:
    """A ValueError for a glob, or an alternative in its braces, that matches no floating-point leaf; one of `exclude`
    may match any leaf."""
    for several, leaves in ((globs, _float_leaves(flat := flatten(params)[0])), (exclude, dict(flat))):
        for glob in several:
            _matching(glob, leaves, flat, strict=True)


def left_out(globs: Iterable[str], flat: list[tuple[str, Any]], exclude: Iterable[str] = ()) -> dict[str, str]:
    """`{path: dtype}` of the arrays that globs match and that never train: of integers, complex numbers, keys."""
    dtypes = {path: leaf.dtype for path, leaf in flat if hasattr(leaf, "dtype")}
    others = {path: str(x) for path, x in dtypes.items() if not jnp.issubdtype(x, jnp.floating)}
    return {path: x for path, x in others.items() if matches_any(globs, path) and not matches_any(exclude, path)}


def _matching(glob: str, leaves: Mapping[str, Any], flat: list[tuple[str, Any]], strict: bool = False) -> list[str]:
    """The paths of the leaves that a glob matches; none is a ValueError, and with `strict` an alternative in its braces
    that matches none is one too."""
    paths = [path for path in leaves if matches(glob, path)]
    if not paths:
        others = [f": {path} is {dtype}, and {_FLOATS}" for path, dtype in left_out([glob], flat).items()]
        raise ValueError(f"{glob!r} matches no parameter{[*others, nearest(plainest(glob), leaves)][0]}")
    for alternative, its_plainest, matches_it in alternatives(glob) if strict and "{" in glob else ():
        if not any(map(matches_it, paths)):
            problem = f"{glob!r}: its alternative {alternative!r} matches no parameter"
            raise ValueError(f"{problem}{nearest(its_plainest, leaves)}")
    return paths


def glob_keys(*values: Any) -> list[str]:
    """The globs of those values that are mappings glob -> value."""
    return [glob for value in values if isinstance(value, Mapping) for glob in value]


def select(
    *globs: str,
    axes: str | Mapping[str, str] | None = None,
    layers: int | Iterable[int] | None = None,
    exclude: str | Iterable[str] = (),
    ndim: int | None = None,
) -> Selection:
    """Chooses leaves of a parameter tree by the globs of their paths.

    Args:
      globs: `*` within one part, `**` any number of parts, `{a,b}` alternatives. Each must match something, and so must
        each alternative.
      axes: one string for all (`"io"`), or a mapping glob -> string (first match wins). Two axes need no naming where
        the leaf's name tells them: `kernel` "io", `embedding` "vo", `weight` "oi" (torch, Equinox), else "io".
      layers: only these layers: the number in `h_3`, or entries of the stacked axis `s`.
      exclude: globs of leaves to leave out.
      ndim: only leaves with this number of axes, not counting stacked ones: `select("**", ndim=2)` is all matrices.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"attn": {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}}
    >>> lj.select("**/kernel")(params)
    {'attn/query/kernel': 'io'}
    """
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"select takes one glob or more, each a string, got {globs!r}")
    chosen = None if layers is None else tuple(sorted(map(int, [layers] if isinstance(layers, int) else layers)))
    if chosen is not None and (not chosen or chosen[0] < 0):
        raise ValueError(f"layers={chosen}: name one layer or more, counted from 0")
    return Selection(globs, axes, chosen, strings(exclude), ndim)


def _float_leaves(flat: list[tuple[str, Any]]) -> dict[str, Any]:
    """`{path: leaf}` of the floating-point leaves of `flatten`."""
    leaves: dict[str, Any] = {}
    for path, leaf in flat:
        if jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating):
            if path in leaves:
                raise ValueError(f"two leaves have the path {path}: rename one")
            leaves[path] = leaf
    return leaves


def nearest(plain: str, paths: Collection[str]) -> str:
    """The paths that are most like this one, those that contain it first, as the end of a message."""
    plain = plain if "/" in plain else plain.replace(".", "/")
    by_end = {"/".join(path.split("/")[-plain.count("/") - 1 :]): path for path in paths}
    near = [path for path in paths if plain and plain in path][:3]
    near += [path for names in (by_end, paths) for path in difflib.get_close_matches(plain, names, n=3, cutoff=0.0)]
    shown = list(dict.fromkeys(by_end.get(path, path) for path in near))[:4]
    return f"; the nearest paths are {', '.join(shown)}" if shown else ": there are no floating-point arrays"
