"""Training steps with qwix (on our model) and with flax's nnx.LoRA (on a model of its own)."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from experiments.benchmark import ours, shapes

TARGETS = {"qv": r"h_\d+/attn/(query|value)", "all": r"h_\d+/(attn/(query|key|value|out)|mlp/(gate|up|down))"}


def loss_of(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def qwix_step(work: dict[str, Any]) -> ours.Parts:
    import qwix

    model, batch = ours.model_of(work), ours.batch_of(work)
    provider = qwix.LoraProvider(module_path=TARGETS[work["targets"]], rank=shapes.RANK, alpha=float(shapes.ALPHA))
    adapted = qwix.apply_lora_to_model(model, provider)
    params = ours.random(jax.eval_shape(adapted.init, jax.random.key(0), batch["tokens"])["params"], work)
    flat = traverse_util.flatten_dict(params, sep="/")
    flat |= {name: 0 * x for name, x in flat.items() if name.endswith("_lora_b")}
    flat |= traverse_util.flatten_dict(ours.params_of(model, work), sep="/") if "weights" in work else {}
    trained = {name: x for name, x in flat.items() if re.search(r"_lora_[ab]$|^classifier/", name)}
    assert sum(x.size for name, x in trained.items() if "_lora_" in name) == shapes.trained(work)
    frozen = {name: x for name, x in flat.items() if name not in trained}
    tx = optax.adamw(shapes.RATE)

    def one(trained: Any, state: Any, frozen: Any, batch: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            params = traverse_util.unflatten_dict(trained | frozen, sep="/")
            options = {"labelled": batch["labelled"]} if "labelled" in batch else {}
            return loss_of(adapted.apply({"params": params}, batch["tokens"], **options), batch)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    one = jax.jit(one, donate_argnums=(0, 1))
    state = tx.init(trained)

    def loss() -> float:
        nonlocal trained, state
        trained, state, value = one(trained, state, frozen, batch)
        return value.item()

    return ours.parts_of(loss, work)


def nnx_step(work: dict[str, Any]) -> ours.Parts:
    model, batch = Transformer(work, nnx.Rngs(0)), ours.batch_of(work)
    if "weights" in work:
        model.load(ours.params_of(ours.model_of(work), work))
    trains = nnx.All(nnx.Param, nnx.Any(nnx.LoRAParam, nnx.PathContains("classifier")))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == shapes.trained(work)
    optimizer = nnx.Optimizer(model, optax.adamw(shapes.RATE), wrt=trains)

    @nnx.jit
    def one(model: Any, optimizer: Any, batch: Any) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            return loss_of(model(batch["tokens"], batch.get("labelled")), batch)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trains))(model)
        optimizer.update(model, grads)
        return value

    return ours.parts_of(lambda: one(model, optimizer, batch).item(), work)


class Transformer(nnx.Module):
    """A GPT-2, a RoBERTa or a Llama without dropout, its linear layers with or without LoRA."""

    def __init__(self, work: dict[str, Any], rngs: nnx.Rngs):
        shape = shapes.MODELS[work["model"]]
        self.kind, width = shape["kind"], shape["width"]
        self.wte = nnx.Embed(shape["vocab"], width, rngs=rngs)
        self.wpe = nnx.Embed(1024, width, rngs=rngs) if self.kind != "llama" else None
        self.norm = norm_of(shape, rngs)
        self.blocks = nnx.List([Block(work, rngs) for _ in range(shape["layers"])])
        if self.kind == "roberta":
            self.classifier = nnx.List([nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, 2, rngs=rngs)])

    def __call__(self, tokens: jax.Array, labelled: jax.Array | None) -> jax.Array:
        x = self.wte(tokens)
        x = x if self.wpe is None else x + self.wpe(jnp.arange(tokens.shape[1]))[None]
        x = self.norm(x) if self.kind == "roberta" else x
        for block in self.blocks:
            x = block(x)
        if labelled is not None:
            return self.wte.attend(self.norm(jnp.take_along_axis(x, labelled[:, :, None], 1)))
        dense, out = self.classifier
        return out(jnp.tanh(dense(x[:, 0])))

    def load(self, params: Any) -> None:
        """Sets a Llama's weights."""
        self.wte.embedding[...], self.norm.scale[...] = params["wte"]["embedding"], params["ln_f"]["scale"]
        for number, block in enumerate(self.blocks):
            layer = params[f"h_{number}"]
            for norm, name in zip(block.norms, ("ln_1", "ln_2"), strict=True):
                norm.scale[...] = layer[name]["scale"]
            for name, dense in (layer["attn"] | layer["mlp"]).items():
                getattr(block, name).kernel[...] = dense["kernel"]


def norm_of(shape: dict[str, Any], rngs: nnx.Rngs) -> Any:
    norm = nnx.RMSNorm if shape["kind"] == "llama" else nnx.LayerNorm
    return norm(shape["width"], epsilon=1e-5, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, work: dict[str, Any], rngs: nnx.Rngs):
        shape = shapes.MODELS[work["model"]]
        self.kind, width = shape["kind"], shape["width"]
        self.size, inner = width // shape["heads"], shape.get("inner", 4 * width)
        thin = self.size * shape.get("key_heads", shape["heads"])

        def linear(name: str, into: int, out: int) -> nnx.Module:
            how = {"use_bias": self.kind != "llama", "rngs": rngs}
            if work["targets"] == "all" or name in ("query", "value"):
                return nnx.LoRALinear(into, out, lora_rank=shapes.RANK, **how)
            return nnx.Linear(into, out, **how)

        self.query, self.out = linear("query", width, width), linear("out", width, width)
        self.key, self.value = linear("key", width, thin), linear("value", width, thin)
        self.up, self.down = linear("up", width, inner), linear("down", inner, width)
        self.gate = linear("gate", width, inner) if self.kind == "llama" else None
        self.norms = nnx.List([norm_of(shape, rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = self.norms
        if self.kind != "roberta":
            x = x + self.attend(first(x))
            return x + self.mlp(second(x))
        x = first(x + self.attend(x))
        return second(x + self.mlp(x))

    def attend(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            layer(x).reshape(*x.shape[:2], -1, self.size) for layer in (self.query, self.key, self.value)
        )
        if self.kind == "llama":
            query, key = rotated(query), rotated(key)
        out = jax.nn.dot_product_attention(query, key, value, is_causal=self.kind != "roberta")
        return self.out(out.reshape(x.shape))

    def mlp(self, x: jax.Array) -> jax.Array:
        if self.gate is None:
            return self.down(jax.nn.gelu(self.up(x), approximate=self.kind == "gpt2"))
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rotated(x: jax.Array) -> jax.Array:
    """Rotary embeddings as SmolLM2's, for (batch, length, heads, size)."""
    half = x.shape[-1] // 2
    phases = jnp.arange(x.shape[1])[:, None, None] / 1e5 ** (jnp.arange(half) / half)[None, None]
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(phases)[None], jnp.sin(phases)[None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
