"""Is rank 1 enough for reinforcement learning? ("LoRA Without Regret", 2025; TinyLoRA, arXiv 2602.04118.)

    python -m experiments.study --config=configs/studies.py:rl --workdir=runs/studies --out=docs/results/study_rl.json

The sources: trained on rewards, LoRA of rank 1 equals full fine-tuning, and 13 parameters reach 91% of GSM8K, where
supervised training needs 100 to 1000 times as many; in TRL's replication full fine-tuning pulled ahead in the end.
Here: a GPT-2 of 1.8 M parameters that the command makes, which adds two numbers of three digits and is often wrong,
trained on rewards for right answers, and on the answers themselves, of the same number of problems.

GRPO (Shao et al. 2024, arXiv 2402.03300): of each problem `group` answers are drawn at temperature 1, an answer's
advantage is its reward, 1 or 0, less the group's mean, over the group's standard deviation. Each batch is used for one
step, so that the ratio of probabilities is 1 and is never clipped; there is no KL term; the mean is over tokens.
"""

import functools
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict
from tqdm import tqdm

import lora_jax as lj
from experiments.studies.plots import curves
from experiments.studies.random_subspace import random_subspace
from experiments.studies.reading import Row
from lora_jax import checkpoints, training
from lora_jax.data.json_files import read_json
from lora_jax.generation import generate
from lora_jax.metrics.statistics import spread
from lora_jax.models import gpt2
from lora_jax.runs import tables
from lora_jax.training import locks, stopping

# Tokens: 0 is padding, 1 to 10 are the digits.
PLUS, EQUALS, EOS, VOCABULARY = 11, 12, 13, 16
PROMPT, ANSWER = 8, 5  # tokens: "123+456=" and at most four digits with the end
HELD_OUT = 1_024  # problems to choose the rate by, and as many for the test
WAYS = ("rewards", "answers")


class Cell(NamedTuple):
    """One run."""

    way: str
    method: str
    rate: float
    seed: int

    def folder(self, workdir: Path) -> Path:
        return workdir / self.way / self.method / f"rate_{self.rate:g}" / f"seed_{self.seed}"


@functools.cache
def problems(seed: int) -> dict[str, np.ndarray]:
    """All pairs of numbers of three digits, by their index, in an order of their own: train, valid, test."""
    order = np.random.default_rng(seed).permutation(900 * 900).astype(np.int32)
    return {"valid": order[:HELD_OUT], "test": order[HELD_OUT : 2 * HELD_OUT], "train": order[2 * HELD_OUT :]}


def written(index: Array) -> tuple[Array, Array]:
    """Problems as tokens: prompts (b, 8), and their answers (b, 5) with padding behind the end."""
    first, second = 100 + index // 900, 100 + index % 900

    def digits(x: Array, count: int) -> Array:
        return x[:, None] // 10 ** jnp.arange(count)[None, ::-1] % 10 + 1

    plus, equals, end = (jnp.full((len(index), 1), token) for token in (PLUS, EQUALS, EOS))
    prompts = jnp.concatenate([digits(first, 3), plus, digits(second, 3), equals], 1)
    total = first + second
    short = jnp.concatenate([digits(total, 3), end, 0 * end], 1)
    return prompts, jnp.where(total[:, None] < 1000, short, jnp.concatenate([digits(total, 4), end], 1))


def draw(model: Any, params: Any, prompts: Array, key: Array | None) -> Array:
    """Answers (b, 5): drawn at temperature 1, or without a key the likeliest."""
    mask, heat = jnp.ones(prompts.shape, bool), None if key is None else 1.0
    return generate(model, params, prompts, mask, max_new_tokens=ANSWER, eos=EOS, temperature=heat, key=key)


def batch_of(prompts: Array, answers: Array, weights: Array) -> dict[str, Array]:
    """A batch of one micro-batch; `weights` (b,) are of the answers."""
    ends = (answers == EOS).astype(jnp.int32)
    ended = jnp.cumsum(ends, axis=1) - ends > 0
    labelled = jnp.broadcast_to(PROMPT - 1 + jnp.arange(ANSWER)[None], answers.shape)
    batch = {"tokens": jnp.concatenate([prompts, answers], 1), "labelled": labelled, "labels": answers}
    batch["mask"] = jnp.concatenate([jnp.ones(prompts.shape, bool), ~ended], 1)
    batch |= {"weights": jnp.where(ended, 0, weights[:, None]), "count": jnp.sum(~ended, dtype=jnp.float32)}
    return {name: x[None] for name, x in batch.items()}


def advantages(rewards: Array) -> Array:
    """Those of each group, (problems, group)."""
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)


def objective(model: Any) -> training.Objective:
    """Minus the sum of weight times log-probability, over all tokens of the answers: weights may be negative."""
    supervised = training.language_model(model)

    def loss(params: Any, batch: dict[str, Array], key: Array | None = None) -> tuple[Array, Array]:
        return supervised.loss(params, batch)[0], batch["count"]

    return supervised._replace(loss=loss)


def optimizer(rate: Any) -> optax.GradientTransformation:
    """Adam of gradients of norm 1 at most, after ten steps of warm-up at a constant rate."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda step: rate * jnp.minimum(1, (step + 1) / 10)))


@functools.partial(jax.jit, static_argnames=("model", "name", "way", "size", "group", "steps"), donate_argnums=0)
def some_steps(
    state: training.State, params: Any, rate: Array, train: Array, *, model: Any, name: str, way: str,
    size: int, group: int, steps: int,
) -> tuple[training.State, Array]:  # fmt: skip
    """So many steps of the method of that name on `size` problems each, and the share of right ones of the answers."""
    method = method_of(name)
    step = training.make_step(objective(model), method, optimizer(rate), lambda _: rate)

    def one(state: training.State, _: None) -> tuple[training.State, Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        for_problems, for_answers = jax.random.split(jax.random.fold_in(key, 1))
        prompts, answers = written(train[jax.random.randint(for_problems, (size,), 0, len(train))])
        if way == "answers":
            return step(state, params, batch_of(prompts, answers, jnp.ones(size))), jnp.float32(1)
        prompts, answers = jnp.repeat(prompts, group, axis=0), jnp.repeat(answers, group, axis=0)
        drawn = draw(model, method.apply(params, state.delta), prompts, for_answers)
        rewards = jnp.all(drawn == answers, axis=1).astype(jnp.float32)
        weights = advantages(rewards.reshape(size, group)).reshape(-1)
        return step(state, params, batch_of(prompts, drawn, weights)), rewards.mean()

    return jax.lax.scan(one, state, None, length=steps)


def accuracy(model: Any, params: Any, index: np.ndarray) -> float:
    """The share of problems whose likeliest answer is right."""
    prompts, answers = written(jnp.asarray(index))
    return float(jnp.mean(jnp.all(draw(model, params, prompts, None) == answers, axis=1)))


def method_of(name: str) -> lj.ParamTransform:
    """`full`, `LoRA, r = 1` or `subspace, d = 10`: of all matrices, `full` of all parameters."""
    kernels = lj.select("**/{attn,mlp}/*/kernel", axes=gpt2.AXES)
    kind, _, size = name.partition(", ")
    number = int(size.rpartition(" ")[2] or 0)
    if kind == "LoRA":
        return lj.lora(kernels, rank=number, alpha=32.0)
    return random_subspace(kernels, dimension=number) if kind == "subspace" else lj.tune(lj.select("**"))


def base_of(config: ConfigDict, workdir: Path) -> tuple[gpt2.GPT2, Any]:
    """The model, and its parameters after `base_steps` on answers; made where it is not there."""
    shape = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
    model = gpt2.GPT2(
        gpt2.GPT2Config(vocab_size=VOCABULARY, n_positions=16, eos_token_id=EOS, scan_layers=True, **shape)
    )
    start = jax.jit(model.init)(jax.random.key(config.seed), jnp.ones((1, PROMPT), jnp.int32))["params"]
    method, file = method_of("full"), workdir / "base.safetensors"
    if not file.exists():
        stopping.check(workdir)
        state = training.new_state(method, optimizer(0.0), start, jax.random.key(config.seed))
        options = {"way": "answers", "size": config.base_batch, "group": 1, "steps": 100}
        train = jnp.asarray(problems(config.seed)["train"])
        for _ in tqdm(range(config.base_steps // 100), "base", unit="step", unit_scale=100):
            state, _ = some_steps(state, start, config.base_rate, train, model=model, name="full", **options)
        checkpoints.save_adapter(file, method, state.delta, checkpoints.identity(start, "a random start"))
    method, delta, _ = checkpoints.load_adapter(file)
    return model, lj.merge(method.apply(start, delta))


def train_cell(config: ConfigDict, cell: Cell, model: Any, params: Any) -> dict[str, Any]:
    """One run: its row."""
    method, index = method_of(cell.method), problems(config.seed)
    key, train = jax.random.key(cell.seed), jnp.asarray(index["train"])
    state, curve = training.new_state(method, optimizer(0.0), params, key), []
    options = {"way": cell.way, "size": config.problems, "group": config.group, "steps": config.every}
    for _ in range(config.steps // config.every):
        state, right = some_steps(state, params, cell.rate, train, model=model, name=cell.method, **options)
        adapted = method.apply(params, state.delta)
        curve.append({"valid": accuracy(model, adapted, index["valid"]), "drawn": float(right.mean())})
    return {
        **cell._asdict(),
        "trained": lj.check(method, params).trained,
        "valid": curve[-1]["valid"],
        "test": accuracy(model, adapted, index["test"]),
        "curve": curve,
    }


def cells(config: ConfigDict) -> Iterator[Cell]:
    """All runs."""
    for name, rates in config.rates.items():
        for way in WAYS:
            yield from (Cell(way, name, rate, seed) for rate in rates for seed in config.seeds)


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Writes what all runs have in common; a ValueError where the folder has other runs."""
    common = {name: value for name, value in config.items() if name not in ("rates", "seeds")}
    before = read_json(file) if (file := workdir / "config.json").is_file() else common
    if different := sorted(name for name in common if before.get(name) != common[name]):
        values = "; ".join(f"{name} is {before.get(name)} there and {common[name]} here" for name in different)
        problem = f"{workdir} holds runs of another config: {values}"
        raise ValueError(f"{problem}. Give another --workdir, or the config it began with")
    tables.write_json(file, common)


class Done(NamedTuple):
    """The base's accuracy on the problems for validation and for the test, and what each run left."""

    before: dict[str, float]
    results: list[dict[str, Any]]


def train(config: ConfigDict, folder: Path) -> Done:
    """Trains the base and the runs, those that are not done; an InterruptedError where it is stopped."""
    with locks.locked(folder):
        _claim(folder, config)
        model, params = base_of(config, folder)
        index, todo = problems(config.seed), list(cells(config))
        before = {split: accuracy(model, params, index[split]) for split in ("valid", "test")}
        print(f"the base is right for {before['test']:.1%} of the test's problems; {len(todo)} runs")
        results = []
        for cell in tqdm(todo, "runs", unit="run"):
            file = cell.folder(folder) / "summary.json"
            if not file.is_file():
                stopping.check(folder)
                tables.write_json(file, train_cell(config, cell, model, params))
            results.append(read_json(file))
    return Done(before, results)


def best_of(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """For each method and way the runs, a seed each, of the rate that is best on the problems for validation."""
    by_name: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for result in results:
        by_name.setdefault((result["method"], result["way"]), {}).setdefault(result["rate"], []).append(result)
    return {
        name: max(by_rate.values(), key=lambda runs: statistics.median(run["valid"] for run in runs))
        for name, by_rate in by_name.items()
    }


def rows(config: ConfigDict, done: Done) -> list[Row]:
    """A row for the base, and for each method and way at its best rate; accuracies are of the test."""
    made: list[Row] = [{"label": "the base", "trained": 0, "accuracy": done.before["test"]}]
    for (method, way), runs in best_of(done.results).items():
        made.append(
            {
                "label": f"{method}, from {way}",
                "trained": runs[0]["trained"],
                "rate": runs[0]["rate"],
                "accuracy": spread([run["test"] for run in runs]),
                "seed": [run["seed"] for run in runs],
                "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
                "jax": jax.__version__,
            }
        )
    return made


def plot(config: ConfigDict, done: Done, rows: Sequence[Row], file: Path) -> None:
    """The accuracy on the problems for validation over the steps, a line for each method, a diagram for each way."""
    panels: dict[str, dict[str, Any]] = {f"from {way}": {} for way in WAYS}
    steps = [count * config.every for count in range(config.steps // config.every + 1)]
    for (method, way), runs in best_of(done.results).items():
        mean = np.mean([[point["valid"] for point in run["curve"]] for run in runs], axis=0)
        panels[f"from {way}"][method] = steps, [done.before["valid"], *mean.tolist()]
    curves(file, panels, x="steps", y="right answers", log=False, marker="-")
