"""What trains is one tree of labels; optax's masking and the split of a tree both follow it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from lora_jax.core.arrays import Adapted, arrays_of, is_frozen
from lora_jax.core.lifting.taps import Tap
from lora_jax.core.transforms import Delta


def labels(tree: Any) -> Any:
    """A tree of "trainable" and "frozen" for a Delta, `{"base": params, "delta": delta}` or adapted params.

    Factors are trainable, except those named `fixed_...`. The base, keys and scale of an adapted array are frozen, and
    so are plain params.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> delta = lj.Delta({"kernel": {"a": jnp.ones((3, 1)), "fixed_b": jnp.ones((1, 2))}})
    >>> lj.labels({"base": {"kernel": jnp.ones((3, 2))}, "delta": delta})["base"]
    {'kernel': 'frozen'}
    >>> dict(lj.labels(delta))
    {'kernel': {'a': 'trainable', 'fixed_b': 'frozen'}}
    """

    def label(node: Any) -> Any:
        if isinstance(node, Delta):
            return Delta({path: _by_name(factors) for path, factors in node.items()})
        if isinstance(node, Tap):
            strength = jax.tree.map(lambda _: "frozen", node.strength)
            return dataclasses.replace(node, factors=_by_name(node.factors), strength=strength)
        if isinstance(node, Adapted):
            return node.replace(**_by_name(arrays_of(node), node.frozen))
        return "frozen"

    return jax.tree.map(label, tree, is_leaf=lambda node: isinstance(node, Delta | Adapted | Tap))


def _by_name(factors: Any, frozen: Sequence[str] = ()) -> Any:
    def label(name: str) -> str:
        return "frozen" if is_frozen(name, frozen) else "trainable"

    if not isinstance(factors, dict):
        return jax.tree.map(lambda _: "trainable", factors)
    return {name: jax.tree.map(lambda _, name=name: label(name), leaf) for name, leaf in factors.items()}


def freeze_base(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, for what `labels` calls trainable: the rest gets no updates and has no state.

    Clipping, `MultiSteps` or a gradient norm belong inside, where they see only what trains. (`optax.masked` would let
    the raw gradients of the base through.)

    >>> import jax.numpy as jnp, optax, lora_jax as lj
    >>> delta = lj.Delta({"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}})
    >>> state = lj.freeze_base(optax.sgd(0.1)).init({"base": {"kernel": jnp.ones((3, 2))}, "delta": delta})
    """
    return optax.partition({"trainable": tx, "frozen": optax.set_to_zero()}, labels)


def partition(tree: Any) -> tuple[Any, Any]:
    """`(trainable, frozen)` by the same labels, None where the other half has the leaf; differentiate the first.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> trainable, frozen = lj.partition(lj.Delta({"w": {"a": jnp.ones(2), "fixed_b": jnp.ones(3)}}))
    >>> trainable["w"]["fixed_b"] is None and frozen["w"]["a"] is None
    True
    """

    def half(wanted: str) -> Any:
        return jax.tree.map(lambda label, leaf: leaf if label == wanted else None, label_tree, tree)

    label_tree = labels(tree)
    return half("trainable"), half("frozen")


def combine(trainable: Any, frozen: Any) -> Any:
    """The inverse of `partition`: the tree with each leaf from the half that has it.

    >>> halves = {"a": 1, "b": None}, {"a": None, "b": 2}
    >>> combine(*halves)
    {'a': 1, 'b': 2}
    """
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


rejoin = combine  # its name before
