"""The paths that save files: what writes old files and new ones of each, and what the files hold."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models

import lora_jax as lj
from configs import e2e
from lora_jax import checkpoints, runs, training
from lora_jax.interop import hf, peft
from lora_jax.models import gpt2
from lora_jax.runs import bases, methods, tables
from lora_jax.training.logging import JsonLines
from tests.helpers.cli import make_inputs

MODEL = gpt2.GPT2(gpt2.GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2, eos_token_id=0))
DEEPER = gpt2.GPT2(gpt2.GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=2, n_head=4, eos_token_id=0))
ONE, FEW, FEWER = 10**9, 2_500, 6_000  # bytes of a file of weights


@functools.cache
def filled(model: gpt2.GPT2, value: float) -> Any:
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), shapes)


BASE = {"source": "ones", "shapes": "0", "content": "0"}
OLD, NEW = 1.0, 2.0


def tokenizer(value: float) -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, f"b{value:g}": 1}, unk_token="a"))


def save_model(folder: Path, value: float, size: int, words: bool = True) -> None:
    model = MODEL if value == OLD else DEEPER
    hf.save(folder, model, filled(model, value), tokenizer(value) if words else None, shard_size=size)


def load_model(folder: Path) -> Any:
    """The value of which all is; an AssertionError where some of it is of another one."""
    model, params, words = hf.load(folder)
    (value,) = {number for leaf in jax.tree.leaves(params) for number in np.unique(leaf).tolist()}
    assert model.config == (MODEL if value == OLD else DEEPER).config
    assert words is None or words.token_to_id(f"b{value:g}") == 1
    return value


def adapter(value: float) -> tuple[lj.ParamTransform, lj.Delta]:
    rank = int(2 * value)
    method = lj.lora(lj.select("**/attn/out/kernel"), rank=rank, alpha=8 * value)
    shapes = jax.eval_shape(method.init, jax.random.key(0), filled(MODEL, 1))
    return method, jax.tree.map(lambda x: np.full(x.shape, value, np.float32), shapes)


def save_peft(folder: Path, value: float) -> None:
    peft.save(folder, *adapter(value), params=filled(MODEL, 1))


def load_peft(folder: Path) -> float:
    method, delta = peft.load(folder, filled(MODEL, 1))
    return adapter_value(method, delta)


def adapter_value(method: lj.ParamTransform, delta: lj.Delta) -> float:
    (value,) = {number for leaf in jax.tree.leaves(delta) for number in np.unique(leaf).tolist()}
    assert method.spec["alpha"] == 8 * value and {f["a"].shape[-1] for f in delta.values()} == {int(2 * value)}
    return value


def save_evaluation(folder: Path, value: float) -> None:
    """As `runs.evaluate` does it."""
    with checkpoints.replaced_together(folder, last="evaluate.json") as new:
        (new / "predictions.jsonl").write_text(str(value))
        tables.write_json(new / "evaluate.json", value)


def load_evaluation(folder: Path) -> float:
    checkpoints.finish_replacing(folder)
    value = json.loads((folder / "evaluate.json").read_text())
    assert float((folder / "predictions.jsonl").read_text()) == value
    return value


def save_metrics(folder: Path, value: float) -> None:
    """A run that resumes: what came after its checkpoint is dropped, one entry is new."""
    with contextlib.closing(JsonLines(folder, step=1)) as log:
        log.write(int(value), {"loss": value})


def load_metrics(folder: Path) -> float:
    entries = training.read_metrics(folder)
    assert [entry["loss"] for entry in entries] == [OLD, NEW][: len(entries)]
    return entries[-1]["loss"]


class SavingPath(NamedTuple):
    """Writes the old files into a folder, the new ones; and what the files there hold."""

    old: Callable[[Path], Any]
    new: Callable[[Path], Any]
    load: Callable[[Path], float]
    together: bool = False  # whether it is of several files


def both(save: Callable[..., Any], load: Callable[[Path], float], *sizes: Any, together: bool = False) -> SavingPath:
    before, after = sizes or ((), ())
    return SavingPath(
        lambda folder: save(folder, OLD, *before), lambda folder: save(folder, NEW, *after), load, together
    )


PATHS = {
    "peft": both(save_peft, load_peft, together=True),
    "native": both(
        lambda folder, value: checkpoints.save_adapter(folder, *adapter(value), BASE),
        lambda folder: adapter_value(*checkpoints.load_adapter(folder)[:2]),
    ),
    "hf": both(save_model, load_model, (ONE,), (ONE,), together=True),
    "hf, shards by shards": both(save_model, load_model, (FEW,), (FEWER,), together=True),
    "hf, shards by one": both(save_model, load_model, (FEW,), (ONE,), together=True),
    "hf, one by shards": both(save_model, load_model, (ONE,), (FEW,), together=True),
    "evaluation": both(save_evaluation, load_evaluation, together=True),
    "json": both(
        lambda folder, value: tables.write_json(folder / "summary.json", value),
        lambda folder: json.loads((folder / "summary.json").read_text()),
    ),
    "metrics": both(save_metrics, load_metrics),
}


def make_runs(root: Path) -> None:
    """Workdirs of two runs on one base, `root/run_1` and `root/run_2`, and what their exports look like."""
    make_inputs(root, layers=1)
    for value in (OLD, NEW):
        config = e2e.get_config("small")
        config.base, config.data.path, config.lora.rank = str(root / "base"), str(root / "data"), int(2 * value)
        base = bases.load(config)
        method = lj.from_spec(methods.spec(config, base.model))
        shapes = jax.eval_shape(method.init, jax.random.key(0), base.params)
        delta = jax.tree.map(lambda x, value=value: jnp.full(x.shape, value), shapes)
        workdir = root / f"run_{value:g}"
        save_checkpoint(workdir, value, config, delta, method.spec, base.identity)
        for form in FORMS:
            runs.export_run(workdir, form, root / f"{form}_{value:g}")


def save_checkpoint(workdir: Path, value: float, config: Any, delta: Any, spec: Any, base: Any) -> None:
    training.claim(workdir, config)
    state = training.State(jnp.array(int(value)), delta, (), jnp.zeros(2, jnp.uint32), jnp.zeros(7))
    with checkpoints.manager(workdir, keep=1) as manager:
        checkpoints.save(manager, int(value), state, spec=spec, base=base)


def save_small_checkpoint(folder: Path, value: float) -> None:
    _, delta = adapter(OLD)
    delta = jax.tree.map(lambda x: jnp.full(x.shape, value), delta)
    save_checkpoint(folder, value, ConfigDict({"seed": 0}), delta, adapter(OLD)[0].spec, BASE)


def load_checkpoint(folder: Path) -> float:
    run = checkpoints.load(folder)
    (value,) = {number for leaf in jax.tree.leaves(run.delta) for number in np.unique(leaf).tolist()}
    assert run.step == value
    return value


FORMS: tuple[Any, ...] = ("merged", "peft", "native")


def paths_of_runs(root: Path) -> dict[str, SavingPath]:
    """The exports of the runs of `make_runs`, bit for bit; and checkpoints, of which the newest stays."""

    def contents(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}

    def load(folder: Path, form: str) -> float:
        checkpoints.finish_replacing(folder)
        (value,) = [v for v in (OLD, NEW) if contents(folder) == contents(root / f"{form}_{v:g}")]
        return value

    def export(folder: Path, value: float, form: Any) -> None:
        runs.export_run(root / f"run_{value:g}", form, folder)

    return {
        "config": both(
            lambda folder, value: training.claim(folder, ConfigDict({"seed": value})),
            lambda folder: json.loads((folder / "config.json").read_text())["seed"],
        ),
        "checkpoint": both(save_small_checkpoint, load_checkpoint),
        **{
            f"export, {form}": both(
                functools.partial(export, form=form), functools.partial(load, form=form), together=form != "native"
            )
            for form in FORMS
        },
    }
