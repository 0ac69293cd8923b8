"""An independent dense reference, W + scale * A B by reshapes, and comparisons with it."""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.planning.flops import subjaxprs

ALPHA = 3.0
DEFAULT = {"kernel": "io", "embedding": "vo", "weight": "oi"}


def path_of(keys: tuple) -> str:
    parts = []
    for key in keys:
        for name in ("key", "idx", "name"):
            if hasattr(key, name):
                parts.append(str(getattr(key, name)))
                break
    if parts and parts[-1] == "value":
        parts.pop()
    return "/".join(parts)


def leaves(params: Any) -> dict[str, Any]:
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def replaced(params: Any, values: Mapping[str, Any]) -> Any:
    """params with the leaves at these paths exchanged."""
    missing = set(values) - set(leaves(params))
    assert not missing, missing
    return jax.tree_util.tree_map_with_path(lambda k, leaf: values.get(path_of(k), leaf), params)


def numpy_of(*arrays: Any) -> Any:
    """The module to compute with: `jax.numpy` under a transform and for dtypes that numpy lacks, else numpy, whose
    operations are not compiled."""
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
    return jnp if traced or any(jnp.result_type(x) == jnp.bfloat16 for x in arrays) else np


def dense_delta(a: Any, b: Any, axes: str, scale: Any) -> Any:
    """scale * A B in the order of `axes`, from A (s.., i.., r) and B (s.., r, o..), by reshapes."""
    xp = numpy_of(a, b, scale)
    a, b = xp.asarray(a), xp.asarray(b)
    count = {c: sum(letter in c for letter in axes) for c in ("s", "ivk", "o")}
    stacked, n_in = count["s"], count["ivk"]
    lead, inner, outer = a.shape[:stacked], a.shape[stacked : stacked + n_in], b.shape[stacked + 1 :]
    rank = a.shape[-1]
    a = a.reshape((math.prod(lead), math.prod(inner), rank))
    b = b.reshape((math.prod(lead), rank, math.prod(outer)))
    products = xp.stack([scale * (x @ y) for x, y in zip(a, b, strict=True)]).reshape(lead + inner + outer)
    order = [j for c in ("s", "ivk", "o") for j, letter in enumerate(axes) if letter in c]
    return products.transpose([order.index(j) for j in range(len(axes))])


def axes_at(path: str, axes: str | Mapping[str, str] | None) -> str:
    if isinstance(axes, str):
        return axes
    return (axes or {}).get(path) or DEFAULT.get(path.split("/")[-1], "io")


def densely(params: Any, delta: Any, axes: str | Mapping[str, str] | None = None, *, scale: Any) -> Any:
    """params with W + scale * A B in place of every W that the delta of a `lora` names; out of jit, by numpy."""
    flat = leaves(params)

    def dense(path: str, factors: Any) -> Any:
        base, change = flat[path], dense_delta(factors["a"], factors["b"], axes_at(path, axes), scale)
        if isinstance(change, np.ndarray) and not isinstance(base, jax.core.Tracer):
            return jax.device_put(np.asarray(base) + change.astype(base.dtype))
        return base + change

    return replaced(params, {path: dense(path, factors) for path, factors in delta.items()})


def filled(delta: Any, seed: int = 1, size: float = 0.3) -> Any:
    """The same delta with random numbers in every factor, so that nothing is zero by its initialization."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.device_put((rng.normal(size=leaf.shape) * size).astype(leaf.dtype)), delta)


def random_delta(method: lj.ParamTransform, params: Any, seed: int = 1, size: float = 0.3) -> Any:
    """A delta of the method with random numbers in every factor. No first values are computed for it."""
    return filled(jax.eval_shape(lambda: method.init(jax.random.key(0), params)), seed, size)


def merged_params(method: lj.ParamTransform, params: Any, delta: Any, **options: Any) -> Any:
    """`lj.merge(method.apply(params, delta, **options))` as one program: out of jit each operation would be one."""
    return jax.jit(lambda params, delta: lj.merge(method.apply(params, delta, **options)))(params, delta)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))  # jnp.asarray compiles


def ints(values: Any) -> jax.Array:
    return jax.device_put(np.array(values, np.int32))


def close(got: Any, want: Any, tol: float = 1e-5) -> None:
    """Same structure, shapes and dtypes; every entry within tol of the largest entry of all."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    exact = [np.asarray(w, np.float64) for _, w in pairs]
    largest = max(np.max(np.abs(w), initial=0.0) for w in exact)
    for (g, w), e in zip(pairs, exact, strict=True):
        assert np.shape(g) == np.shape(w)
        assert jnp.result_type(g) == jnp.result_type(w)
        error = np.max(np.abs(np.asarray(g, np.float64) - e), initial=0.0)
        assert error <= tol * largest, f"off by {error / largest:.2e} of the largest entry"


def same(got: Any, want: Any) -> None:
    """Bit for bit, structure included."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


def in_one_program(fn, *deltas):
    """What fn returns of deltas: a method, and arrays that are computed as one program."""
    methods = []

    def arrays(*deltas):
        method, *rest = fn(*deltas)
        methods.append(method)
        return rest

    rest = jax.jit(arrays)(*deltas)
    return methods[0], *rest


def digest(tree: Any) -> str:
    """sha256 of paths, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for path, leaf in leaves(tree).items():
        sha.update(f"{path} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return sha.hexdigest()


def weighted(out: Any) -> jax.Array:
    """A scalar of every output entry, each with a weight of its own."""
    return sum(
        jnp.sum(leaf.astype(jnp.float32) * np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape))
        for leaf in map(jnp.asarray, jax.tree.leaves(out))
    )


def agree(
    fn: Callable,
    params: Any,
    *args: Any,
    globs: str = "**",
    axes: str | Mapping[str, str] | None = None,
    rank: int = 2,
    tol: float = 1e-5,
    on_dense: str = "error",
    **kwargs: Any,
) -> Any:
    """fn(params, *args, **kwargs) lifted, on lora of every selected leaf: value and gradients of the delta are those of
    fn on dense weights; with dropout it traces too. `on_dense="error"` makes forming a dense weight a failure. Returns
    the delta, and the jaxpr of value and gradients of the lifted function."""
    method = lj.lora(lj.select(globs, axes=axes), rank=rank, alpha=ALPHA)
    delta = random_delta(method, params)
    lifted = lj.lift(fn, on_dense=on_dense)

    def adapted(delta):
        out = lifted(method.apply(params, delta), *args, **kwargs)
        return weighted(out), out

    def reference(delta):
        out = fn(densely(params, delta, axes, scale=ALPHA / rank), *args, **kwargs)
        return weighted(out), out

    got, expected = (jax.jit(jax.value_and_grad(fn, has_aux=True)) for fn in (adapted, reference))
    # one program: compiling is most of a test's time
    traced = jax.jit(lambda delta: (got(delta), expected(delta))).trace(delta)
    ((_, out), grads), ((_, want), want_grads) = traced.lower().compile()(delta)
    close(out, want, tol)
    close(grads, want_grads, 2 * tol)
    assert any(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))

    dropping = lj.lora(lj.select(globs, axes=axes), rank=rank, alpha=ALPHA, dropout=0.1)
    shapes = jax.eval_shape(
        lambda key: lifted(dropping.apply(params, delta, key=key), *args, **kwargs), jax.random.key(0)
    )
    same_shapes = jax.tree.map(lambda s, w: s.shape == w.shape and s.dtype == w.dtype, shapes, want)
    assert all(jax.tree.leaves(same_shapes))
    return delta, next(subjaxprs(traced.jaxpr.eqns[0]))


def sine_gradient(fn, method, params, delta):
    """`fn` lifted on the adapted params, the gradient of the sum of its sine for the delta, and the merged params."""

    @jax.jit
    def run(delta):
        def loss(delta):
            y = lj.lift(fn, on_dense="error")(method.apply(params, delta))
            return jnp.sum(jnp.sin(y)), y

        (_, y), grads = jax.value_and_grad(loss, has_aux=True)(delta)
        return y, grads, lj.merge(method.apply(params, delta))

    return run(delta)
