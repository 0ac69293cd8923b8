"""Loop to scan and back, for parameters, deltas, optimizer states and what holds them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from lora_jax.core.transforms import Delta
from lora_jax.models.layouts import to_loop, to_scanned


def layers(n: int = 12, seed: int = 0):
    """Parameters as a model's, with more than ten layers: h_10 comes behind h_9."""
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    tree = {f"h_{i}": {"mlp": {"kernel": leaf(2, 3), "bias": leaf(3)}} for i in range(n)}
    return {"wte": {"embedding": leaf(5, 2)}, **tree}


def a_delta(n: int = 12, *, missing: tuple[int, ...] = ()) -> Delta:
    rng = np.random.default_rng(1)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    tree = {f"h_{i}/mlp/kernel": {"a": leaf(2, 1), "b": leaf(1, 3)} for i in range(n) if i not in missing}
    return Delta({"@site": {"down": leaf(n, 2)}, "wte/embedding": {"a": leaf(5, 1)}, **tree})


def same(x, y) -> None:
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)


def frozen_but_the_layers(tx):
    return optax.masked(tx, lambda tree: {key: key != "wte" for key in tree})


TREES = {
    "params": layers,
    "delta": a_delta,
    "gradients": lambda: [layers(seed=1), (None, a_delta())],
    "adamw": lambda: optax.adamw(1e-3).init(layers()),
    "adamw of a delta": lambda: optax.adamw(1e-3).init(a_delta()),
    "masked": lambda: frozen_but_the_layers(optax.adam(1e-3)).init(layers()),
    "partition": lambda: optax.partition(
        {"on": optax.adam(1e-3), "off": optax.set_to_zero()},
        lambda tree: {"base": "off", "delta": "on"},
    ).init({"base": layers(), "delta": a_delta()}),
    "accumulating": lambda: optax.MultiSteps(optax.adam(1e-3), 2).init(layers()),
    "train state": lambda: TrainState.create(apply_fn=None, params=layers(), tx=ADAM),
}
ADAM = optax.adam(1e-3)


@pytest.mark.parametrize("name", TREES)
def test_there_and_back(name):
    tree = TREES[name]()
    scanned = to_scanned(tree)
    assert not any("h_1" in jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(scanned))
    same(to_loop(scanned), tree)
    same(to_scanned(to_loop(scanned)), scanned)


def test_layers_are_stacked_in_order():
    params, delta = layers(), a_delta()
    scanned = to_scanned(params)
    assert set(scanned) == {"wte", "h"}
    for i in range(12):
        np.testing.assert_array_equal(scanned["h"]["mlp"]["bias"][i], params[f"h_{i}"]["mlp"]["bias"])
    stacked = to_scanned(delta)
    assert isinstance(stacked, Delta) and set(stacked) == {"@site", "wte/embedding", "h/mlp/kernel"}
    np.testing.assert_array_equal(stacked["h/mlp/kernel"]["a"][11], delta["h_11/mlp/kernel"]["a"])
    same(stacked["@site"], delta["@site"])


def test_a_step_in_either_layout_is_the_same_step():
    tx = optax.adamw(1e-2)
    params, grads = layers(), layers(seed=1)
    state = tx.init(params)
    loop = tx.update(grads, state, params)
    scanned = tx.update(to_scanned(grads), to_scanned(state), to_scanned(params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), to_scanned(loop), scanned)


def test_under_jit_and_on_shapes():
    params = layers()
    same(jax.jit(to_scanned)(params), to_scanned(params))
    shapes = jax.eval_shape(to_scanned, params)
    assert shapes["h"]["mlp"]["kernel"].shape == (12, 2, 3)
    assert jax.tree.structure(jax.eval_shape(to_loop, shapes)) == jax.tree.structure(params)


def test_trees_without_layers_stay():
    tree = {"a": jnp.ones(2), "h": jnp.ones(3), "others": [None, (), {"h_x": jnp.ones(1)}]}
    same(to_scanned(tree), tree)
    same(to_loop(tree), tree)


def ragged():
    params = layers(3)
    params["h_1"]["mlp"].pop("bias")
    return params


def misshapen():
    params = layers(3)
    params["h_1"]["mlp"]["bias"] = jnp.ones(4)
    return params


@pytest.mark.parametrize(
    ("convert", "tree", "says"),
    [
        (to_scanned, a_delta(4, missing=(1, 2)), r"h/mlp/kernel has layers \[0, 3\] but not \[1, 2\]"),
        (to_scanned, Delta({**a_delta(2), "h_0/q": {"a": jnp.ones(1)}}), r"h/q has layers \[0\] but not \[1\]"),
        (to_scanned, ragged(), "h: the layers differ in their leaves"),
        (to_scanned, misshapen(), "h: the layers differ in their leaves"),
        (to_loop, {"h": {"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}}, r"numbers of layers: \[2, 3\]"),
        (to_loop, {"h": {"a": optax.MaskedNode()}}, "h holds no array"),
    ],
)
def test_bad_trees(convert, tree, says):
    with pytest.raises(ValueError, match=says):
        convert(tree)
