"""Our side of training steps and of what an adapter is after training."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from configs import e2e
from experiments.benchmark import shapes
from lora_jax import checkpoints, training
from lora_jax.interop import hf
from lora_jax.models import encoder, gpt2
from lora_jax.models.family import family_of
from lora_jax.runs import methods

Parts = dict[str, Callable[[], float | None]]
TARGETS = {"qv": "**/attn/{query,value}/kernel", "all": "h*/**/kernel"}


def model_of(work: dict[str, Any]) -> Any:
    """The model of a work's shape; a Llama's is that of its weights' folder."""
    shape, dtype = shapes.MODELS[work["model"]], work.get("dtype", "float32")
    vocab, width, layers, heads = (shape[name] for name in ("vocab", "width", "layers", "heads"))
    if shape["kind"] == "llama":
        model = hf.without_weights(work["weights"])
        return model.clone(config=dataclasses.replace(model.config, scan_layers=work.get("scan", False)))
    if shape["kind"] == "gpt2":
        sizes = {"vocab_size": vocab, "n_embd": width, "n_layer": layers, "n_head": heads}
        return gpt2.GPT2(gpt2.GPT2Config(**sizes, dtype=dtype))
    sizes = {"vocab_size": vocab, "hidden": width, "layers": layers, "heads": heads, "inner": 4 * width}
    return encoder.Encoder(encoder.EncoderConfig(**sizes, head="classification", dtype=dtype))


def params_of(model: Any, work: dict[str, Any]) -> Any:
    """Those of the work's folder, or random ones, in the dtype that the model computes in."""
    if "weights" in work:
        return hf.load(work["weights"], scan_layers=work.get("scan", False))[1]
    return random(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"], work)


def random(tree: Any, work: dict[str, Any]) -> Any:
    """Weights of these shapes, one after the other: a program that makes them all holds them twice."""
    numbers = np.random.default_rng(0)

    def leaf(x: Any) -> jax.Array:
        filled = numbers.standard_normal(x.shape, np.float32) * 0.02 if x.ndim > 1 else np.ones(x.shape, np.float32)
        return jnp.asarray(filled, work.get("dtype", "float32"))

    return jax.tree.map(leaf, tree)


def lora_of(model: Any, work: dict[str, Any]) -> lj.ParamTransform:
    """LoRA on the work's targets; a new head trains too."""
    selection = lj.select(TARGETS[work["targets"]], axes=family_of(model).axes)
    lora = lj.lora(selection, rank=shapes.RANK, alpha=shapes.ALPHA, dropout=work.get("dropout", 0.0))
    has_head = shapes.MODELS[work["model"]]["kind"] == "roberta"
    return lj.chain(lora, lj.tune(lj.select("classifier/**"))) if has_head else lora


def batch_of(work: dict[str, Any]) -> dict[str, Any]:
    """The batch of a training step: tokens are labelled, or each text."""
    tokens = shapes.texts(work).astype(np.int32)
    batch: dict[str, Any] = {"tokens": tokens[:, :-1], "mask": np.ones((work["batch"], work["length"]), bool)}
    if shapes.MODELS[work["model"]]["kind"] != "roberta":
        places = np.tile(np.asarray(shapes.labelled(work), np.int32), (work["batch"], 1))
        labels = np.take_along_axis(tokens, places + 1, 1)
        return batch | {"labelled": places, "labels": labels, "weights": np.ones(places.shape, np.float32)}
    labels = tokens[:, -1] % 2
    return batch | {"token_types": 0 * batch["tokens"], "labels": labels, "weights": np.ones(len(labels), np.float32)}


def step(work: dict[str, Any]) -> Parts:
    """A training step as `experiments.train` makes it."""
    model = model_of(work)
    params, method = params_of(model, work), lora_of(model, work)
    options = e2e.get_config("small").optimizer
    options.update(learning_rate=shapes.RATE, schedule="constant", warmup_steps=0)
    is_encoder = shapes.MODELS[work["model"]]["kind"] == "roberta"
    objective = training.classifier(model) if is_encoder else training.language_model(model)
    delta = jax.eval_shape(method.init, jax.random.key(0), params)
    factors = jax.tree.leaves({path: factors for path, factors in delta.items() if "a" in factors})
    assert sum(x.size for x in factors) == shapes.trained(work)
    one, batch = trainer(objective, method, params, options), batch_of(work)

    def loss() -> float:
        metrics = dict(zip(training.METRICS, one(batch).metrics.tolist(), strict=True))
        return metrics["loss"] / metrics["labels"]

    return parts_of(loss, work)


def parts_of(one: Callable[[], float], work: dict[str, Any]) -> Parts:
    """The parts of a training step that gives its loss."""

    def unit() -> None:
        one()

    return {"unit": unit, "floor": lambda: floor(work), "loss": one}


def trainer(
    objective: training.Objective, method: lj.ParamTransform, params: Any, options: Any
) -> Callable[[dict[str, Any]], training.State]:
    """`step(batch) -> state` from a new state on, with a config's optimizer; it does not wait."""
    rate = training.schedule(options, 10**5)
    tx = training.optimizer(options, rate, spec=method.spec)
    state = jax.jit(lambda params: training.new_state(method, tx, params, jax.random.key(0)))(params)
    base = lj.without_tuned(params, state.delta)
    one = jax.jit(training.make_step(objective, method, tx, rate), donate_argnums=0)

    def step(batch: dict[str, Any]) -> training.State:
        nonlocal state
        state = one(state, base, {name: x[None] for name, x in batch.items()})
        return state

    return step


def floor(work: dict[str, Any]) -> float:
    """Seconds of the work's products alone."""
    total = 0.0
    product = jax.jit(jnp.matmul)
    for (m, k, n), count in shapes.products(work).items():
        x, w = (jnp.ones(shape, work.get("dtype", "float32")) for shape in ((m, k), (k, n)))
        product(x, w).block_until_ready()
        begin = time.perf_counter()
        product(x, w).block_until_ready()
        total += count * (time.perf_counter() - begin)
    return total


def scoring(work: dict[str, Any]) -> Parts:
    """The loss of a batch whose rows have adapters of their own, by turns; and with one adapter for all."""
    model = model_of(work)
    params = params_of(model, work)
    lora = lora_of(model, work)
    bank = lj.bank([lora] * work["adapters"])
    objective, batch = training.language_model(model), jax.device_put(batch_of(work))
    ids = jnp.arange(work["batch"]) % work["adapters"]

    def loss(method: lj.ParamTransform) -> Callable:
        def of(params: Any, delta: Any, batch: Any, strength: Any) -> jax.Array:
            adapted = method.apply(params, delta, strength=strength)
            return objective.loss(adapted, batch)[0]

        return jax.jit(of)

    mixed, single = loss(bank), loss(lora)
    deltas = methods.filled(bank, params), methods.filled(lora, params)

    def unit() -> None:
        mixed(params, deltas[0], batch, ids).block_until_ready()

    def one() -> None:
        single(params, deltas[1], batch, 1.0).block_until_ready()

    return {"unit": unit, "single": one}


def switching(work: dict[str, Any]) -> Parts:
    """Loading an adapter's file, merging it, taking it out again, and going over to another one for a forward."""
    model = model_of(work)
    params, method = params_of(model, work), lora_of(model, work)
    folder = tempfile.TemporaryDirectory()  # as long as `load` is there
    deltas = [methods.filled(method, params, seed) for seed in range(2)]
    checkpoints.save_adapter(Path(folder.name), method, deltas[0], checkpoints.identity(params, "random"))
    forward = jax.jit(
        lambda params, delta, tokens: lj.lift(model.apply)({"params": method.apply(params, delta)}, tokens)
    )
    tokens = jnp.asarray(shapes.texts(work)[:, :-1], jnp.int32)
    merged = lj.merge(method.apply(params, deltas[0]))
    for delta in deltas:
        forward(params, delta, tokens).block_until_ready()
    turn = 0

    def load() -> None:
        jax.block_until_ready(jax.device_put(checkpoints.load_adapter(Path(folder.name))[1]))

    def switch() -> None:
        nonlocal turn
        turn = 1 - turn
        forward(params, deltas[turn], tokens).block_until_ready()

    return {
        "load": load,
        "merge": lambda: _done(lj.merge(method.apply(params, deltas[0]))),
        "unmerge": lambda: _done(lj.unmerge(merged, method, deltas[0])),
        "switch": switch,
    }


def _done(tree: Any) -> None:
    jax.block_until_ready(tree)
