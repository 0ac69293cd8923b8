"""Deltas, chains, specs, checks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from tests.helpers.reference import close, filled, merged_params, normal, random_delta, same

KEY = jax.random.key(0)
PARAMS = {
    "h_0": {"attn": {"query": {"kernel": normal(8, 6), "bias": normal(6)}}, "ln": {"scale": normal(8)}},
    "wte": {"embedding": normal(11, 8)},
    "step": jnp.int32(3),
}
LORA = lj.lora(lj.select("**/kernel"), rank=2, alpha=3)
TUNE = lj.tune(lj.select("**/{bias,scale}"))
BOTH = lj.chain(LORA, TUNE)


def test_a_delta_is_a_flat_dict_and_a_pytree():
    delta = BOTH.init(KEY, PARAMS)
    assert isinstance(delta, lj.Delta) and isinstance(delta, dict)
    assert set(delta) == {"h_0/attn/query/kernel", "h_0/attn/query/bias", "h_0/ln/scale"}
    assert set(delta["h_0/ln/scale"]) == {"value"}
    doubled = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), delta)
    assert isinstance(doubled, lj.Delta)
    assert isinstance(jax.jit(lambda d: d)(delta), lj.Delta)
    paths = [
        jax.tree_util.keystr(k, simple=True, separator=":") for k, _ in jax.tree_util.tree_flatten_with_path(delta)[0]
    ]
    assert "h_0/attn/query/kernel:a" in paths
    back = lj.Delta({name: delta[name] for name in reversed(list(delta))})
    assert jax.tree.structure(back) == jax.tree.structure(delta)  # the order of insertion does not matter


def test_a_delta_prints_as_a_short_table():
    text = repr(BOTH.init(KEY, PARAMS))
    assert len(text.splitlines()) <= 6 and "h_0/attn/query/kernel" in text
    assert "(8, 2)" in text and "[" not in text.replace("float32[", "")  # shapes, no numbers
    big = lj.Delta({"w": {"a": jnp.zeros((1000, 8))}})
    assert len(str(big)) < 200
    assert isinstance(repr(jax.tree.map(lambda _: None, big)), str)
    assert isinstance(repr(jax.eval_shape(BOTH.init, KEY, PARAMS)), str)
    assert isinstance(repr(optax.sgd(0.1, 0.9).init(big)), str)


@pytest.mark.parametrize("method", [LORA, TUNE, BOTH], ids=["lora", "tune", "chain"])
def test_delta_and_params_exchanged_are_type_errors(method):
    delta = random_delta(method, PARAMS)
    for wrong in (
        lambda: method.apply(delta, PARAMS),
        lambda: method.apply(PARAMS, PARAMS),
        lambda: method.apply(delta, delta),
        lambda: method.apply(PARAMS, dict(delta)),
        lambda: method.init(KEY, delta),
        lambda: lj.check(method, delta),
        lambda: lj.merge(delta),
        lambda: lj.unmerge(delta, method, PARAMS),
        lambda: lj.unmerge(PARAMS, method, PARAMS),
        lambda: lj.without_tuned(delta, PARAMS),
    ):
        with pytest.raises(TypeError):
            wrong()


def test_a_delta_of_another_base_or_method_is_an_error_that_names_the_path():
    delta = random_delta(LORA, PARAMS)
    other = {"h_1": PARAMS["h_0"]}
    with pytest.raises(ValueError, match="h_0/attn/query/kernel"):
        LORA.apply(other, delta)
    with pytest.raises(ValueError, match=r"ln/scale|bias"):
        LORA.apply(PARAMS, random_delta(BOTH, PARAMS))
    with pytest.raises(ValueError, match=r"ln/scale|bias"):
        BOTH.apply(PARAMS, delta)
    misshapen = jax.tree.map(lambda leaf: np.asarray(leaf)[:-1], delta)
    with pytest.raises(ValueError, match="query/kernel"):
        LORA.apply(PARAMS, misshapen)
    fewer = lj.Delta({"h_0/attn/query/kernel": {"a": delta["h_0/attn/query/kernel"]["a"]}})
    with pytest.raises(ValueError, match="query/kernel"):
        LORA.apply(PARAMS, fewer)


def test_chain_unites_disjoint_targets():
    delta = BOTH.init(KEY, PARAMS)
    same(delta["h_0/attn/query/kernel"], LORA.init(KEY, PARAMS)["h_0/attn/query/kernel"])
    delta = filled(delta)
    adapted = BOTH.apply(PARAMS, delta)
    one = LORA.apply(PARAMS, lj.Delta({k: v for k, v in delta.items() if k.endswith("kernel")}))
    same(lj.merge(adapted)["h_0"]["attn"]["query"]["kernel"], lj.merge(one)["h_0"]["attn"]["query"]["kernel"])
    same(lj.merge(adapted)["h_0"]["ln"]["scale"], delta["h_0/ln/scale"]["value"])
    nested = lj.chain(lj.chain(LORA), TUNE)
    same(nested.init(KEY, PARAMS), BOTH.init(KEY, PARAMS))


@pytest.mark.parametrize("foreign", ["wte/embedding", "@mlp_out/adapter", "@shared/vera"])
def test_a_chain_refuses_foreign_entries_of_a_delta(foreign):
    delta = lj.Delta(random_delta(BOTH, PARAMS) | {foreign: {"a": np.ones((11, 1)), "b": np.ones((1, 8))}})
    with pytest.raises(ValueError, match=f"the delta is not this method's: it has besides .*{foreign}"):
        BOTH.apply(PARAMS, delta)


@pytest.mark.parametrize("second", [lj.tune(lj.select("**/query/kernel")), lj.lora(lj.select("h_0/**/kernel"), rank=1)])
def test_two_transforms_on_one_leaf_are_an_error_that_names_it(second):
    both = lj.chain(LORA, second)
    for act in (lambda: both.init(KEY, PARAMS), lambda: lj.check(both, PARAMS)):
        with pytest.raises(ValueError, match="h_0/attn/query/kernel"):
            act()
    with pytest.raises(ValueError, match="h_0/attn/query/kernel"):
        second.apply(LORA.apply(PARAMS, random_delta(LORA, PARAMS)), random_delta(second, PARAMS))


SPECS = [
    lj.lora(lj.select("**/kernel"), rank=2),
    lj.lora(
        lj.select("**/{kernel,embedding}", axes={"**/kernel": "io", "**": "vo"}, exclude="h_1/**"),
        rank={"**/kernel": 3, "**": 1},
        alpha={"wte/*": 0.5, "**": 7},
        dropout=0.25,
        a_init="gaussian",
        scale_rule="alpha/sqrt(r)",
        dtype=jnp.bfloat16,
    ),
    lj.lora(lj.select("stack", axes="sio", layers=(0, 2)), rank=2),
    lj.tune(lj.select("**")),
    lj.tune(lj.select("**", exclude=("wte/*", "h_1/**"))),
    lj.tune(lj.select("h_*/**", layers=[1])),
    BOTH,
]


@pytest.mark.parametrize("method", SPECS)
def test_a_spec_is_json_and_gives_an_equal_transform(method):
    params = {**PARAMS, "h_1": PARAMS["h_0"], "stack": normal(3, 8, 4)}
    spec = json.loads(json.dumps(method.spec))
    again = lj.from_spec(spec)
    delta, from_spec = jax.jit(lambda: [m.init(KEY, params) for m in (method, again)])()
    same(from_spec, delta)
    delta = filled(delta)
    key = jax.random.key(1)
    same(again.apply(params, delta, key=key), method.apply(params, delta, key=key))
    assert again.spec == method.spec and json.dumps(again.spec) == json.dumps(method.spec)
    assert lj.check(again, params) == lj.check(method, params)


def test_absent_keys_of_a_spec_take_the_defaults():
    short = lj.from_spec({"method": "lora", "select": ["**/kernel"], "rank": 2})
    same(short.init(KEY, PARAMS), lj.lora(lj.select("**/kernel"), rank=2).init(KEY, PARAMS))
    full = {
        "method": "lora", "select": ["**/kernel"], "axes": None, "layers": None, "exclude": [], "rank": 2,
        "alpha": None, "dropout": 0.0, "a_init": "kaiming_uniform", "scale_rule": "alpha/r", "dtype": "float32",
    }  # fmt: skip
    same(lj.from_spec(full).init(KEY, PARAMS), short.init(KEY, PARAMS))


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"method": "lorra", "select": ["**"], "rank": 2}, "lora"),
        ({"select": ["**"], "rank": 2}, "method"),
        ({"method": "lora", "select": ["**"], "rank": 2, "droput": 0.1}, "droput"),
        ({"method": "lora", "select": ["**"]}, "rank"),
        ({"method": "lora", "rank": 2}, "select"),
        ({"method": "tune", "select": ["**"], "rank": 2}, "rank"),
        ({"method": "lora", "select": [], "rank": 2}, "select|glob"),
    ],
)
def test_a_spec_that_does_not_fit_is_an_error_that_says_what(spec, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lj.from_spec(spec).init(KEY, PARAMS)


def test_a_registered_method_is_known_to_from_spec():
    def halves(selection, *, size=0.5):
        method = lj.tune(selection)

        def init(key, params):
            return jax.tree.map(lambda leaf: size * leaf, method.init(key, params))

        return lj.ParamTransform(init, method.apply, {**method.spec, "method": "halves", "size": size})

    lj.register("halves", halves)
    method = lj.from_spec({"method": "halves", "select": ["**/bias"], "size": 0.25})
    delta = method.init(KEY, PARAMS)
    close(delta["h_0/attn/query/bias"]["value"], 0.25 * PARAMS["h_0"]["attn"]["query"]["bias"], 1e-7)
    same(lj.from_spec(json.loads(json.dumps(method.spec))).init(KEY, PARAMS), delta)
    chained = lj.from_spec({"method": "chain", "of": [LORA.spec, method.spec]})
    assert lj.check(chained, PARAMS).trained == 2 * (8 + 6) + 6


def test_apply_leaves_its_arguments_and_other_leaves_alone():
    delta = BOTH.init(KEY, PARAMS)
    before = jax.tree.map(lambda leaf: np.array(leaf), (PARAMS, delta))
    adapted = BOTH.apply(PARAMS, delta)
    same(jax.tree.map(lambda leaf: np.array(leaf), (PARAMS, delta)), before)
    assert adapted["wte"]["embedding"] is PARAMS["wte"]["embedding"]
    assert adapted["h_0"]["attn"]["query"]["kernel"].base is PARAMS["h_0"]["attn"]["query"]["kernel"]  # no copy


def test_specs_with_former_names_of_methods():
    for former, method in (
        ({"method": "rows", "select": ["wte/*"], "indices": [3, 1]}, lj.rows(lj.select("wte/*"), indices=[3, 1])),
        ({"method": "shift", "select": ["**/bias"], "scale": 2.0}, lj.shift(lj.select("**/bias"), scale=2.0)),
    ):
        assert lj.from_spec(former).spec == method.spec
        assert [traits.fast for _, traits in lj.traits_of(former)] == [()]
        delta = random_delta(method, PARAMS)
        same(lj.merge(lj.from_spec(former).apply(PARAMS, delta)), merged_params(method, PARAMS, delta))
