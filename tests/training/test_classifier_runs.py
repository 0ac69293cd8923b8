"""Runs of GLUE from the command line: seeds, the best epoch, resuming, warm starts, predictions."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from configs import e2e
from lora_jax import checkpoints, training
from lora_jax.interop import hf
from lora_jax.models.encoder import Encoder
from lora_jax.runs import bases
from tests.helpers.cli import run_entry
from tests.helpers.glue_inputs import CONFIG, make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    make_inputs(folder, layers=1)
    return folder


def train(folder: Path, workdir: Path, name: str, *flags: str) -> subprocess.CompletedProcess:
    return run_entry(
        "train",
        f"--config=configs/glue.py:base,{name}",
        f"--workdir={workdir}",
        f"--config.base={folder}/base",
        f"--config.data.path={folder}/glue",
        "--config.data.batch_size=8",
        "--config.data.buckets=1",
        "--config.lora.rank=2",
        "--config.optimizer.learning_rate=0.02",
        "--config.log_every=2",
        *flags,
    )


@pytest.fixture(scope="module")
def seeds(inputs: Path) -> Path:
    """A run of two seeds, to its end."""
    workdir = inputs / "runs" / "cola"
    done = train(inputs, workdir, "cola", "--config.epochs=4", "--config.seeds=3,5")
    assert done.returncode == 0, done.stderr
    return workdir


def test_each_seed_has_its_run_and_the_summary_their_medians(seeds: Path) -> None:
    best_scores = {}
    for seed in (3, 5):
        entries = training.read_metrics(seeds / f"seed_{seed}")
        best_scores[seed] = max(e["matthews"] for e in entries if "matthews" in e)
        seed_summary = json.loads((seeds / f"seed_{seed}" / "summary.json").read_text())
        assert (seed_summary["matthews"], seed_summary["seed"]) == (best_scores[seed], seed)
    summary = json.loads((seeds / "summary.json").read_text())
    values = sorted(best_scores.values())
    assert summary["seed"] == [3, 5]
    assert summary["matthews"] == {"score": sum(values) / 2, "low": values[0], "high": values[1]}
    assert summary["validation_loss"]["low"] <= summary["validation_loss"]["high"]
    assert values[0] > 0.3, "a task that any word decides"
    tables = [checkpoints.load_adapter(seeds / f"seed_{seed}" / "adapter")[1] for seed in (3, 5)]
    different = jax.tree.map(lambda a, b: not np.array_equal(a, b), *tables)
    assert all(jax.tree.leaves(different))


def test_the_adapter_is_that_of_the_best_epoch(seeds: Path, inputs: Path) -> None:
    """Predicting with it gives the best epoch's metric, whatever later epochs gave."""
    workdir = seeds / "seed_3"
    done = run_entry("predict", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    result = json.loads((workdir / "predictions" / "valid-adapted" / "predict.json").read_text())
    validated = [e for e in training.read_metrics(workdir) if "matthews" in e]
    best = max(validated, key=lambda e: e["matthews"])
    assert result["matthews"] == pytest.approx(best["matthews"], abs=1e-6)
    assert (result["step"], result["examples"]) == (best["step"], 24)
    lines = (workdir / "predictions" / "valid-adapted" / "predictions.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["index", "prediction", "label"] and len(lines) == 25


def test_a_test_split_is_written_for_the_server(seeds: Path, inputs: Path) -> None:
    done = run_entry("predict", f"--workdir={seeds}/seed_3", "--split=test", "--params=merged")
    assert done.returncode == 0, done.stderr
    lines = (seeds / "seed_3" / "predictions" / "test-merged" / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == list("01234")
    assert len({line.split("\t")[1] for line in lines[1:]}) == 1  # the same text


@pytest.mark.slow
def test_a_launch_goes_on_where_it_stopped(seeds: Path, inputs: Path, tmp_path: Path) -> None:
    """One seed is done and the other stands at its second epoch: the same figures, bit for bit."""
    workdir = tmp_path / "cola"
    shutil.copytree(seeds, workdir)
    (workdir / "summary.json").unlink()
    second = workdir / "seed_5"
    (second / "summary.json").unlink()
    steps = sorted(int(path.name) for path in (second / "checkpoints").iterdir() if path.name.isdecimal())
    shutil.rmtree(second / "checkpoints" / str(steps[-1]))
    done = train(inputs, workdir, "cola", "--config.epochs=4", "--config.seeds=3,5")
    assert done.returncode == 0, done.stderr
    again, first = (json.loads((folder / "summary.json").read_text()) for folder in (workdir, seeds))
    assert again["matthews"] == first["matthews"] and again["validation_loss"] == first["validation_loss"]


@pytest.mark.slow
def test_a_seed_alone_is_the_same_run(seeds: Path, inputs: Path, tmp_path: Path) -> None:
    done = train(inputs, tmp_path / "one", "cola", "--config.epochs=4", "--config.seeds=()", "--config.seed=5")
    assert done.returncode == 0, done.stderr
    one, two = (
        (folder / "adapter" / "adapter.safetensors").read_bytes() for folder in (tmp_path / "one", seeds / "seed_5")
    )
    assert one == two


@pytest.mark.slow
def test_a_warm_start_takes_what_fits(seeds: Path, inputs: Path, tmp_path: Path) -> None:
    """MNLI's classifier has three labels, CoLA's two: the low-rank factors go over, the head starts anew."""
    flags = ("--config.steps=1", "--config.seeds=()", "--config.optimizer.learning_rate=0.0")
    start = f"--config.warm_start={seeds}/seed_3"
    done = train(inputs, tmp_path / "mnli", "mnli", *flags, start)
    assert done.returncode == 0, done.stderr
    assert "these do not fit: classifier/bias, classifier/kernel" in done.stdout
    delta = checkpoints.load(tmp_path / "mnli").delta
    saved = checkpoints.load_adapter(seeds / "seed_3" / "adapter")[1]
    lora = [path for path in delta if path.startswith("h_")]
    assert len(lora) == 2
    for path in lora:
        assert np.array_equal(delta[path]["a"], saved[path]["a"]) and np.array_equal(delta[path]["b"], saved[path]["b"])
    other = tmp_path / "base"
    model, params, tokenizer = hf.load(inputs / "base")
    hf.save(other, model, jax.tree.map(lambda x: x + 1, params), tokenizer)
    failed = train(inputs, tmp_path / "other", "mnli", *flags, start, f"--config.base={other}")
    assert failed.returncode == 1 and "has other weights of the same shapes" in failed.stderr


def test_a_warm_start_is_the_same_function_or_refused(seeds: Path, inputs: Path, tmp_path: Path) -> None:
    flags = ("--config.steps=1", "--config.seeds=()", f"--config.warm_start={seeds}/seed_3")
    failed = train(inputs, tmp_path / "mnli", "mnli", *flags, "--config.lora.alpha=9")
    assert failed.returncode == 1 and re.search(r"h_0/attn/query/kernel has scale 4.0 in one, 4.5 in", failed.stderr)
    failed = train(inputs, tmp_path / "mnli", "mnli", *flags[:2], f"--config.warm_start={seeds}")
    assert failed.returncode == 1 and "is a run without an adapter: name one of its seeds" in failed.stderr


def test_other_seeds_may_come_but_no_other_config(seeds: Path, inputs: Path) -> None:
    before = (seeds / "config.json").read_bytes()
    failed = train(inputs, seeds, "cola", "--config.epochs=4", "--config.seeds=5,3", "--config.lora.alpha=1")
    assert failed.returncode == 1 and "lora.alpha is 8.0 there and 1.0 here" in failed.stderr
    assert (seeds / "config.json").read_bytes() == before


def test_the_base_alone_is_measured(inputs: Path, tmp_path: Path) -> None:
    done = train(inputs, tmp_path / "none", "cola", "--config.method=none", "--config.seeds=()")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "none" / "summary.json").read_text())
    assert summary["trained"] == 0 and -1 <= summary["matthews"] <= 1 and summary["validation_loss"] > 0


@pytest.mark.slow
def test_a_new_pooler_trains_with_the_head_and_goes_to_peft(inputs: Path, tmp_path: Path) -> None:
    """A BERT without a pooler classifies by a new one: PEFT's form has it, or PEFT would make another."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, params, tokenizer = hf.load(inputs / "base")
    bare = Encoder(dataclasses.replace(model.config, pooler=False))
    hf.save(tmp_path / "bare", bare, {name: part for name, part in params.items() if name != "pooler"}, tokenizer)
    flags = ("--config.steps=2", "--config.seeds=()", f"--config.base={tmp_path}/bare", "--config.best=validation_loss")
    done = train(inputs, tmp_path / "run", "cola", *flags)
    assert done.returncode == 0, done.stderr
    assert "pooler/kernel" in done.stdout
    for form in ("peft", "merged"):
        done = run_entry("export", f"--workdir={tmp_path}/run", f"--form={form}", f"--out={tmp_path}/{form}")
        assert done.returncode == 0, done.stderr
    tokens = np.random.default_rng(0).integers(4, 12, (3, 6))
    merged, ours, _ = hf.load(tmp_path / "merged")
    want = merged.apply({"params": ours}, jnp.asarray(tokens, jnp.int32))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()(torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow
def test_a_converted_adapter_is_one_of_the_same_base(inputs: Path, tmp_path: Path) -> None:
    """A checkpoint of loralib with a classifier: converted, it starts a run and is taken into a workdir."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, family="roberta", pad_id=1, pooler=True, token_types=1)
    params = jax.jit(Encoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    hf.save(tmp_path / "roberta", Encoder(config), params, hf.load(inputs / "base")[2])
    random, d = np.random.default_rng(0), config.hidden
    tensors = {f"classifier.{part}.weight": random.normal(0, 1, (n, d)) for part, n in (("dense", d), ("out_proj", 2))}
    tensors |= {f"classifier.{part}.bias": random.normal(0, 1, n) for part, n in (("dense", d), ("out_proj", 2))}
    for i in range(config.layers):
        for name in ("query", "value"):
            prefix = f"roberta.encoder.layer.{i}.attention.self.{name}.lora_"
            tensors |= {f"{prefix}A": random.normal(0, 1, (2, d)), f"{prefix}B": random.normal(0, 1, (d, 2))}
    torch.save({name: torch.tensor(x, dtype=torch.float32) for name, x in tensors.items()}, tmp_path / "model.pt")
    paths = (f"--checkpoint={tmp_path}/model.pt", f"--out={tmp_path}/x.safetensors", f"--adapter={tmp_path}/adapter")
    done = run_entry("convert", *paths, f"--base={tmp_path}/roberta", "--alpha=8")
    assert done.returncode == 0, done.stderr
    flags = ("--config.steps=1", "--config.seeds=()", f"--config.base={tmp_path}/roberta")
    done = train(inputs, tmp_path / "warm", "mnli", *flags, f"--config.warm_start={tmp_path}/adapter")
    assert done.returncode == 0, done.stderr
    assert "starts from" in done.stdout and "classifier/out/kernel" in done.stdout
    config_flags = ["--config=configs/glue.py:base,cola", f"--config.data.path={inputs}/glue", *flags]
    done = run_entry("export", f"--source={tmp_path}/adapter", f"--workdir={tmp_path}/taken", *config_flags)
    assert done.returncode == 0, done.stderr
    done = run_entry("predict", f"--workdir={tmp_path}/taken")
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_is_said(seeds: Path, inputs: Path, tmp_path: Path) -> None:
    for arguments, message in [
        (("predict", f"--workdir={seeds}"), "holds several runs: name one, --workdir=.*seed_3"),
        (("predict", f"--workdir={seeds}/seed_3", "--split=dev"), "split 'dev'"),
        (("predict", f"--workdir={tmp_path}"), "is .* the workdir of a run"),
        (("evaluate", f"--workdir={seeds}/seed_3"), "is a run of cola: give it to experiments.predict"),
    ]:
        failed = run_entry(*arguments)
        assert failed.returncode == 1
        assert re.search(message, failed.stderr), failed.stderr


def test_a_task_of_texts_needs_a_gpt2(inputs: Path) -> None:
    config = e2e.get_config("small")
    config.base = str(inputs / "base")
    with pytest.raises(ValueError, match="is a bert, but e2e needs a model that generates text"):
        bases.load(config)


def test_dropout_of_the_model_acts_in_training_alone() -> None:
    model = Encoder(dataclasses.replace(CONFIG, head="classification", labels=2, dropout=0.5))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    method = lj.lora(lj.select("**/attn/query/kernel"), rank=1)
    adapted = method.apply(params, jax.jit(method.init)(jax.random.key(1), params))
    tokens = np.ones((3, 5), np.int32)
    batch: dict[str, Any] = {"tokens": tokens, "mask": tokens > 0, "token_types": tokens * 0}
    forward = jax.jit(training.classifier(model).forward)
    one, two = (forward(adapted, batch, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(forward(adapted, batch), forward(adapted, batch, None))
