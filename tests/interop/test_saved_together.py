"""Every saving path, broken off at every one of its operations: the old files, the new ones, or an error."""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models

import lora_jax as lj
from lora_jax import checkpoints, training
from lora_jax.interop import hf, peft
from lora_jax.models import gpt2, shapes
from lora_jax.runs import tables
from lora_jax.training.logging import JsonLines
from tests.helpers.faults import every_failure

MODEL = gpt2.GPT2(gpt2.GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2, eos_token_id=0))
DEEPER = gpt2.GPT2(gpt2.GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=2, n_head=4, eos_token_id=0))
ONE, FEW, FEWER = 10**9, 2_500, 6_000  # bytes of a file of weights


@functools.cache
def filled(model: gpt2.GPT2, value: float) -> Any:
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), shapes)


PARAMS = filled(MODEL, 1)
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
    return method, jax.tree.map(lambda x: np.full(x.shape, value, np.float32), jax.eval_shape(method.init, KEY, PARAMS))


KEY = jax.random.key(0)


def load_peft(folder: Path) -> float:
    method, delta = peft.load(folder, PARAMS)
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
    "peft": both(lambda folder, value: peft.save(folder, *adapter(value), params=PARAMS), load_peft, together=True),
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
    "config": both(
        lambda folder, value: training.claim(folder, ConfigDict({"seed": value})),
        lambda folder: json.loads((folder / "config.json").read_text())["seed"],
    ),
    "metrics": both(save_metrics, load_metrics),
}


@pytest.fixture(autouse=True, scope="module")
def shapes_are_traced_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "of_params", functools.cache(shapes.of_params))
        yield


def of_others(path: SavingPath, folder: Path) -> float | None:
    """What readers find that know nothing of saves that were broken off; None where they find no config."""
    visible = folder.with_name(f"{folder.name}-visible")
    shutil.copytree(folder, visible, ignore=shutil.ignore_patterns(".saving*"))
    with contextlib.suppress(FileNotFoundError):
        return path.load(visible)
    assert path.together
    return None


SLOW = [name for name in PATHS if name.startswith("hf, shards")]


@pytest.mark.parametrize(
    ("name", "killed"),
    [
        pytest.param(name, killed, marks=[pytest.mark.slow] if name in SLOW or (not killed and "hf" in name) else [])
        for killed in (True, False)
        for name in PATHS
    ],
)
def test_broken_off_at_every_operation(name: str, killed: bool, tmp_path: Path) -> None:
    path, seen = PATHS[name], []
    (tmp_path / "old").mkdir()
    path.old(tmp_path / "old")
    for n, folder, error in every_failure(tmp_path / "old", path.new, killed=killed):
        assert of_others(path, folder) in (OLD, NEW, None), (n, error)
        value = path.load(folder)
        assert value in (OLD, NEW), (n, error)
        if error is None:
            assert value == NEW
        else:
            seen.append(value)
            path.new(folder)  # goes well after any failure
            assert path.load(folder) == NEW and not list(folder.glob(".saving*")), n
    assert len(seen) > 3 and seen == sorted(seen) and OLD in seen
    assert NEW in seen or not path.together
