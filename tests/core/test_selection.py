"""Which leaves are selected, and which axes they have."""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.core.transforms import keys_of
from tests.helpers.networks import Stack, started
from tests.helpers.reference import normal


class Pair(NamedTuple):
    left: Any
    right: Any


ATTENTION = {
    f"h_{n}": {"attn": {name: {"kernel": normal(4, 4), "bias": normal(4)} for name in ("query", "key", "value")}}
    for n in range(3)
}


def test_paths_of_dicts_lists_and_named_tuples():
    tree = {"a": [normal(2, 2), {"weight": normal(3, 2)}], "b": Pair(normal(2, 2), (normal(2, 2),))}
    assert lj.select("**")(tree) == {
        "a/0": "io",
        "a/1/weight": "oi",
        "b/left": "io",
        "b/right/0": "io",
    }


def test_paths_of_a_bare_list():
    assert lj.select("{0,2}")([normal(2, 3), normal(2, 3), normal(3, 2)]) == {"0": "io", "2": "io"}


def test_paths_of_flax_frozen_dicts_and_states():
    frozen = nn.FrozenDict({"layer": {"kernel": normal(2, 2)}})
    assert lj.select("layer/kernel")(frozen) == {"layer/kernel": "io"}


def test_nnx_paths_drop_the_trailing_value():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.value = nnx.Linear(4, 2, rngs=rngs)  # a layer of that name keeps it
            self.drop = nnx.Dropout(0.1, rngs=rngs)

    state = nnx.split(Net(nnx.Rngs(0)))[1]
    assert set(lj.select("**/kernel")(state)) == {"first/kernel", "value/kernel"}
    assert all("drop" not in path for path in lj.select("**").leaves(state))  # keys and counts do not train


def test_equinox_paths_and_axes():
    mlp = eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(0))
    assert lj.select("layers/*/weight")(mlp) == {f"layers/{n}/weight": "oi" for n in range(3)}


def test_the_order_is_the_trees():
    paths = list(lj.select("**/value/kernel", "**/query/kernel")(ATTENTION))
    assert paths == sorted(paths) and len(paths) == 6


def test_several_globs_and_exclude():
    chosen = lj.select("**/kernel", exclude="h_1/**")(ATTENTION)
    assert set(chosen) == {f"h_{n}/attn/{m}/kernel" for n in (0, 2) for m in ("query", "key", "value")}
    chosen = lj.select("**/kernel", exclude=("h_1/**", "**/key/*"))(ATTENTION)
    assert set(chosen) == {f"h_{n}/attn/{m}/kernel" for n in (0, 2) for m in ("query", "value")}


@pytest.mark.parametrize(
    "glob, near",
    [
        ("**/attn/querry/kernel", "attn/query/kernel"),
        ("h_0/attn/value/kernal", "h_0/attn/value/kernel"),
        ("h_0.attn.value.kernel", "h_0/attn/value/kernel"),
        ("kernel", "/kernel"),
    ],
)
def test_a_glob_that_matches_nothing_shows_the_nearest_paths(glob, near):
    with pytest.raises(ValueError) as error:
        lj.select("**/bias", glob)(ATTENTION)
    assert glob in str(error.value) and near in str(error.value)


MISSPELT = [
    ("**/attn/{qeury,value}/kernel", "qeury", "attn/query/kernel"),
    ("**/attn/{query,value,vlaue}/kernel", "vlaue", "attn/value/kernel"),
    ("h_{0,1,2}/attn/{query,key}/{kernel,bais}", "bais", "attn/query/bias"),
    ("h_{0,3}/attn/query/kernel", "3", "attn/query/kernel"),
    ("**/{attn/{query,{valeu,key}},attn}/**", "valeu", "attn/value/"),
    ("{**/query/kernel,**/kye/kernel}", "**/kye/kernel", "attn/key/kernel"),
]


@pytest.mark.parametrize("glob, alternative, near", MISSPELT)
def test_an_alternative_that_matches_nothing_is_named_with_the_nearest_paths(glob, alternative, near):
    """By `select` itself, by `init` and by `check` of every kind of method, in exclude and among options too."""
    key = jax.random.key(0)
    everything = "**/{kernel,bias}"
    refused = [
        lambda: lj.select(glob)(ATTENTION),
        lambda: lj.select(everything, exclude=glob)(ATTENTION),
        lambda: lj.tune(lj.select(glob)).init(key, ATTENTION),
        lambda: lj.check(lj.lora(lj.select(glob), rank=1), ATTENTION),
        lambda: lj.check(lj.chain(lj.tune(lj.select("**/bias")), lj.lora(lj.select(glob), rank=1)), ATTENTION),
        lambda: lj.lora(lj.select("**/kernel", exclude=glob), rank=1).init(key, ATTENTION),
        lambda: lj.lora(lj.select("**/kernel"), rank={glob: 2, "**": 1}).init(key, ATTENTION),
        lambda: lj.lokr(lj.select("**/kernel"), rank=1, alpha={glob: 2, "**": 1}).init(key, ATTENTION),
        lambda: lj.dora(lj.select("**/kernel"), rank=1, shared=glob).init(key, ATTENTION),
        lambda: lj.ia3(lj.select("**/kernel"), feedforward=glob).init(key, ATTENTION),
        lambda: lj.bias_delta(lj.select("**/bias"), scale={glob: 2.0, "**": 1}).init(key, ATTENTION),
        lambda: lj.from_spec({"method": "tune", "select": [glob]}).init(key, ATTENTION),
    ]
    for call in refused:
        with pytest.raises(ValueError) as error:
            call()
        assert f"{glob!r}: its alternative {alternative!r} matches no parameter" in str(error.value)
        assert near in str(error.value)


@pytest.mark.parametrize("glob", [glob for glob, *_ in MISSPELT])
def test_a_delta_is_applied_whatever_else_its_spec_names(glob):
    """Specs of old files: the delta's keys tell what is adapted."""
    paths = list(lj.select(glob).leaves(ATTENTION))
    for method, options in (("tune", {}), ("bias_delta", {"scale": {glob: 2.0, "**": 1.0}})):
        spec = {"method": method, "select": [glob], **options}
        exact = lj.from_spec({"method": method, "select": paths, **({"scale": 2.0} if options else {})})
        delta = exact.init(jax.random.key(0), ATTENTION)
        expected = exact.apply(ATTENTION, delta)
        for old in (lj.from_spec(spec), lj.from_spec({"method": "chain", "of": [spec]})):
            assert keys_of(old, ATTENTION) == set(paths)
            jax.tree.map(np.testing.assert_array_equal, old.apply(ATTENTION, delta), expected)


def test_excluding_everything_or_nothing_is_an_error():
    with pytest.raises(ValueError):
        lj.select("**/key/*", exclude="**")(ATTENTION)
    with pytest.raises(ValueError, match="qkv"):
        lj.select("**", exclude="**/qkv/*")(ATTENTION)


def test_layers_of_a_loop():
    chosen = lj.select("**/query/kernel", layers=[0, 2])(ATTENTION)
    assert list(chosen) == ["h_0/attn/query/kernel", "h_2/attn/query/kernel"]
    listed = {"layers": [{"weight": normal(2, 2)} for _ in range(11)]}
    assert list(lj.select("**/weight", layers=[1, 10])(listed)) == ["layers/1/weight", "layers/10/weight"]
    numbered = {"gpt2": {f"h_{n}": {"kernel": normal(2, 2)} for n in range(2)}}
    assert list(lj.select("**", layers=[1])(numbered)) == ["gpt2/h_1/kernel"]


@pytest.mark.parametrize("layers", [[3], [0, 3], [-1], []])
def test_a_layer_that_does_not_exist_is_an_error(layers):
    with pytest.raises(ValueError):
        lj.select("**/query/kernel", layers=layers)(ATTENTION)
    with pytest.raises(ValueError):
        lj.lora(lj.select("w", axes="sio", layers=layers), rank=1).init(jax.random.key(0), {"w": normal(3, 4, 5)})


def test_layers_of_a_stacked_axis_stack_the_chosen_ones_only():
    params = started(Stack(scan=True), normal(2, 8))
    method = lj.lora(lj.select("h/up/kernel", axes="sio", layers=[0, 2]), rank=2)
    delta = method.init(jax.random.key(0), params)
    assert delta["h/up/kernel"]["a"].shape == (2, 8, 2)
    assert delta["h/up/kernel"]["b"].shape == (2, 2, 16)


def test_layers_of_a_stack_on_another_axis_are_that_axis():
    params = {"w": normal(8, 3, 5)}
    assert lj.select("w", axes="iso", layers=[2])(params) == {"w": "iso"}
    with pytest.raises(ValueError, match=r"layers=\(5,\): w and its like have no layer 5|leaves no parameter"):
        lj.select("w", axes="iso", layers=[5])(params)


def test_layers_of_a_stack_are_the_axis_not_numbers_in_names():
    """A scanned linen block names its layers by itself."""
    params = {"h": {"Dense_0": {"kernel": normal(3, 4, 5)}, "Dense_1": {"kernel": normal(3, 5, 4)}}}
    for layer in range(3):
        method = lj.lora(lj.select("h/**", axes="sio", layers=[layer]), rank=1)
        delta = method.init(jax.random.key(0), params)
        assert set(delta) == {"h/Dense_0/kernel", "h/Dense_1/kernel"}
        assert delta["h/Dense_0/kernel"]["a"].shape == (1, 4, 1)


def test_two_leaves_of_one_path_are_an_error():
    tree = {"a/b": normal(3, 4), "a": {"b": normal(3, 4)}, "c": normal(3, 4)}
    with pytest.raises(ValueError, match="a/b"):
        lj.lora(lj.select("a/b"), rank=1).init(jax.random.key(0), tree)


def test_only_floating_point_leaves_are_selected():
    tree = {
        "w": normal(2, 2),
        "half": normal(2, 2).astype(jnp.bfloat16),
        "count": jnp.zeros((2, 2), jnp.int32),
        "mask": np.ones((2, 2), bool),
        "key": jax.random.key(0),
        "name": "text",
        "none": None,
        "function": jnp.tanh,
    }
    assert set(lj.select("**")(tree)) == {"w", "half"}
    with pytest.raises(ValueError, match="count"):
        lj.select("count")(tree)


def test_default_axes_go_by_the_leafs_name():
    tree = {"d": {"kernel": normal(2, 3), "embedding": normal(2, 3), "weight": normal(2, 3), "w": normal(2, 3)}}
    axes = lj.select("**")(tree)
    assert axes == {"d/kernel": "io", "d/embedding": "vo", "d/weight": "oi", "d/w": "io"}


def test_axes_as_one_string_or_as_a_mapping_whose_first_match_wins():
    tree = {"query": {"kernel": normal(4, 2, 2)}, "up": {"kernel": normal(4, 6)}}
    assert lj.select("query/*", axes="ioo")(tree) == {"query/kernel": "ioo"}
    axes = {"query/*": "ioo", "**/kernel": "oi", "lm_head/*": "io"}
    assert lj.select("**", axes=axes)(tree) == {"query/kernel": "ioo", "up/kernel": "oi"}


def test_three_axes_unnamed_are_an_error_with_path_shape_and_candidates():
    tree = {"attn": {"query": {"kernel": normal(4, 2, 3)}}}
    with pytest.raises(ValueError) as error:
        lj.lora(lj.select("**"), rank=1).init(jax.random.key(0), tree)
    for part in ("attn/query/kernel", "(4, 2, 3)", "ioo", "iio", "sio"):
        assert part in str(error.value)


@pytest.mark.parametrize("axes", ["i", "ioo", "ix", "IO"])
def test_axes_that_do_not_fit_are_an_error(axes):
    with pytest.raises(ValueError, match="up/kernel"):
        lj.lora(lj.select("**", axes=axes), rank=1).init(jax.random.key(0), {"up": {"kernel": normal(4, 6)}})


def test_tune_needs_no_axes():
    tree = {"attn": {"query": {"kernel": normal(4, 2, 3), "bias": normal(2, 3)}}}
    assert set(lj.tune(lj.select("**")).init(jax.random.key(0), tree)) == {
        "attn/query/kernel",
        "attn/query/bias",
    }


@pytest.mark.parametrize("globs", [(), (3,), (["**"],)])
def test_select_takes_globs(globs):
    with pytest.raises((TypeError, ValueError)):
        lj.select(*globs)({"w": normal(2, 2)})
