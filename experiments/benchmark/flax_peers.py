"""Training steps with qwix (on our model) and with flax's nnx.LoRA (on a model of its own)."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from experiments.benchmark import ours, shapes

TARGETS = {"qv": r"h_\d+/attn/(query|value)", "all": r"h_\d+/(attn/(query|key|value|out)|mlp/(up|down))"}


def loss_of(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def qwix_step(work: dict[str, Any]) -> ours.Parts:
    import qwix

    model, batch = ours.model_of(work), ours.batch_of(work)
    provider = qwix.LoraProvider(module_path=TARGETS[work["targets"]], rank=shapes.RANK, alpha=float(shapes.RANK))
    adapted = qwix.apply_lora_to_model(model, provider)
    params = ours.random(jax.eval_shape(adapted.init, jax.random.key(0), batch["tokens"])["params"], work)
    flat = traverse_util.flatten_dict(params, sep="/")
    trained = {name: x for name, x in flat.items() if re.search(r"_lora_[ab]$|^classifier/", name)}
    assert sum(x.size for name, x in trained.items() if "_lora_" in name) == shapes.trained(work)
    frozen = {name: x for name, x in flat.items() if name not in trained}
    tx = optax.adamw(shapes.RATE)

    def one(trained: Any, state: Any, frozen: Any, batch: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            params = traverse_util.unflatten_dict(trained | frozen, sep="/")
            return loss_of(adapted.apply({"params": params}, batch["tokens"]), batch)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    one = jax.jit(one, donate_argnums=(0, 1))
    state = tx.init(trained)

    def unit() -> None:
        nonlocal trained, state
        trained, state, value = one(trained, state, frozen, batch)
        value.block_until_ready()

    return {"unit": unit, "floor": lambda: ours.floor(work)}


def nnx_step(work: dict[str, Any]) -> ours.Parts:
    model, batch = Transformer(work, nnx.Rngs(0)), ours.batch_of(work)
    trains = nnx.All(nnx.Param, nnx.Any(nnx.LoRAParam, nnx.PathContains("classifier")))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == shapes.trained(work)
    optimizer = nnx.Optimizer(model, optax.adamw(shapes.RATE), wrt=trains)

    @nnx.jit
    def one(model: Any, optimizer: Any, batch: Any) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            return loss_of(model(batch["tokens"]), batch)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trains))(model)
        optimizer.update(model, grads)
        return value

    def unit() -> None:
        one(model, optimizer, batch).block_until_ready()

    return {"unit": unit, "floor": lambda: ours.floor(work)}


class Transformer(nnx.Module):
    """A GPT-2 or a RoBERTa without dropout, its linear layers with or without LoRA."""

    def __init__(self, work: dict[str, Any], rngs: nnx.Rngs):
        shape = shapes.MODELS[work["model"]]
        self.causal, width = shape["kind"] == "gpt2", shape["width"]
        self.wte = nnx.Embed(shape["vocab"], width, rngs=rngs)
        self.wpe = nnx.Embed(1024, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.blocks = nnx.List([Block(work, self.causal, rngs) for _ in range(shape["layers"])])
        if not self.causal:
            self.classifier = nnx.List([nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, 2, rngs=rngs)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))[None]
        x = x if self.causal else self.norm(x)
        for block in self.blocks:
            x = block(x)
        if self.causal:
            return self.wte.attend(self.norm(x))
        dense, out = self.classifier
        return out(jnp.tanh(dense(x[:, 0])))


class Block(nnx.Module):
    def __init__(self, work: dict[str, Any], causal: bool, rngs: nnx.Rngs):
        shape = shapes.MODELS[work["model"]]
        self.width, self.heads, self.causal = shape["width"], shape["heads"], causal

        def linear(name: str, into: int, out: int) -> nnx.Module:
            if work["targets"] == "all" or name in ("query", "value"):
                return nnx.LoRALinear(into, out, lora_rank=shapes.RANK, rngs=rngs)
            return nnx.Linear(into, out, rngs=rngs)

        width = self.width
        self.query, self.key, self.value, self.out = (linear(n, width, width) for n in ("query", "key", "value", "out"))
        self.up, self.down = linear("up", width, 4 * width), linear("down", 4 * width, width)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = self.norms
        if self.causal:
            x = x + self.attend(first(x))
            return x + self.mlp(second(x))
        x = first(x + self.attend(x))
        return second(x + self.mlp(x))

    def attend(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], self.heads, self.width // self.heads)
        query, key, value = (layer(x).reshape(heads) for layer in (self.query, self.key, self.value))
        return self.out(jax.nn.dot_product_attention(query, key, value, is_causal=self.causal).reshape(x.shape))

    def mlp(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=self.causal))
