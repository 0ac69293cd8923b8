"""Methods against dense weights, and against small networks of torch with adapters of PEFT."""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.models.layouts import to_scanned
from tests.helpers.networks import Stack, stacked
from tests.helpers.reference import close, normal, random_delta, same, weighted

SHAPES = [(5, 7, 6, 3), (1, 9, 4, 2), (12, 8, 16, 5)]  # what each layer of a network takes, and what the last gives

# A weight's shape in every layout, by its axes.
LAYOUTS = {
    "io": (8, 6),
    "oi": (6, 8),
    "vo": (9, 5),
    "ioo": (8, 3, 4),
    "oio": (3, 8, 4),
    "iio": (3, 4, 6),
    "sio": (3, 8, 6),
    "kkio": (3, 2, 4, 5),
    "soi": (3, 5, 8),
    "iso": (8, 3, 5),
    "osi": (5, 3, 8),
    "ssio": (2, 3, 6, 5),
}
# Uses of a weight, of inputs (3, 8): (function, shape, axes).
USES: dict[str, tuple[Callable, tuple[int, ...], str]] = {
    "product": (lambda p, x: x @ p["w"], (8, 12), "io"),
    "oi": (lambda p, x: x @ p["w"].T, (12, 8), "oi"),
    "from heads": (lambda p, x: jnp.einsum("bhd,hdo->bo", x.reshape(3, 2, 4), p["w"]), (2, 4, 5), "iio"),
    "scan, remat": (
        lambda p, x: lax.scan(jax.checkpoint(lambda c, w: ((c @ w) ** 2, 0)), x, p["w"])[0],
        (3, 8, 8),
        "sio",
    ),
    "rows": (lambda p, x: p["w"][jnp.array([[3, 0], [7, 7]])], (8, 5), "vo"),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            normal(2, 6, 7, 4), p["w"], (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (3, 2, 4, 6),
        "kkio",
    ),
}


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
    delta = random_delta(method, params, size=0.5)
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


def both(got: Callable, want: Callable, delta: Any) -> Any:
    """(outputs, gradients) of each of two functions of a delta, in one program."""

    def measured(fn: Callable) -> Any:
        def loss(delta: Any) -> Any:
            out = fn(delta)
            return weighted(out), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(delta)
        return out, grads

    return jax.jit(lambda delta: (measured(got), measured(want)))(delta)


def as_some_layers(one: lj.ParamTransform, some: lj.ParamTransform, params: Any, x: Any) -> None:
    """A method on layers 0 and 2 of three, `one` of a looped `Stack` and `some` of a scanned one: the same function,
    and the other layer stays as it is."""
    stack, scanned = stacked(params, 3), Stack(layers=3, scan=True, remat=True)
    delta = random_delta(one, params)
    other = to_scanned(lj.Delta({path.replace("h_2/", "h_1/"): factors for path, factors in delta.items()}))
    assert jax.tree.map(jnp.shape, some.init(jax.random.key(0), stack)) == jax.tree.map(jnp.shape, other)
    merged = lj.merge(some.apply(stack, other))
    close(merged, stacked(lj.merge(one.apply(params, delta)), 3), 1e-6)
    same(jax.tree.map(lambda leaf: leaf[1], merged["h"]), params["h_1"])
    got = jax.jit(lambda d: lj.lift(scanned.apply, on_dense="error")({"params": some.apply(stack, d)}, x))(other)
    close(got, scanned.apply({"params": merged}, x))


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
        params.setdefault(layer, {})[leaf] = jax.device_put(value.numpy().copy())
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
