"""lift on Equinox modules and plain functions; arguments that are no arrays; what comes back."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.helpers.reference import agree, close, densely, filled, normal, random_delta, same

KEY = jax.random.key(0)
X = normal(3, 8, seed=5)
PARAMS = {"w": normal(8, 6, seed=1), "b": normal(6, seed=2)}
METHOD = lj.lora(lj.select("w"), rank=2)
DELTA = random_delta(METHOD, PARAMS)
ADAPTED = METHOD.apply(PARAMS, DELTA)
MERGED = densely(PARAMS, DELTA, scale=1.0)


def dense(p, x):
    return x @ p["w"] + p["b"][None]


@pytest.mark.parametrize("batched", [False, True])
def test_equinox_modules(batched):
    mlp = eqx.nn.MLP(8, 3, 6, 2, key=KEY)
    arrays, static = eqx.partition(mlp, eqx.is_array)

    def fn(arrays, x):
        module = eqx.combine(arrays, static)
        return jax.vmap(module)(x) if batched else module(x)

    agree(fn, arrays, X if batched else X[0], globs="**/weight")


def test_an_equinox_module_as_it_is_with_functions_among_its_leaves():
    mlp = eqx.nn.MLP(8, 3, 6, 2, key=KEY)
    method = lj.lora(lj.select("**/weight"), rank=2)
    delta = random_delta(method, mlp)
    adapted = method.apply(mlp, delta)
    assert isinstance(adapted, eqx.nn.MLP)
    want = eqx.filter_jit(lambda adapted: jax.vmap(lj.merge(adapted))(X))(adapted)
    close(eqx.filter_jit(lj.lift(lambda m, x: jax.vmap(m)(x), on_dense="error"))(adapted, X), want)
    close(eqx.filter_jit(jax.vmap(lj.lift(lambda m, x: m(x)), (None, 0)))(adapted, X), want)
    close(lj.lift(lambda m, x: m(x))(adapted, X[0]), want[0])


def test_equinox_attention_and_convolution():
    attention = eqx.nn.MultiheadAttention(2, 8, key=KEY)
    arrays, static = eqx.partition(attention, eqx.is_array)
    fn = lambda a, x: eqx.combine(a, static)(x, x, x)  # noqa: E731
    agree(fn, arrays, X, globs="**/weight")

    conv = eqx.nn.Conv1d(8, 5, 3, key=KEY)
    arrays, static = eqx.partition(conv, eqx.is_array)
    fn = lambda a, x: eqx.combine(a, static)(x)  # noqa: E731
    agree(fn, arrays, normal(8, 9), globs="weight", axes={"weight": "oik"})


def test_a_bare_list_of_matrices():
    matrices = [normal(8, 6, seed=1), normal(6, 6, seed=2), normal(6, 3, seed=3)]
    agree(lambda ws, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), ws, x), matrices, X)


def test_a_bare_matrix():
    delta, _ = agree(lambda w, x: x @ w, normal(8, 6), X)
    assert len(delta) == 1


def test_arguments_that_are_no_arrays_stay_as_they_are():
    @dataclasses.dataclass(frozen=True)
    class Options:
        depth: int

    def fn(p, x, activation, *, deterministic, layers=1, options=None, name="x", nothing=None):
        assert deterministic is True and isinstance(layers, int) and nothing is None
        assert isinstance(options, Options) and name.upper() == "NET"
        for _ in range(layers * options.depth):
            x = activation(dense(p, x))[:, :6] @ jnp.ones((6, 8))
        return x

    args = (X, jnp.tanh)
    kwargs = {"deterministic": True, "layers": 2, "options": Options(2), "name": "net"}
    close(lj.lift(fn)(ADAPTED, *args, **kwargs), fn(MERGED, *args, **kwargs))


def test_numpy_arguments_and_python_numbers():
    def fn(p, x, factor):
        return dense(p, x) * factor

    close(lj.lift(fn)(ADAPTED, np.asarray(X), 2.0), fn(MERGED, X, 2.0))


def test_adapted_arrays_in_keywords_closures_and_any_container():
    close(lj.lift(lambda *, x, p: dense(p, x))(x=X, p=ADAPTED), dense(MERGED, X))
    close(lj.lift(lambda pair: dense(pair[1], pair[0]))((X, ADAPTED)), dense(MERGED, X))
    close(lj.lift(lambda w, x: x @ w)(ADAPTED["w"], X), X @ MERGED["w"])


def test_outputs_of_any_structure():
    def fn(p, x):
        y = dense(p, x)
        return {"y": y, "pair": (y.sum(), None), "b": p["b"], "three": 3, "x": x}

    got, want = lj.lift(fn)(ADAPTED, X), fn(MERGED, X)
    close(got, want)


def test_nothing_adapted_is_exactly_the_function():
    def fn(p, x, *, scale):
        return {"y": dense(p, x) * scale, "text": "kept", "p": p}

    plain, lifted = fn(PARAMS, X, scale=2.0), lj.lift(fn)(PARAMS, X, scale=2.0)
    assert lifted["text"] == "kept"
    same(lifted["y"], plain["y"])
    assert lifted["p"]["w"] is PARAMS["w"]
    jitted = jax.jit(lambda p, x: dense(p, x)), jax.jit(lj.lift(dense))
    same(jitted[1](PARAMS, X), jitted[0](PARAMS, X))
    assert (
        jitted[0].lower(PARAMS, X).as_text().split("\n")[1:] == (jitted[1].lower(PARAMS, X).as_text().split("\n")[1:])
    )


def test_an_adapted_array_returned_untouched_comes_back_adapted():
    out = lj.lift(lambda p, x: (p, dense(p, x), p["w"]))(ADAPTED, X)
    assert isinstance(out[0]["w"], lj.LowRank) and isinstance(out[2], lj.LowRank)
    same(out[0], ADAPTED)
    close(out[1], dense(MERGED, X))
    under = jax.jit(lj.lift(lambda p, x: (p, dense(p, x))))(ADAPTED, X)
    same(under[0], ADAPTED)


def test_changed_weights_are_returned_dense_and_said():
    params = {"w": normal(3, 8, 6)}
    method = lj.lora(lj.select("w", axes="sio"), rank=2)
    adapted = method.apply(params, random_delta(method, params))
    merged = np.asarray(jax.jit(lj.merge)(adapted)["w"])

    def fn(p):
        return p["w"][1], p["w"].transpose((0, 2, 1)), p["w"][0, 3]

    with pytest.warns(UserWarning, match="w"):
        out = lj.lift(fn)(adapted)
    close(out, (merged[1], merged.transpose((0, 2, 1)), merged[0, 3]))
    one_row = lj.lift(lambda p: p["w"][0, 3], on_dense="error")(adapted)  # a vector: no word about it
    close(one_row, merged[0, 3])


def test_vmap_and_tree_map_over_adapted_trees():
    each = [METHOD.apply(PARAMS, filled(DELTA, seed=n)) for n in range(3)]
    stacked = jax.tree.map(lambda *leaf: np.stack(leaf), *each)
    assert stacked["w"].shape == (3, 8, 6)

    @jax.jit
    def run(stacked, each):
        merged = [lj.merge(adapted) for adapted in each]
        got = jax.vmap(lj.lift(dense), (0, None))(stacked, X), lj.merge(stacked)["w"]
        return got, (jnp.stack([dense(p, X) for p in merged]), jnp.stack([p["w"] for p in merged]))

    (outputs, weights), (want, want_weights) = run(stacked, each)
    close(outputs, want)
    close(weights, want_weights, 1e-6)


def test_lift_of_a_lifted_function_and_of_partials():
    close(lj.lift(lj.lift(dense))(ADAPTED, X), dense(MERGED, X))
    close(lj.lift(functools.partial(dense, x=X))(ADAPTED), dense(MERGED, X))
    close(lj.lift(lambda p, x: lj.lift(dense)(p, x))(ADAPTED, X), dense(MERGED, X))


def test_lift_keeps_the_functions_name_and_docstring():
    def forward(p, x):
        """What it says."""
        return dense(p, x)

    lifted = lj.lift(forward)
    assert lifted.__name__ == "forward" and lifted.__doc__ == "What it says."


def test_errors_of_the_function_itself_are_its_own():
    def fn(p, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lj.lift(fn)(ADAPTED, X)


def test_shapes_alone():
    out = jax.eval_shape(lj.lift(dense), ADAPTED, X)
    assert (out.shape, out.dtype) == ((3, 6), jnp.float32)


def test_printing_an_adapted_tree():
    text = repr(ADAPTED)
    assert "LowRank" in text and "w" in text and "(8, 6)" in text and len(text) < 1000
