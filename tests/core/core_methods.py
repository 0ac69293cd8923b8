"""Methods against dense weights, and against small networks of torch with adapters of PEFT."""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_reference import close, filled, weighted

import lora_jax as lj

SHAPES = [(5, 7, 6, 3), (1, 9, 4, 2), (12, 8, 16, 5)]  # what each layer of a network takes, and what the last gives


def as_dense(
    fn: Callable,
    params: Any,
    method: lj.ParamTransform,
    dense: Callable,
    *args: Any,
    on_dense: Any = "error",
) -> None:
    """fn(params, *args) lifted is fn(dense(params, delta), *args) for a random delta: value, gradients of what trains,
    merged params."""
    delta = filled(jax.eval_shape(lambda: method.init(jax.random.key(0), params)), size=0.5)
    lifted = lj.lift(fn, on_dense=on_dense)

    def both(delta: Any) -> Any:  # one program: compiling is most of a test's time
        def adapted(delta):
            out = lifted(method.apply(params, delta), *args)
            return weighted(out), out

        def reference(delta):
            out = fn(dense(params, delta), *args)
            return weighted(out), out

        return (
            jax.value_and_grad(adapted, has_aux=True)(delta),
            jax.value_and_grad(reference, has_aux=True)(delta),
            lj.merge(method.apply(params, delta)),
            dense(params, delta),
        )

    ((_, out), grads), ((_, want), want_grads), merged, weights = jax.jit(both)(delta)
    close(out, want)
    close(merged, weights, 1e-6)
    trained, _ = lj.partition(grads)
    close(trained, lj.partition(want_grads)[0], 2e-5)
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(trained))


def network(kind: str, sizes: tuple[int, ...]) -> Any:
    """Layers l0, l1, .. of torch, a tanh after each; `kind` is "linear", where the last has no bias, or "conv1d"."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers: dict[str, Any] = {}
    for n, (inner, outer) in enumerate(itertools.pairwise(sizes)):
        if kind == "conv1d":
            layers[f"l{n}"] = pytest.importorskip("transformers.pytorch_utils").Conv1D(outer, inner)
            torch.nn.init.normal_(layers[f"l{n}"].bias)
        else:
            layers[f"l{n}"] = torch.nn.Linear(inner, outer, bias=n + 2 < len(sizes))
        layers[f"t{n}"] = torch.nn.Tanh()
    return torch.nn.Sequential(OrderedDict(layers))


def tree(module: Any) -> dict[str, Any]:
    """The parameters of a network, as params: `{"l0": {"weight": .., "bias": ..}, ..}`."""
    params: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        layer, leaf = name.split(".")
        params.setdefault(layer, {})[leaf] = jnp.asarray(value.numpy())
    return params


def run(kind: str) -> Callable:
    """A network as a function of its params."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for name in sorted(params):
            weight = params[name]["weight"]
            x = x @ (weight if kind == "conv1d" else weight.T)
            bias = params[name].get("bias", jnp.zeros(x.shape[-1]))
            x = jnp.tanh(x + bias[None, None])
        return x

    return fn


def randomized(model: Any, size: float = 0.5) -> dict[str, Any]:
    """The trained tensors of a PEFT model by name, filled with random numbers."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    with torch.no_grad():
        for tensor in trained.values():
            tensor.normal_(0, size)
    return trained


def as_peft(kind: str, params: Any, model: Any, trained: dict, method: Any, delta: Any, names: dict) -> None:
    """Output, gradient of every trained tensor, and merged weights are those of PEFT's model.

    names: PEFT's name of a trained tensor -> (key in the delta, factor).
    """
    torch = pytest.importorskip("torch")
    x = (
        np.random.default_rng(3)
        .normal(size=(4, 3, next(iter(params.values()))["weight"].shape[0 if kind == "conv1d" else 1]))
        .astype(np.float32)
    )
    theirs = model(torch.from_numpy(x))
    theirs.sin().sum().backward()
    lifted = lj.lift(run(kind), on_dense="error")

    @jax.jit
    def ours(delta):
        def loss(delta):
            out = lifted(method.apply(params, delta), jnp.asarray(x))
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, has_aux=True)(delta), lj.merge(method.apply(params, delta))

    ((_, out), grads), merged = ours(delta)
    close(out, theirs.detach().numpy(), 1e-5)
    assert set(names) == set(trained)
    got = {name: grads[key][factor] for name, (key, factor) in names.items()}
    close(got, {name: x.grad.numpy().reshape(got[name].shape) for name, x in trained.items()}, 2e-5)
    close(merged, tree(model.merge_and_unload()), 1e-6)
