"""A small model that names its activations, in several forms, and what holds of every method that changes them."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name as named

import lora_jax as lj
from lora_jax.core.transforms import per_site
from tests.helpers.reference import close, digest, filled, ints, normal, same, weighted

KEY = jax.random.key(0)
LAYERS, WIDTH, VOCABULARY = 4, 4, 6
TOKENS = ints([[1, 0, 3, 2, 5], [4, 4, 0, 1, 2]])
SITES = {"mlp_out": LAYERS, "block_out": LAYERS}
PARAMS = {"wte": normal(VOCABULARY, WIDTH, seed=1), "w": normal(LAYERS, WIDTH, WIDTH, seed=2)}


def layer(w: jax.Array, x: jax.Array) -> jax.Array:
    return named(x + jnp.tanh(named(x @ w, "mlp_out")), "block_out")


def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return layer(w, x), None


def embedded(p: Any, tokens: jax.Array) -> jax.Array:
    """Tokens named here, positions in a function with jit."""

    @jax.jit
    def positions(tokens):
        return named(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), "positions")

    return p["wte"][named(tokens, "tokens")] + jnp.sin(positions(tokens).astype(jnp.float32))[..., None]


def looped(one: Callable) -> Callable:
    return lambda p, x: functools.reduce(lambda x, w: one(w, x), p["w"], x)


def nested(p: Any, x: jax.Array) -> jax.Array:
    groups = p["w"].reshape(2, LAYERS // 2, WIDTH, WIDTH)
    return lax.scan(lambda x, ws: (lax.scan(step, x, ws)[0], None), x, groups)[0]


def in_pairs(p: Any, x: jax.Array) -> jax.Array:
    pairs = p["w"].reshape(LAYERS // 2, 2, WIDTH, WIDTH)
    return lax.scan(lambda x, ws: (layer(ws[1], layer(ws[0], x)), None), x, pairs)[0]


def partly_scanned(p: Any, x: jax.Array) -> jax.Array:
    x = lax.scan(step, layer(p["w"][0], x), p["w"][1:3])[0]
    return layer(p["w"][3], x)


SAVED = jax.checkpoint_policies.save_only_these_names("mlp_out")
TOWERS = {
    "loop": looped(layer),
    "scan": lambda p, x: lax.scan(step, x, p["w"])[0],
    "remat": looped(jax.checkpoint(layer)),
    "remat with a policy": looped(jax.checkpoint(layer, policy=SAVED)),
    "scan of remat": lambda p, x: lax.scan(jax.checkpoint(step, prevent_cse=False), x, p["w"])[0],
    "remat of scan": lambda p, x: jax.checkpoint(lambda x, w: lax.scan(step, x, w)[0])(x, p["w"]),
    "remat of all": lambda p, x: jax.checkpoint(looped(layer))(p, x),
    "scan in scan": nested,
    "scan of two layers a step": in_pairs,
    "unrolled scan": lambda p, x: lax.scan(step, x, p["w"], unroll=2)[0],
    "reversed scan": lambda p, x: lax.scan(step, x, p["w"][::-1], reverse=True)[0],
    "loop and scan": partly_scanned,
    "jit": looped(jax.jit(layer)),
    "jit of scan": jax.jit(lambda p, x: lax.scan(step, x, p["w"])[0]),
}


def tower(name: str) -> Callable:
    return lambda p, tokens: TOWERS[name](p, embedded(p, tokens))


@dataclasses.dataclass(frozen=True)
class Mix:
    """A change with factors of several shapes, a function of the tokens and their positions too."""

    gain: float = 1.0

    def __call__(self, factors, x, seen):
        weights = (seen["tokens"] % 2 + seen["positions"])[..., None].astype(x.dtype)
        y = jnp.tanh(x @ factors["w"].astype(x.dtype)) * weights
        return x * jnp.broadcast_to(factors["scale"].astype(x.dtype), x.shape) + self.gain * y


def _init(key, site, n):
    w, scale = jax.random.split(key)
    return {"w": jax.random.normal(w, (n, WIDTH, WIDTH)), "scale": 1 + jax.random.normal(scale, (n, WIDTH)) / 2}


def mix(sites=SITES, layers=None, gain=1.0):
    return per_site({"method": "mix"}, sites, _init, Mix(gain), layers)


@dataclasses.dataclass(frozen=True)
class Shift:
    def __call__(self, factors, x, seen):
        return x + jnp.broadcast_to(factors["by"].astype(x.dtype), x.shape)


def shift(count=1, method="shift", layers=None, site="mlp_out"):
    start = lambda key, site, n: {"by": jax.random.normal(key, (n, WIDTH))}  # noqa: E731
    return per_site({"method": method}, {site: count}, start, Shift(), layers)


def invariants(method: lj.ParamTransform, tokens: jax.Array = TOKENS) -> None:
    """Items 1, 4, 5 and 10 of section 6 of the design, for a method on the tower of these tokens (2, length)."""
    again = lj.from_spec(json.loads(json.dumps(method.spec)))
    before = digest(PARAMS)
    fresh, from_spec = jax.jit(lambda key: (method.init(key, PARAMS), again.init(key, PARAMS)))(KEY)
    each = [filled(fresh, seed=n, size=0.4) for n in range(2)]

    def gradient(name):
        def loss(delta, tokens):
            out = lj.lift(tower(name), on_dense="error")(method.apply(PARAMS, delta), tokens)
            return jnp.mean((out - 1.0) ** 2) + 1e-3 * weighted(out), out

        return jax.value_and_grad(loss, has_aux=True)

    # every example with its own delta, scanned and rematerialized, is as one at a time in a loop
    one = jax.jit(gradient("loop"))
    together = jax.tree.map(lambda *leaf: np.stack(leaf), *each)
    got = jax.jit(jax.vmap(gradient("scan of remat")))(together, tokens[:, None])
    want = [one(delta, tokens[n : n + 1]) for n, delta in enumerate(each)]
    close(got, jax.tree.map(lambda *leaf: np.stack(leaf), *want), 2e-5)

    # what trains is the delta, all of it, and the base stays
    delta, losses = fresh, []
    for _ in range(4):
        (loss, _), grads = one(delta, tokens[:1])
        delta = jax.tree.map(lambda x, g: np.asarray(x) - np.float32(0.1) * np.asarray(g), delta, grads)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(np.any(a != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (delta, fresh)), strict=True))
    assert digest(PARAMS) == before

    # and a spec as JSON is the method
    same(from_spec, fresh)
    same(again.apply(PARAMS, each[0], strength=0.5), method.apply(PARAMS, each[0], strength=0.5))
    assert again.spec == method.spec
