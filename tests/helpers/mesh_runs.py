"""Small runs of several methods on both models, for any mesh and any number of processes."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import checkpoints, training
from lora_jax.data.batches import Schedule, bucketed, classified
from lora_jax.data.pairs import Encoded
from lora_jax.data.sentences import Texts
from lora_jax.distributed.sharding import Placement, make_mesh, on_mesh
from lora_jax.models import encoder, gpt2
from tests.helpers.runs import run_config

VOCAB, PREFIX, ROWS = 64, 2, 8
MODELS = {
    "gpt2": gpt2.GPT2(gpt2.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=4)),
    "encoder": encoder.Encoder(
        encoder.EncoderConfig(
            "bert", VOCAB, 32, 16, 1, 4, 32, token_types=2, pad_id=0, head="classification", pooler=True
        )
    ),
}
METHODS = ("lora", "tune", "adapter", "prefix_embedding", "prefix_layer")
CASES = [f"{model}/{method}" for model in MODELS for method in METHODS]
QUICK = "encoder/lora"  # of the tests that are not slow


@functools.cache
def base_of(name: str) -> Any:
    model, tokens = MODELS[name], jnp.zeros((1, 4), jnp.int32)
    return jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(5), tokens)["params"])


def method_of(case: str) -> lj.ParamTransform:
    name, _, kind = case.partition("/")
    model, family = MODELS[name], {"gpt2": gpt2, "encoder": encoder}[name]
    sites = family.sites(model.config)
    methods: dict[str, Callable[[], lj.ParamTransform]] = {
        "lora": lambda: lj.lora(lj.select("**/attn/{query,value}/kernel"), rank=2, alpha=8, dropout=0.1),
        "tune": lambda: lj.tune(lj.select("**")),
        "adapter": lambda: lj.adapter({name: sites[name] for name in ("attention_out", "mlp_out")}, rank=2),
        "prefix_embedding": lambda: lj.prefix_embedding(
            lj.select("wte/embedding" if name == "gpt2" else "**/word/embedding"), prefix=PREFIX
        ),
        "prefix_layer": lambda: lj.prefix_layer({"block_out": sites["block_out"]}, vocabulary=VOCAB, prefix=PREFIX),
    }
    return methods[kind]()


def schedule_of(case: str, seed: int, count: int = 2 * ROWS) -> Schedule:
    """Random examples, with the tokens of a prefix where the method has one."""
    name, _, kind = case.partition("/")
    random = np.random.default_rng(seed)
    prefix = list(range(VOCAB, VOCAB + PREFIX)) if kind.startswith("prefix") else []
    sizes = random.integers(8, 15, count)
    rows = [random.integers(2, VOCAB, size).tolist() for size in sizes]
    rows = [row[:1] + prefix + row[1:] if name == "encoder" else prefix + row for row in rows]
    tokens = np.array([token for row in rows for token in row], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    if name == "gpt2":
        return bucketed(Encoded(tokens, offsets, len(prefix) + random.integers(2, 5, count)), ROWS, seed, buckets=1)
    labels = random.integers(0, 2, count).astype(np.int32)
    return classified(Texts(tokens, np.zeros_like(tokens), offsets, labels), ROWS, seed, buckets=1)


def prepare(case: str, workdir: Path, sizes: dict[str, int], **options: Any) -> training.Job:
    """A run of two epochs of two batches, on a mesh of these sizes."""
    name = case.partition("/")[0]
    mesh, params = make_mesh(sizes), base_of(name)
    model = on_mesh(MODELS[name], mesh)
    if name == "encoder":
        options.setdefault("objective", training.classifier(model, metrics))
    config = run_config(**({"log_every": 1, "optimizer.warmup_steps": 1} | options.pop("changes", {})))
    if name == "encoder":
        config.best = "right"
    return training.prepare(
        config,
        workdir,
        method=method_of(case),
        model=model,
        params=params,
        base=checkpoints.identity(params, "tiny"),
        batches=options.pop("batches", schedule_of(case, 0)),
        validation=schedule_of(case, 1),
        placement=Placement.of(model, mesh),
        **options,
    )


def metrics(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    assert len(outputs) == len(labels) == 2 * ROWS
    gold = np.take_along_axis(outputs, labels[:, None].astype(int), 1)
    return {"right": float((outputs.argmax(-1) == labels).mean()), "gold": float(gold.mean())}


def figures(workdir: Path) -> list[float]:
    """Losses of training and validation, and metrics, in order."""
    names = ("loss", "validation_loss", "gold")
    return [entry[name] for entry in training.read_metrics(workdir) for name in names if name in entry]
