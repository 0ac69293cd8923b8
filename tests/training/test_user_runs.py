"""Runs from a script: with parts of the user's own, resumed, reloaded, evaluated."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax as lj
from experiments.ending import with_homes, with_new_names
from lora_jax import checkpoints, runs, training
from lora_jax.models import gpt2
from lora_jax.training.config import RENAMED, TrainConfig, as_config_dict
from tests.helpers import glue_inputs
from tests.helpers.runs import config_of

REVIEWS = """
from pathlib import Path

import datasets
from lora_jax import runs

def load(path, split):
    rows = [line.split("\\t") for line in Path(path, f"{split}.tsv").read_text().splitlines()]
    return datasets.Dataset.from_dict({"first": [row[1] for row in rows], "label": [int(row[0]) for row in rows]})

reviews = runs.classification(load, ("bad", "good"))
"""


class Entries:
    """A logger of the user's own."""

    def __init__(self) -> None:
        self.written: list[dict[str, float]] = []
        self.closed = 0

    def write(self, step: int, entries: Mapping[str, float]) -> None:
        self.written.append({"step": step, **entries})

    def close(self) -> None:
        self.closed += 1


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float((outputs == labels).mean())


@pytest.mark.usefixtures("no_java")
def test_a_run_with_parts_of_the_users_own(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, logger, seen = config_of(inputs, best="accuracy"), Entries(), []
    method = lj.lora(lj.select("**/attn/value/kernel", axes=gpt2.AXES), rank=1)
    given: dict[str, Any] = {"method": method, "metrics": {"accuracy": accuracy}}
    result = runs.train(config, tmp_path / "run", **given, loggers=[logger], started=seen.append)
    assert result.finished and (result.step, result.total) == (4, 4)
    assert {row.path.split("/")[-2] for row in seen[0].report.rows} == {"value"}
    assert logger.closed == 1 and logger.written == training.read_metrics(tmp_path / "run")
    last = logger.written[-1]
    assert last["step"] == 4 and result.summary is not None and result.summary["accuracy"] == last["accuracy"]

    loaded = runs.load(tmp_path / "run")
    assert loaded.method is not None and loaded.method.spec == method.spec and loaded.step == 4
    objective = training.with_metrics(training.language_model(loaded.model), {"accuracy": accuracy})
    valid = runs.task_named("e2e")
    batches = valid.batches(valid.load(inputs / "data", "valid"), config, loaded, loaded.spec)
    expected = training.validate(objective, loaded.params, batches)
    assert last["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-6)
    assert last["accuracy"] == expected["accuracy"]

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")  # stopped after step 2, and resumed
    again = runs.train(config, tmp_path / "run", **given)
    jax.tree.map(np.testing.assert_array_equal, again.delta, result.delta)
    decoding = {"max_new_tokens": 2, "num_beams": 1}
    count = {"count": lambda texts, _: len(texts)}
    scored = runs.evaluate(loaded, split="valid", limit=1, decoding=decoding, metrics=count)
    assert scored.result["scores"]["all"]["count"]["score"] == 1.0
    assert json.loads((scored.folder / "evaluate.json").read_text()) == scored.result
    lines = capsys.readouterr().out.splitlines()  # nothing below the entry points prints but the bar
    assert all(line.startswith("step 4: validation loss ") for line in lines), lines


def test_a_task_and_a_metric_in_a_package_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    glue_inputs.make_inputs(tmp_path / "glue", layers=1)
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("valid", 12)):
        labels = random.integers(0, 2, count)
        lines = [f"{label}\t{glue_inputs.sentence(random, bool(label))}\n" for label in labels]
        (tmp_path / f"{split}.tsv").write_text("".join(lines))
    (tmp_path / "mine.py").write_text(REVIEWS)
    monkeypatch.syspath_prepend(tmp_path)
    request.addfinalizer(lambda: sys.modules.pop("mine", None))
    mine = __import__("mine")
    runs.register_task("reviews", mine.reviews)
    runs.register_metric("share_of_good", lambda outputs, labels: outputs.argmax(-1).mean())
    deltas = []
    for name in ("reviews", f"{tmp_path}/mine.py:reviews"):
        config = runs.default_config("classification")
        config.base, config.data.name, config.data.path = str(tmp_path / "glue" / "base"), name, str(tmp_path)
        config.update_from_flattened_dict({"data.batch_size": 8, "data.buckets": 1, "seeds": (), "steps": 12})
        config.optimizer.learning_rate, config.metrics = 0.02, ("share_of_good",)
        result = runs.train(config, tmp_path / str(len(deltas)))
        assert result.summary is not None and {"accuracy", "share_of_good"} <= result.summary.keys()
        deltas.append(result.delta)
        loaded = runs.load(tmp_path / str(len(deltas) - 1))
        scores = runs.predict(loaded).result
        assert scores["accuracy"] == result.summary["accuracy"] and scores["examples"] == 12
    jax.tree.map(np.testing.assert_array_equal, *deltas)
    lost = loaded._replace(params=jax.tree.map(lambda x: x * np.nan, loaded.params))
    with pytest.raises(ValueError, match="the outputs are NaN for 12 of 12 examples"):
        runs.predict(lost)
    metrics = mine.reviews.objective(config, loaded.model).metrics
    assert metrics(np.eye(2), np.array([0, 0])) == {"accuracy": 0.5}
    for hidden in (-1, 2):
        with pytest.raises(ValueError, match=f"a label is {hidden}, not one of 0 to 1"):
            metrics(np.eye(2), np.array([0, hidden]))
    with pytest.raises(ValueError, match=r"no task 'nothing'.*reviews"):
        runs.task_named("nothing")
    config.metrics = ("nothing",)
    with pytest.raises(ValueError, match="no metric 'nothing' is registered"):
        runs.train(config, tmp_path / "other")


def test_seeds_and_sweeps_from_a_script(inputs: Path, tmp_path: Path) -> None:
    """The entries of each run get its name as a prefix, in a logger that is closed once."""
    logger, config = Entries(), config_of(inputs, steps=2)
    config.seeds = (3, 4)
    result = runs.train(config, tmp_path / "seeds", loggers=[logger])
    assert result.finished and [member.workdir.name for member in result.members] == ["seed_3", "seed_4"]
    losses = [
        e[f"seed_{n}/validation_loss"] for n in (3, 4) for e in logger.written if f"seed_{n}/validation_loss" in e
    ]
    assert result.summary is not None and result.summary["validation_loss"]["score"] == pytest.approx(np.mean(losses))
    assert logger.closed == 1

    logger, config = Entries(), config_of(inputs, steps=2)
    config.sweep.seed = (3, 4)
    with pytest.raises(ValueError, match=r"runs\.sweep trains them"):
        runs.train(config, tmp_path / "other")
    swept = runs.sweep(config, tmp_path / "sweep", loggers=[logger])
    assert swept.finished and list(swept.members) == ["seed=3", "seed=4"] and logger.closed == 1
    for member, seed in zip(result.members, (3, 4), strict=True):
        delta = swept.members[f"seed={seed}"].delta  # type: ignore[union-attr]
        for ours, theirs in zip(jax.tree.leaves(delta), jax.tree.leaves(member.delta), strict=True):
            # 2e-5 of the largest entry: the same sums in another order
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
        assert any(f"seed={seed}/validation_loss" in entry for entry in logger.written)


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell gives --workdir=~/run as it stands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--workdir=~/run", "--runs=~/a,b~/c", "--adapter=other:~", "--config.base=~/x", "--context=~/x", "a=~/x"]
    given = [f"--workdir={tmp_path}/run", f"--runs={tmp_path}/a,b~/c", f"--adapter=other:{tmp_path}"]
    assert with_homes(flags) == [*given, f"--config.base={tmp_path}/x", "--context=~/x", "a=~/x"]

    training.claim("~/run", TrainConfig(steps=1))
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 1
    method, delta = lj.lora(lj.select("*"), rank=1), lj.Delta({"w": {"a": np.ones((2, 1), np.float32)}})
    file = checkpoints.save_adapter("~/run/adapter", method, delta, {})
    assert file == tmp_path / "run/adapter/adapter.safetensors" and "w" in checkpoints.load_adapter("~/run/adapter")[1]
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/run/checkpoints: no checkpoint"):
        checkpoints.load("~/run")


OLD = {"keep": 5, "optimizer.final_share": 0.1, "optimizer.warmup_share": 0.2, "optimizer.b_ratio": 16.0}


def test_old_names_of_keys_mean_the_same(inputs: Path, tmp_path: Path) -> None:
    new = {"max_to_keep": 5, "optimizer.end_lr_ratio": 0.1, "optimizer.warmup_ratio": 0.2}
    config = config_of(inputs, **new, **{"optimizer.loraplus_lr_ratio": 16.0, "optimizer.warmup_steps": None})
    old = config_of(inputs, **{"optimizer.warmup_steps": None})
    old.keep = OLD["keep"]
    for name in ("final_share", "warmup_share", "b_ratio"):
        old.optimizer[name] = OLD[f"optimizer.{name}"]
    assert TrainConfig.of(old) == TrainConfig.of(config)
    runs.train(config, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    written = json.loads(file.read_text())
    runs.train(old, tmp_path / "run")  # the same config: nothing is refused
    assert json.loads(file.read_text()) == written and "final_share" not in file.read_text()
    # a workdir of before: old names, and none of the keys that came later
    del written["best"], written["metrics"], written["max_to_keep"]
    written["keep"] = 5
    for old_name, new_name in RENAMED.items():
        group, _, name = old_name.rpartition(".")
        if group:
            written[group][name] = written[group].pop(new_name.rpartition(".")[2])
    file.write_text(json.dumps(written))
    assert runs.load(tmp_path / "run").step == 4
    assert runs.train(config, tmp_path / "run").finished
    config.optimizer.end_lr_ratio = 0.2
    with pytest.raises(ValueError, match=r"optimizer.end_lr_ratio is 0.1 there and 0.2 here"):
        runs.train(config, tmp_path / "run")


def test_old_names_on_the_command_line() -> None:
    old = ["--config.keep=5", "-config.optimizer.final_share", "0.1", "--config.data.keep=1", "--config.keeper=1"]
    new = [
        "--config.max_to_keep=5",
        "-config.optimizer.end_lr_ratio",
        "0.1",
        "--config.data.keep=1",
        "--config.keeper=1",
    ]
    assert with_new_names(old) == new
    assert with_new_names(["--workdir=config.keep"]) == ["--workdir=config.keep"]


def test_a_config_is_read_by_its_keys() -> None:
    with pytest.raises(ValueError, match="optimizer has no key 'rate': it has learning_rate"):
        TrainConfig.of({"optimizer": {"rate": 1.0}})
    config = as_config_dict(TrainConfig(seed=3)).lock()
    assert TrainConfig.of(config) == TrainConfig(seed=3)
    assert config.get_type("steps") is int and config.optimizer.get_type("clip_norm") is float
    with pytest.raises(AttributeError, match=r"Did you mean.*epochs"):
        config.epoch = 1
    for kind in ("generation", "classification"):
        config = runs.default_config(kind)
        assert set(as_config_dict(TrainConfig()).optimizer) == set(config.optimizer)
    with pytest.raises(ValueError, match="no default config 'x'"):
        runs.default_config("x")


def test_the_training_loop_takes_a_train_config(tmp_path: Path) -> None:
    from tests.helpers.runs import prepare, schedule

    config = TrainConfig(steps=2, log_every=1)
    result = training.train(prepare(tmp_path, config, batches=schedule(buckets=1)))
    assert result.finished and checkpoints.load(tmp_path).config["optimizer"]["learning_rate"] == 2e-4
    with pytest.raises(ValueError, match="another config: seed is 0 there and 1 here"):
        prepare(tmp_path, TrainConfig(steps=2, seed=1))
