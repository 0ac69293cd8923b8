"""Where a weight must be dense: the value is right and the place is named; and what is not lifted raises."""

import inspect
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.helpers.networks import Stack, started
from tests.helpers.reference import agree, close, densely, merged_params, normal, random_delta

KEY = jax.random.key(0)
X = normal(4, 8, seed=5)
PARAMS = {"net": {"kernel": normal(8, 6, seed=1), "scale": normal(6, seed=2)}}
METHOD = lj.lora(lj.select("net/kernel"), rank=2)
DELTA = random_delta(METHOD, PARAMS)
ADAPTED = METHOD.apply(PARAMS, DELTA)
MERGED = densely(PARAMS, DELTA, scale=1.0)


def normalized(p, x):
    w = p["net"]["kernel"]
    return x @ (w / jnp.linalg.norm(w))


def lifted_and_dense(fn, adapted, dense, on_dense="allow"):
    """Of adapted params by the lifted function, and of dense ones by the function itself, in one program."""
    lifted = lj.lift(fn, on_dense=on_dense)
    return jax.jit(lambda adapted, dense: (lifted(adapted, X), fn(dense, X)))(adapted, dense)


DENSE = {
    "normalized": normalized,
    "sum of entries": lambda p, x: x * jnp.sum(p["net"]["kernel"] ** 2),
    "entrywise product": lambda p, x: jnp.einsum("bi,io->bio", x, p["net"]["kernel"]),
    "weight by weight": lambda p, x: x @ p["net"]["kernel"] @ p["net"]["kernel"].T,
    "gram matrix": lambda p, x: p["net"]["kernel"].T @ p["net"]["kernel"],
    "concatenated": lambda p, x: x @ jnp.concatenate([p["net"]["kernel"], jnp.ones((8, 2))], 1),
    "reshaped across": lambda p, x: p["net"]["kernel"].reshape(-1) * 2,
    "scan over rows": lambda p, x: jax.lax.scan(lambda c, row: (c + row, None), jnp.zeros(6), p["net"]["kernel"])[0],
    "carried and changed": lambda p, x: jax.lax.fori_loop(0, 2, lambda _, w: 0.5 * w, p["net"]["kernel"]),
    "chosen": lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda w: w, lambda w: -w, p["net"]["kernel"]) * 2,
    "sorted": lambda p, x: jnp.sort(p["net"]["kernel"], axis=0),
    "as a mask": lambda p, x: jnp.where(p["net"]["kernel"] > 0, 1.0, 0.0),
}


@pytest.mark.parametrize("name", DENSE)
def test_values_are_right_whatever_meets_the_weight(name):
    fn = DENSE[name]
    close(*lifted_and_dense(fn, ADAPTED, MERGED))


def test_the_gradient_goes_through_a_dense_weight():
    got = jax.grad(lambda d: jnp.sum(lj.lift(normalized, on_dense="allow")(METHOD.apply(PARAMS, d), X) ** 2))
    want = jax.grad(lambda d: jnp.sum(normalized(densely(PARAMS, d, scale=1.0), X) ** 2))
    close(*jax.jit(lambda d: (got(d), want(d)))(DELTA), 2e-5)


def test_warn_names_the_path_and_the_users_file_and_line():
    lines, first = inspect.getsourcelines(normalized)
    expected = {first + n for n, line in enumerate(lines) if "x @ (w" in line}
    with pytest.warns(UserWarning) as caught:
        lj.lift(normalized)(ADAPTED, X)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1, messages  # once a place
    assert "net/kernel" in messages[0]
    assert any(f"{__file__}:{line}" in messages[0] for line in expected)


def test_warned_once_a_place_however_often_it_is_met():
    def fn(p, x):
        for _ in range(3):
            x = (x @ (2.0 * p["net"]["kernel"])) @ jnp.ones((6, 8))
        return x

    lifted = lj.lift(fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lifted(ADAPTED, X)
        lifted(ADAPTED, X)
        jax.jit(lifted)(ADAPTED, X)
    assert len(caught) == 1


def test_the_same_line_in_every_layer_is_one_place():
    params = {f"h_{n}": {"kernel": normal(8, 8, seed=n)} for n in range(4)}
    method = lj.lora(lj.select("**"), rank=2)

    def fn(p, x):
        for n in range(4):
            x = x @ jnp.tanh(p[f"h_{n}"]["kernel"])
        return x

    with pytest.warns(UserWarning, match="h_0/kernel") as caught:
        lj.lift(fn)(method.apply(params, random_delta(method, params)), X)
    assert len(caught) == 1


def test_error_and_allow():
    with pytest.raises(ValueError, match="net/kernel") as error:
        lj.lift(normalized, on_dense="error")(ADAPTED, X)
    assert __file__ in str(error.value)
    close(*lifted_and_dense(normalized, ADAPTED, MERGED))  # warnings are errors here
    with pytest.raises(ValueError, match="on_dense"):
        lj.lift(normalized, on_dense="never")


def test_vectors_become_dense_in_silence():
    """A weight of one axis costs nothing dense."""
    tuned = lj.tune(lj.select("net/scale"))
    adapted = tuned.apply(PARAMS, random_delta(tuned, PARAMS))

    def fn(p, x):
        return (x @ p["net"]["kernel"]) * p["net"]["scale"][None]

    close(*lifted_and_dense(fn, adapted, lj.merge(adapted), "error"))


def test_axes_the_wrong_way_round_are_reported():
    params = {"w": normal(8, 6)}
    method = lj.lora(lj.select("w", axes="oi"), rank=2)
    adapted = method.apply(params, random_delta(method, params))
    with pytest.warns(UserWarning, match="w.*") as caught:
        out = lj.lift(lambda p, x: x @ p["w"])(adapted, X)
    assert len(caught) == 1 and __file__ in str(caught[0].message) and "axes" in str(caught[0].message)
    close(out, X @ lj.merge(adapted)["w"])


@jax.custom_vjp
def rounded_product(x, w):
    return x @ w


rounded_product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (7.0 * (g @ saved[1].T), 5.0 * (saved[0].T @ g)),  # a rule of one's own, to be recognized by
)


def test_functions_with_custom_derivatives_meet_dense_weights_and_keep_their_rule():
    def fn(p, x):
        return rounded_product(x, p["net"]["kernel"])

    with pytest.warns(UserWarning, match="net/kernel"):
        out = lj.lift(fn)(ADAPTED, X)
    close(out, fn(MERGED, X))
    allowed = lj.lift(fn, on_dense="allow")
    got = jax.grad(lambda d, x: jnp.sum(allowed(METHOD.apply(PARAMS, d), x) ** 2), (0, 1))
    want = jax.grad(lambda d, x: jnp.sum(fn(densely(PARAMS, d, scale=1.0), x) ** 2), (0, 1))
    close(
        *jax.jit(lambda d, x: (got(d, x), want(d, x)))(DELTA, X), 2e-5
    )  # the factor 5 reaches the delta, the factor 7 the input


def test_custom_derivatives_that_close_over_a_weight():
    def fn(p, x):
        @jax.custom_jvp
        def f(x):
            return x @ p["net"]["kernel"]

        f.defjvp(lambda primals, tangents: (f(*primals), 3.0 * (tangents[0] @ p["net"]["kernel"])))
        return jax.jvp(f, (x,), (x,))

    close(*lifted_and_dense(fn, ADAPTED, MERGED))


def test_custom_derivatives_elsewhere_are_no_trouble():
    @jax.custom_vjp
    def doubled(x):
        return x

    doubled.defvjp(lambda x: (x, None), lambda _, g: (2.0 * g,))

    def fn(p, x):
        return doubled(x @ p["net"]["kernel"])

    got = jax.grad(lambda d: jnp.sum(lj.lift(fn, on_dense="error")(METHOD.apply(PARAMS, d), X) ** 2))
    want = jax.grad(lambda d: jnp.sum(fn(densely(PARAMS, d, scale=1.0), X) ** 2))
    close(*jax.jit(lambda d: (got(d), want(d)))(DELTA), 2e-5)


UNLIFTED = {
    "x @ w": lambda w, x: x @ w,
    "numpy @ w": lambda w, x: np.asarray(x) @ w,
    "w.T @": lambda w, x: jnp.matmul(jnp.transpose(w), x.T),
    "w @": lambda w, x: w @ jnp.ones((6, 2)),
    "jnp.dot": lambda w, x: jnp.dot(x, w),
    "einsum": lambda w, x: jnp.einsum("bi,io->bo", x, w),
    "asarray": lambda w, x: jnp.asarray(w),
    "sum": lambda w, x: jnp.sum(w),
    "w + 1": lambda w, x: w + 1,
    "1 - w": lambda w, x: 1 - w,
    "w[0]": lambda w, x: w[0],
    "for row in w": lambda w, x: list(w),
    "take": lambda w, x: jnp.take(w, jnp.array([0]), axis=0),
    "numpy": lambda w, x: np.asarray(w),
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "method": lambda w, x: w.astype(jnp.bfloat16),
}


@pytest.mark.parametrize("name", UNLIFTED)
def test_an_adapted_array_in_an_unlifted_function_says_so(name):
    with pytest.raises((TypeError, ValueError, AttributeError)) as error:
        UNLIFTED[name](ADAPTED["net"]["kernel"], X)
    assert "net/kernel" in str(error.value) and "lift" in str(error.value)


def test_unlifted_models_say_so():
    dense = nn.Dense(6)
    params = started(dense, X)
    method = lj.lora(lj.select("kernel"), rank=2)
    adapted = method.apply(params, random_delta(method, params))
    with pytest.raises(TypeError, match=r"kernel.*lora_jax\.lift"):
        dense.apply({"params": adapted}, X)
    linear = eqx.nn.Linear(8, 6, key=KEY)
    method = lj.lora(lj.select("weight"), rank=2)
    with pytest.raises(TypeError, match=r"weight.*lora_jax\.lift"):
        method.apply(linear, random_delta(method, linear))(np.ones(8, np.float32))
    tower = Stack(scan=True)
    params = started(tower, X)
    method = lj.lora(lj.select("h/up/kernel", axes="sio"), rank=2)
    with pytest.raises(TypeError, match=r"h/up/kernel.*lora_jax\.lift"):
        tower.apply({"params": method.apply(params, random_delta(method, params))}, X)


def test_side_effects_happen_once():
    seen = []

    def fn(p, x):
        y = x @ p["net"]["kernel"]
        jax.debug.callback(lambda total: seen.append(float(total)), jnp.sum(y), ordered=True)
        jax.debug.callback(lambda total: seen.append(float(total)), jnp.sum(x), ordered=True)
        return y @ jnp.ones((6, 8)) @ p["net"]["kernel"]

    jax.block_until_ready(jax.jit(lj.lift(fn))(ADAPTED, X))
    jax.effects_barrier()
    want = [np.sum(np.asarray(X) @ np.asarray(MERGED["net"]["kernel"])), np.sum(X)]
    np.testing.assert_allclose(seen, want, rtol=1e-4)


def test_numpy_bases():
    params = {"net": {"kernel": np.asarray(PARAMS["net"]["kernel"])}}
    fn = lambda p, x: jnp.tanh(x @ p["net"]["kernel"][:, 1:4])  # noqa: E731
    agree(fn, params, X)
    merged = merged_params(METHOD, params, DELTA)
    close(merged["net"]["kernel"], MERGED["net"]["kernel"], 1e-6)


@pytest.mark.parametrize(
    "path, fn",
    [
        ("w/kernel", lambda p, x: jnp.tanh(x @ p["w"]["kernel"]) @ p["w"]["kernel"].T),
        (
            "w/kernel",
            lambda p, x: (
                (x @ jnp.ones((8, 6))) @ p["w"]["kernel"].T + jnp.ones((4, 8)) @ p["w"]["kernel"] @ jnp.ones((6, 8))
            ),
        ),
        ("w/embedding", lambda p, x: (x @ jnp.ones((8, 6))) @ p["w"]["embedding"].T),
    ],
    ids=["forth and back", "back and forth", "an embedding as head alone"],
)
def test_a_weight_used_both_ways_and_a_head_that_is_an_embedding_are_not_reported(path, fn):
    params = {"w": {path.removeprefix("w/"): normal(8, 6)}}
    method = lj.lora(lj.select(path), rank=2)
    delta = random_delta(method, params)

    @jax.jit
    def run(delta):
        adapted = method.apply(params, delta)
        return lj.lift(fn, on_dense="error")(adapted, X), fn(lj.merge(adapted), X)

    close(*run(delta))
