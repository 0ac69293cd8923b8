"""What trains is one tree of labels; optax's masking and the split of a tree both follow it."""

import dataclasses
from typing import Any

import jax
import optax

from lora_jax.core.arrays import Adapted
from lora_jax.core.lifting.taps import Tap
from lora_jax.core.transforms import Delta


def labels(tree: Any) -> Any:
    """A tree of "trainable" and "frozen" for a Delta, `{"base": params, "delta": delta}` or adapted params.

    Factors train, but those named `fixed_...`; inside an adapted array base, keys, scale are frozen; plain params too.
    """

    def label_all(node: Any, label: str) -> Any:
        return jax.tree.map(lambda _: label, node)

    def of_factors(factors: Any) -> Any:
        if isinstance(factors, dict):
            return {name: label_all(leaf, _factor_label(name)) for name, leaf in factors.items()}
        return label_all(factors, "trainable")

    def label(node: Any) -> Any:
        if isinstance(node, Delta):
            return Delta({path: of_factors(factors) for path, factors in node.items()})
        if isinstance(node, Tap):
            return dataclasses.replace(
                node, factors=of_factors(node.factors), strength=label_all(node.strength, "frozen")
            )
        if isinstance(node, Adapted):
            fields = [field for field in dataclasses.fields(node) if not field.metadata.get("static")]  # type: ignore[arg-type]
            by_field = {f.name: "frozen" if f.name in node.frozen else _factor_label(f.name) for f in fields}
            return node.replace(**{name: label_all(getattr(node, name), by_field[name]) for name in by_field})
        return "frozen"

    return jax.tree.map(label, tree, is_leaf=_is_node)


def freeze_base(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer for what trains alone: no updates and no state for the rest, whatever the tree.

    Clipping, `MultiSteps` or a gradient norm belong inside: there they see what trains. (`optax.masked` would let the
    raw gradients of the base through.)

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
    label_tree = labels(tree)
    return (
        jax.tree.map(lambda label, leaf: leaf if label == "trainable" else None, label_tree, tree),
        jax.tree.map(lambda label, leaf: leaf if label == "frozen" else None, label_tree, tree),
    )


def combine(trainable: Any, frozen: Any) -> Any:
    """The inverse of `partition`: the tree with each leaf from the half that has it."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


rejoin = combine  # its name before


def _factor_label(name: str) -> str:
    return "frozen" if name.startswith("fixed_") else "trainable"


def _is_node(node: Any) -> bool:
    return isinstance(node, Delta | Adapted | Tap)
