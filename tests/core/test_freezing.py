"""What trains: labels, partition, and optimizers through freeze_base, on every form of tree."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax as lj
from tests.helpers.reference import close, digest, normal, random_delta, same

KEY = jax.random.key(0)
X, Y = normal(5, 8, seed=5), normal(5, 3, seed=6)
PARAMS = {"w": normal(8, 6, seed=1), "b": normal(6, seed=2), "v": normal(6, 3, seed=3), "n": jnp.int32(7)}
METHOD = lj.chain(lj.lora(lj.select("w"), rank=2), lj.tune(lj.select("b")))
DELTA = random_delta(METHOD, PARAMS)
COUNT = 8 * 2 + 2 * 6 + 6


def net(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]


def loss_of(adapted):
    return jnp.mean((lj.lift(net)(adapted, X) - Y) ** 2) * 50


def flat_labels(tree):
    return [
        (jax.tree_util.keystr(k, simple=True, separator="/"), x)
        for k, x in jax.tree_util.tree_flatten_with_path(lj.labels(tree))[0]
    ]


def test_labels_of_a_delta():
    delta = lj.Delta({"w": {"a": jnp.ones(2), "fixed_a": jnp.ones(2)}, "@shared/x": {"a": jnp.ones(1)}})
    assert dict(flat_labels(delta)) == {
        "w/a": "trainable",
        "w/fixed_a": "frozen",
        "@shared/x/a": "trainable",
    }
    assert jax.tree.structure(lj.labels(delta)) == jax.tree.structure(delta)


def test_labels_of_params_joint_trees_and_adapted_params():
    assert {label for _, label in flat_labels(PARAMS)} == {"frozen"}
    joint = {"base": PARAMS, "delta": DELTA}
    assert jax.tree.structure(lj.labels(joint)) == jax.tree.structure(joint)
    assert {p for p, label in flat_labels(joint) if label == "trainable"} == {
        "delta/w/a",
        "delta/w/b",
        "delta/b/value",
    }
    adapted = METHOD.apply(PARAMS, DELTA, key=jax.random.key(1))
    labelled = lj.labels(adapted)
    assert (labelled["w"].base, labelled["w"].a, labelled["w"].b, labelled["w"].scale) == (
        "frozen",
        "trainable",
        "trainable",
        "frozen",
    )
    assert labelled["b"].value == "trainable" and labelled["v"] == labelled["n"] == "frozen"
    dropping = lj.lora(lj.select("w"), rank=2, dropout=0.5)
    adapted = dropping.apply(PARAMS, random_delta(dropping, PARAMS), key=jax.random.key(1))
    labels = lj.labels(adapted)
    assert labels["w"].key == "frozen" and sorted(jax.tree.leaves(labels)).count("trainable") == 2


FORMS = {
    "delta": (lambda d: d, lambda tree: METHOD.apply(PARAMS, tree)),
    "joint": (lambda d: {"base": PARAMS, "delta": d}, lambda tree: METHOD.apply(tree["base"], tree["delta"])),
    "joint without tuned": (
        lambda d: {"base": lj.without_tuned(PARAMS, d), "delta": d},
        lambda tree: METHOD.apply(tree["base"], tree["delta"]),
    ),
    "adapted": (lambda d: METHOD.apply(PARAMS, d), lambda tree: tree),
}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.05)),
    "multisteps": lambda: optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
}


def trained(form: str, optimizer: str, steps: int = 4) -> tuple[Any, Any, Any]:
    """The factors after some steps, the state and the tree; the trainable half alone is differentiated."""
    put, adapt = FORMS[form]
    tree = put(DELTA)
    tx = lj.freeze_base(OPTIMIZERS[optimizer]())
    state = jax.jit(tx.init)(tree)

    def step(tree, state):
        trainable, frozen = lj.partition(tree)
        grads = jax.grad(lambda half: loss_of(adapt(lj.rejoin(half, frozen))))(trainable)
        grads = lj.rejoin(grads, jax.tree.map(jnp.zeros_like, frozen))
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    step = jax.jit(step)
    for _ in range(steps):
        tree, state = step(tree, state)
    return jax.tree.leaves(lj.partition(tree)[0]), state, tree


@functools.cache
def by_hand(optimizer: str, steps: int = 4) -> tuple[Any, Any]:
    """Plain optax on a plain dict of the factors."""
    factors = {path: dict(f) for path, f in DELTA.items()}
    tx = OPTIMIZERS[optimizer]()
    state = jax.jit(tx.init)(factors)

    def loss(f):
        dense = {**PARAMS, "w": PARAMS["w"] + f["w"]["a"] @ f["w"]["b"], "b": f["b"]["value"]}
        return jnp.mean((net(dense, X) - Y) ** 2) * 50

    @jax.jit
    def step(factors, state):
        updates, state = tx.update(jax.grad(loss)(factors), state, factors)
        return optax.apply_updates(factors, updates), state

    for _ in range(steps):
        factors, state = step(factors, state)
    return jax.tree.leaves(factors), state


@pytest.mark.parametrize(
    "form, optimizer",
    [
        ("delta", "adamw"),
        ("delta", "multisteps"),
        ("joint", "clipped"),
        ("joint", "multisteps"),
        ("joint without tuned", "clipped"),
        ("adapted", "adamw"),
        ("adapted", "multisteps"),
        ("adapted", "momentum"),
    ],
)
def test_every_form_trains_alike_and_keeps_no_state_for_the_base(form, optimizer):
    before = digest(PARAMS)
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps divides floats by integers
        factors, state, tree = trained(form, optimizer)
        want, want_state = by_hand(optimizer)
    assert sum(f.size for f in factors) == COUNT
    ordered = lambda leaves: sorted(leaves, key=lambda leaf: leaf.shape)  # noqa: E731
    close(ordered(factors), ordered(want), 2e-4)
    assert _numbers(state) == _numbers(want_state)
    frozen = {path: leaf for path, leaf in _frozen(tree).items() if leaf.ndim}
    for path, leaf in frozen.items():
        name = path.split("/")[-1] if "base" not in path.split("/")[1:] else path.split("/")[-2]
        if name in PARAMS:
            same(leaf, PARAMS[name])
    assert digest(PARAMS) == before


def _numbers(state):
    return sorted(np.shape(leaf) for leaf in jax.tree.leaves(state) if np.ndim(leaf))


def _frozen(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(lj.partition(tree)[1])
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in flat}


def test_raw_gradients_of_the_base_do_not_get_through():
    """What optax.masked alone would do (optax issue 159)."""
    tree = {"base": {"w": normal(3, 2)}, "delta": lj.Delta({"w": {"a": normal(3, 1), "b": normal(1, 2)}})}
    tx = lj.freeze_base(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    grads = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e6, np.float32), tree)
    grads["delta"] = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e-3, np.float32), tree["delta"])
    updates, _ = jax.jit(lambda grads, tree: tx.update(grads, tx.init(tree), tree))(grads, tree)
    assert not np.any(np.asarray(updates["base"]["w"]))
    np.testing.assert_allclose(updates["delta"]["w"]["a"], -1e-3, rtol=1e-6)  # the clip saw the delta alone


@pytest.mark.parametrize("form", ["delta", "joint", "adapted"])
def test_a_flax_train_state(form):
    put, adapt = FORMS[form]
    make = OPTIMIZERS["clipped"]
    state = TrainState.create(apply_fn=lj.lift(net), params=put(DELTA), tx=lj.freeze_base(make()))

    @jax.jit
    def step(state):
        trainable, frozen = lj.partition(state.params)
        grads = jax.grad(lambda half: loss_of(adapt(lj.rejoin(half, frozen))))(trainable)
        return state.apply_gradients(grads=lj.rejoin(grads, jax.tree.map(jnp.zeros_like, frozen)))

    for _ in range(4):
        state = step(state)
    ordered = lambda leaves: sorted(leaves, key=lambda leaf: leaf.shape)  # noqa: E731
    close(ordered(jax.tree.leaves(lj.partition(state.params)[0])), ordered(by_hand("clipped")[0]), 2e-4)
    assert _numbers(state.opt_state) == _numbers(by_hand("clipped")[1])


def test_differentiating_the_whole_joint_tree_gives_the_same_numbers():
    params = {name: PARAMS[name] for name in "wbv"}  # gradients of integers are another matter
    tree = {"base": params, "delta": DELTA}
    tx = lj.freeze_base(OPTIMIZERS["adamw"]())
    state = TrainState.create(apply_fn=None, params=tree, tx=tx)

    @jax.jit
    def step(state):
        return state.apply_gradients(
            grads=jax.grad(lambda t: loss_of(METHOD.apply(t["base"], t["delta"])))(state.params)
        )

    for _ in range(4):
        state = step(state)
    same(state.params["base"], params)
    close(jax.tree.leaves(state.params["delta"]), trained("delta", "adamw")[0], 2e-4)


def test_an_adapted_weights_dense_gradient_is_zero_even_if_asked_for():
    params = {name: PARAMS[name] for name in "wbv"}
    grads = jax.jit(jax.grad(lambda p: loss_of(METHOD.apply(p, DELTA))))(params)
    assert not np.any(np.asarray(grads["w"])) and np.any(np.asarray(grads["v"]))


@flax.struct.dataclass
class State:
    step: Any
    tree: Any


@pytest.mark.parametrize("form", FORMS)
def test_partition_and_rejoin_are_inverse(form):
    tree = FORMS[form][0](DELTA)
    trainable, frozen = lj.partition(tree)
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == COUNT
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(tree))
    same(lj.rejoin(trainable, frozen), tree)
    doubled = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), trainable)
    close(jax.tree.leaves(lj.partition(lj.rejoin(doubled, frozen))[0]), jax.tree.leaves(doubled), 0.0)
    halves = jax.jit(lj.partition)(tree)
    same(lj.rejoin(*halves), tree)


def test_partition_inside_a_state_and_with_dropout_keys():
    dropping = lj.lora(lj.select("w"), rank=2, dropout=0.5)
    adapted = dropping.apply(PARAMS, random_delta(dropping, PARAMS), key=jax.random.key(1))
    state = State(step=jnp.int32(3), tree=adapted)
    trainable, frozen = lj.partition(state)
    assert len(jax.tree.leaves(trainable)) == 2
    same(lj.rejoin(trainable, frozen), state)
    grads = jax.jit(jax.grad(lambda half: loss_of(lj.rejoin(half, frozen).tree)))(trainable)
    assert np.any(np.asarray(jax.tree.leaves(grads)[1]))
    tx = lj.freeze_base(optax.adam(0.1))
    assert _numbers(jax.jit(tx.init)(adapted)) == sorted([(8, 2), (2, 6)] * 2)


def test_freeze_base_with_a_schedule_and_extra_arguments():
    tx = lj.freeze_base(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    state = tx.init(DELTA)
    grads = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), DELTA)
    updates, state = jax.jit(tx.update)(grads, state, DELTA)
    close(updates, jax.tree.map(lambda g: np.float32(-0.5) * g, grads), 1e-6)
