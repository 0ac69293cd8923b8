"""Shapes, distributions and keys of LoRA's factors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.helpers.reference import close, dense_delta, filled, normal, random_delta, same

KEY = jax.random.key(7)
SHAPES = {
    "io": ((6, 5), (6, 2), (2, 5)),
    "oi": ((5, 6), (6, 2), (2, 5)),
    "vo": ((9, 5), (9, 2), (2, 5)),
    "ioo": ((6, 3, 4), (6, 2), (2, 3, 4)),
    "iio": ((3, 4, 6), (3, 4, 2), (2, 6)),
    "sio": ((3, 6, 5), (3, 6, 2), (3, 2, 5)),
    "kkio": ((3, 2, 4, 5), (3, 2, 4, 2), (2, 5)),
    "kio": ((3, 4, 5), (3, 4, 2), (2, 5)),
    "sioo": ((2, 6, 3, 4), (2, 6, 2), (2, 2, 3, 4)),
    "soi": ((3, 5, 6), (3, 6, 2), (3, 2, 5)),
    "ssio": ((2, 3, 6, 5), (2, 3, 6, 2), (2, 3, 2, 5)),
    "iso": ((6, 3, 5), (3, 6, 2), (3, 2, 5)),
    "oki": ((5, 3, 4), (3, 4, 2), (2, 5)),
}


@pytest.mark.parametrize("axes", SHAPES)
def test_shapes_and_merged_values_for_every_axes_string(axes):
    shape, a_shape, b_shape = SHAPES[axes]
    params = {"w": normal(*shape)}
    method = lj.lora(lj.select("w", axes=axes), rank=2, alpha=3)
    delta = jax.jit(method.init)(KEY, params)
    assert set(delta) == {"w"} and set(delta["w"]) == {"a", "b"}
    assert delta["w"]["a"].shape == a_shape and delta["w"]["b"].shape == b_shape
    assert {f.dtype for f in delta["w"].values()} == {jnp.dtype("float32")}
    same(jax.jit(lj.merge)(method.apply(params, delta)), params)  # the first change is zero

    delta = filled(delta)
    adapted = method.apply(params, delta)["w"]
    assert adapted.shape == shape and adapted.dtype == jnp.float32
    assert isinstance(adapted, lj.LowRank) and isinstance(adapted, lj.Adapted)
    want = np.asarray(params["w"]) + dense_delta(delta["w"]["a"], delta["w"]["b"], axes, 1.5)
    close(jax.jit(lj.merge)({"w": adapted}), {"w": want}, 1e-6)


def test_an_adapted_array_names_its_axes():
    params = {"w": normal(3, 6, 5)}
    method = lj.lora(lj.select("w", axes="sio"), rank=2)
    adapted = jax.tree.map(np.asarray, method.apply(params, random_delta(method, params)))["w"]
    assert (adapted.axes, adapted.core) == ("sio", "io")
    one = jax.tree.map(lambda leaf: leaf[0], adapted)  # as scan and vmap take it
    assert (one.axes, one.shape) == ("io", (6, 5))
    more = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), adapted)
    assert (more.axes, more.shape) == ("ssio", (2, 3, 6, 5))


@pytest.mark.parametrize("axes, shape", [("io", (400, 30)), ("oi", (30, 400)), ("kkio", (2, 5, 40, 30))])
def test_kaiming_uniform_is_uniform_within_one_over_the_root_of_the_inputs(axes, shape):
    delta = lj.lora(lj.select("w", axes=axes), rank=20).init(KEY, {"w": np.zeros(shape)})["w"]
    bound = 1 / math.sqrt(400)
    a = np.asarray(delta["a"])
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
    assert abs(a.mean()) < 5 * bound / math.sqrt(3 * a.size)
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert np.quantile(a, 0.25) == pytest.approx(-bound / 2, rel=0.06)  # flat, not a normal of that width
    assert not np.any(np.asarray(delta["b"]))


def test_gaussian_has_a_standard_deviation_of_two_hundredths():
    method = lj.lora(lj.select("w"), rank=20, a_init="gaussian")
    delta = method.init(KEY, {"w": np.zeros((400, 30))})["w"]
    a = np.asarray(delta["a"])
    assert a.std() == pytest.approx(0.02, rel=0.04) and abs(a.mean()) < 0.02 * 5 / math.sqrt(a.size)
    assert np.mean(np.abs(a) > 0.02) == pytest.approx(0.3173, abs=0.03)
    assert not np.any(np.asarray(delta["b"]))


def test_the_number_of_stacked_layers_is_no_input():
    stacked = lj.lora(lj.select("w", axes="sio"), rank=4).init(KEY, {"w": np.zeros((50, 16, 8))})["w"]["a"]
    assert 0.2 < np.max(np.abs(stacked)) <= 1 / math.sqrt(16)
    assert not np.array_equal(stacked[0], stacked[1])  # every layer draws its own


@pytest.mark.parametrize("a_init", ["kaiming_uniform", "gaussian"])
def test_embeddings_are_initialized_the_other_way_round(a_init):
    method = lj.lora(lj.select("**"), rank=2, a_init=a_init)
    delta = method.init(KEY, {"wte": {"embedding": np.zeros((50, 40))}})["wte/embedding"]
    assert not np.any(np.asarray(delta["a"])) and np.all(np.asarray(delta["b"]) != 0)
    (b,) = jax.tree.leaves(method.init(KEY, {"wte": {"embedding": np.zeros((3, 4000))}})["wte/embedding"]["b"])
    np.testing.assert_allclose([b.mean(), b.std()], [0.0, 1.0], atol=0.05)  # of 8,000 draws: 4 standard errors


def test_an_unknown_initialization_or_scale_rule_is_an_error():
    for options in ({"a_init": "kaimin"}, {"scale_rule": "alpha*r"}):
        with pytest.raises(ValueError, match=next(iter(options.values())).replace("*", r"\*")):
            method = lj.lora(lj.select("w"), rank=2, **options)
            method.apply({"w": normal(4, 4)}, method.init(KEY, {"w": normal(4, 4)}))


def test_keys_do_not_depend_on_order_or_company():
    pair = {"a": normal(6, 5), "b": normal(6, 5)}
    lora = lj.lora(lj.select("**"), rank=2)
    reordered = {"c": normal(6, 5), "b": pair["b"], "a": pair["a"]}
    both, alone, turned = jax.jit(lambda: [lora.init(KEY, tree) for tree in (pair, {"b": pair["b"]}, reordered)])()
    same(dict(alone)["b"], both["b"])
    same(turned["b"], both["b"])
    same(turned["a"], both["a"])
    assert not np.array_equal(both["a"]["a"], both["b"]["a"])
    assert not np.array_equal(jax.jit(lora.init)(jax.random.key(8), pair)["a"]["a"], both["a"]["a"])


def test_key_of_the_old_kind_is_taken_too():
    params = {"w": normal(6, 5)}
    method = lj.lora(lj.select("**"), rank=2)
    same(*jax.jit(lambda old, new: [method.init(key, params) for key in (old, new)])(jax.random.PRNGKey(7), KEY))


def test_stable_hash_does_not_change_between_processes():
    """Keys fold it in: another value would change every initialization ever saved."""
    assert lj.stable_hash("h_0/attn/query/kernel") == lj.stable_hash("h_0/attn/query/kernel")
    hashes = [int(lj.stable_hash(f"h_{n}/attn/query/kernel")) for n in range(2000)]
    assert len(set(hashes)) == 2000 and all(0 <= h < 2**32 for h in hashes)


def test_init_and_apply_work_on_shapes_alone_and_under_jit_and_vmap():
    params = {"l": {"kernel": normal(6, 5), "bias": normal(5)}}
    method = lj.lora(lj.select("**/kernel"), rank=2, dropout=0.1)
    delta = method.init(KEY, params)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    shapes = jax.eval_shape(method.init, KEY, structs)
    assert isinstance(shapes, lj.Delta)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(lambda s: (s.shape, s.dtype), delta)
    adapted = jax.eval_shape(lambda p, d, k: method.apply(p, d, key=k), structs, shapes, KEY)
    assert adapted["l"]["kernel"].shape == (6, 5)
    close(jax.jit(method.init)(KEY, params), delta, 1e-7)
    keys = jax.random.split(KEY, 3)
    many, one = jax.jit(lambda keys: (jax.vmap(method.init, (0, None))(keys, params), method.init(keys[1], params)))(
        keys
    )
    close(jax.tree.map(lambda leaf: np.asarray(leaf)[1], many), one, 1e-7)
    direct = method.init(KEY, structs)  # no jax.eval_shape around it: the shapes are all it needs
    same(direct, delta)
