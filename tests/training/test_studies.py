"""The studies of experiments.study: their grids, their driver, their rows, and what they refuse."""

import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import lora_jax as lj
from configs import studies
from experiments.studies import adapters, choose, reading, running
from experiments.studies.random_subspace import random_subspace
from lora_jax import checkpoints
from lora_jax.models import gpt2
from lora_jax.runs import methods, sweeps
from lora_jax.runs.config import check, is_sweep
from tests.helpers import shapes
from tests.helpers.cli import make_inputs, run_entry

NAMES = [name for name in studies.STUDIES if name not in ("budget", "rl")]
SHAPES = {"n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 512, "vocab_size": 8192}


def members_of(config: ConfigDict, folder: Path) -> dict[str, ConfigDict]:
    if config.study == "choose":
        names = [f"h_{n}/attn/{part}/kernel" for n in range(2) for part in ("query", "value", "out")]
        scores = {name: float(n) for n, name in enumerate(names)}
        config.folder = str(folder)
        found = {"sizes": dict.fromkeys(names, 32), "gradient": scores, "sensitivity": scores}
        (folder / "scores.json").write_text(json.dumps(found))
    if config.study == "forgetting":
        config.text = "text.txt"
    return importlib.import_module(f"experiments.studies.{config.study}").members(config, lambda n=None: f"data/{n}")


@pytest.mark.parametrize("name", NAMES)
def test_every_study_says_what_it_asks_and_fits_in_90_minutes(name: str, tmp_path: Path) -> None:
    module, config = importlib.import_module(f"experiments.studies.{name}"), studies.get_config(name)
    text = module.__doc__ or ""
    assert "?" in text.splitlines()[0] and f"--config=configs/studies.py:{name} " in text and "Here:" in text
    members, steps = members_of(config, tmp_path), 0.0
    for member in members.values():
        configs = sweeps.members(member) if is_sweep(member) else {"": member}
        assert member.model.scan_layers or name == "choose"
        for one in configs.values():
            check(one)
            steps += one.steps * one.data.batch_size / 8
    assert steps * config.seconds <= 90 * 60
    assert len(members) > 1 or name == "rank_of_w"


def test_the_page_of_the_studies_has_every_one() -> None:
    page = (Path(studies.__file__).parents[1] / "docs" / "studies" / "index.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) and {*re.findall(r"^\| `(\w+)` \|", page, re.M)} == {*NAMES, "rl"}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("subspace", 4),
        ("amplification", 4),
        ("rank", 60),
        ("matrices", 48),
        ("low_data", 48),
        ("regret", 48),
        ("rates", 80),
        ("transfer", 100),
        ("combine", 30),
        ("forgetting", 32),
        ("intruders", 32),
        ("choose", 30),
        ("intrinsic", 28),
        ("rank_of_w", 0),
    ],
)
def test_the_grids_have_so_many_runs(name: str, count: int, tmp_path: Path) -> None:
    members = members_of(studies.get_config(name), tmp_path)
    assert sum(len(sweeps.members(member)) if is_sweep(member) else 1 for member in members.values()) == count


def trained(member: ConfigDict) -> int:
    model = gpt2.GPT2(gpt2.GPT2Config(**SHAPES))
    one = next(iter(sweeps.members(member).values()))
    return lj.check(lj.from_spec(methods.spec(one, model)), shapes.params_of(model)).trained


def test_the_sets_of_matrices_have_one_budget(tmp_path: Path) -> None:
    counts = [trained(member) for member in members_of(studies.get_config("matrices"), tmp_path).values()]
    assert len(counts) == 8 and max(counts) == min(counts) == 6 * 40 * 256
    members = members_of(studies.get_config("regret"), tmp_path)
    equal = [trained(members[f"{part}, batch 8"]) for part in ("all, r = 16", "qkvo, r = 36", "mlp, r = 29")]
    assert max(equal) <= 1.05 * min(equal)


def test_the_matrices_that_are_chosen_fit_into_the_budget() -> None:
    sizes = {"a": 4.0, "b": 1.0, "c": 2.0, "d": 1.0}
    assert choose.taken("abcd", sizes, 6) == ["a", "b", "d"]  # c does not fit
    assert choose.taken("cab", sizes, 2) == ["c"]


def test_the_optimum_is_that_of_the_parabola() -> None:
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    by_rate = {rate: 1 + (math.log(rate) - math.log(5e-3)) ** 2 for rate in rates}
    assert reading.optimum(by_rate) == pytest.approx(5e-3, rel=1e-6)  # float64 of a fit through three points
    assert reading.optimum({1e-3: 3.0, 3e-3: 2.0, 1e-2: 1.0}) == 1e-2
    assert reading.optimum({1e-3: 3.0, 3e-3: 2.0, 1e-2: math.inf}) == 3e-3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, layers=1)
    return folder


def config_of(name: str, inputs: Path, **values: Any) -> ConfigDict:
    config = studies.get_config(name)
    config.update_from_flattened_dict({"run.base": str(inputs / "base"), "run.data.buckets": 1, **values})
    config.run.optimizer.warmup_steps = 1
    return config


def fake(loss: Callable[[ConfigDict], float]) -> SimpleNamespace:
    """`runs`, whose members are done at once with a loss of their config; None diverges."""

    def train(config: ConfigDict, folder: Path) -> SimpleNamespace:
        folder.mkdir(parents=True, exist_ok=True)
        summary = {"trained": 10, "validation_loss": loss(config), "device": "none", "jax": "0", "accuracy": 0.5}
        if math.isfinite(loss(config)):
            (folder / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(finished=True)

    def sweep(config: ConfigDict, folder: Path) -> SimpleNamespace:
        for name, member in sweeps.members(config).items():
            train(member, folder / name)
        (folder / "sweep.json").write_text("{}")
        return SimpleNamespace(finished=True)

    return SimpleNamespace(train=train, sweep=sweep)


BEST = {"full": 1e-3, "lora": 5e-3}


def parabola(config: ConfigDict) -> float:
    """The loss of a method whose best rate is that of BEST; of small ranks and few data higher; 0.1 diverges."""
    rate = config.optimizer.learning_rate
    if rate >= 0.1:
        return math.inf
    best = BEST["full" if config.method == "tune" else "lora"]
    return 1 + (math.log(rate) - math.log(best)) ** 2 + 1 / config.lora.rank + 0.01 * config.seed


FEWER: dict[str, dict[str, Any]] = {
    "rank": {"ranks": (1, 64)},
    "regret": {"ranks": (1, 16), "large_ranks": (16,)},
    "transfer": {"ranks": (1, 64), "optimizers": ("lora_rite",)},
}


@pytest.mark.parametrize("name", ["rank", "matrices", "low_data", "rates", "combine", "regret", "transfer"])
def test_the_rows_are_of_each_ones_best_rate(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "runs", fake(parabola))
    monkeypatch.setattr(running, "_check_ranks", lambda config: None)
    config, out = config_of(name, inputs, **FEWER.get(name, {})), tmp_path / "out" / "rows.json"
    running.run(config, tmp_path, str(inputs / "data"), out)
    rows = {row["label"]: row for row in json.loads(out.read_text())["rows"]}
    assert out.with_suffix(".png").stat().st_size > 1000
    losses = [row for row in rows.values() if "validation_loss" in row]
    for row in losses:
        assert row["seed"] == list(config.seeds) and row["validation_loss"]["low"] <= row["validation_loss"]["score"]
        assert row["rate"] < 0.1
    if name == "rank":
        assert len(rows) == 6 and rows["qv, r = 64"]["rate"] == 8e-3
    if name == "regret":
        assert rows["all, r = 16, batch 32"]["rate_ratio"] == pytest.approx(5, rel=1e-3)
        assert rows["full, batch 8"]["best_rate"] == pytest.approx(1e-3, rel=1e-3)
    if name == "transfer":
        assert rows["adamw, alpha over r"]["rate_spread"] == pytest.approx(1, rel=1e-3)
    if name == "rates":
        assert rows["bitfit"]["at_shared_rate"] is None or rows["bitfit"]["at_shared_rate"] > 0
        assert rows["lora"]["at_shared_rate"] == rows["lora"]["validation_loss"]["score"]


def test_a_study_resumes_and_keeps_what_is_done(inputs: Path, tmp_path: Path) -> None:
    values = {"run.steps": 2, "ranks": (2,), "targets": ("q",), "seeds": (0,)}
    out, source = tmp_path / "study_rank.json", str(inputs / "data")
    running.run(config_of("rank", inputs, **values), tmp_path, source, out)
    first = json.loads(out.read_text())["rows"]
    assert [row["label"] for row in first] == ["q, r = 2"] and out.with_suffix(".png").is_file()
    assert first[0]["trained"] == 2 * (16 + 16)
    done = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.jsonl")}
    assert len(done) == 2
    running.run(config_of("rank", inputs, **values), tmp_path, source, out)  # nothing trains
    assert json.loads(out.read_text())["rows"] == first
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.jsonl")} == done
    with pytest.raises(ValueError, match="steps"):
        running.run(config_of("rank", inputs, **values | {"run.steps": 3}), tmp_path, source, out)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("rank", {"rates": (1e-3,)}, r"rates=\(0.001,\): a study takes the best of two"),
        ("rank", {"seeds": ()}, "no value for seed"),
        ("rank", {"targets": ()}, "has no members: one of its values is empty"),
        ("rank", {"ranks": (2, 17)}, r"ranks: 17 is above the smaller side of .*kernel, \(16, 16\)"),
        ("subspace", {"ranks": (4,)}, "two ranks or more"),
        ("forgetting", {"ranks": (1,)}, "config.text is empty"),
    ],
)
def test_what_a_study_refuses(name: str, values: dict[str, Any], message: str, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        running.run(config_of(name, inputs, **values), tmp_path, str(inputs / "data"), tmp_path / "rows.json")
    assert not (tmp_path / "rows.json").exists()


def test_an_unknown_study_is_said() -> None:
    with pytest.raises(ValueError, match="no study 'ranks': give one of subspace"):
        studies.get_config("ranks")


def test_every_rate_diverged(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "runs", fake(lambda config: math.inf))
    config = config_of("rank", inputs, ranks=(2,))
    with pytest.raises(ValueError, match=r"q, r = 2: at every rate .* diverged: give lower ones"):
        running.run(config, tmp_path, str(inputs / "data"), tmp_path / "rows.json")


def test_a_study_that_is_stopped_says_how_to_go_on(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = fake(parabola)
    sweep = lambda config, folder: done.sweep(config, folder) if "r = 2" in folder.name else stopped  # noqa: E731
    stopped = SimpleNamespace(finished=False)
    monkeypatch.setattr(running, "runs", SimpleNamespace(train=done.train, sweep=sweep))
    config, out = config_of("rank", inputs, ranks=(2, 4), targets=("q",)), tmp_path / "rows.json"
    with pytest.raises(InterruptedError, match="q, r = 4 was stopped: the same command resumes it"):
        running.run(config, tmp_path, str(inputs / "data"), out)
    assert (tmp_path / "rank" / "q, r = 2" / "sweep.json").is_file() and not out.exists()
    members = importlib.import_module("experiments.studies.rank").members(config, lambda: config.run.data.path)
    assert running.plan(members, tmp_path / "rank", 0.2).startswith(
        "4 of 8 runs are to be trained, 1,200 steps: about 4"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=w"], "--data is missing"),
        (
            ["--config=configs/studies.py:budget", "--workdir=w", "--data=d"],
            "--base: name the folder of the base of e2e",
        ),
    ],
)
def test_what_the_command_needs(flags: list[str], message: str) -> None:
    failed = run_entry("study", *flags)
    assert failed.returncode == 1 and message in failed.stderr


def saved(folder: Path, width: int, seed: int, rank: int = 2) -> Path:
    params = {"attn": {"query": {"kernel": jnp.ones((width, width))}}}
    method = lj.lora(lj.select("**/kernel"), rank=rank)
    delta = method.init(jax.random.key(seed), params)
    delta = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed + 7), x.shape), delta)
    identity = checkpoints.identity(params, "ones")
    return checkpoints.save_adapter(folder, method, delta, identity).parent


def test_two_adapters_without_their_base(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one", 12, 0), saved(tmp_path / "two", 12, 1, rank=3)
    done = run_entry("study", f"--adapters={one},{two}", f"--out={tmp_path}/rows.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    x, y = (adapters.updates_of(folder)["attn/query/kernel"] for folder in (one, two))
    changes = [np.asarray(of.a[0] @ of.b[0], float) for of in (x, y)]
    cosine = np.sum(changes[0] * changes[1]) / math.prod(np.linalg.norm(of) for of in changes)
    assert row["alignment"] == pytest.approx(cosine, abs=1e-5)  # float32
    left = [np.linalg.svd(np.asarray(of.a[0], float))[0] for of in (x, y)]
    assert row["phi_1"] == pytest.approx((left[0][:, 0] @ left[1][:, 0]) ** 2, abs=1e-5)
    assert row["floor_1"] == pytest.approx(1 / 12) and row["floor_all"] == pytest.approx(3 / 12)
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one", 12, 0), saved(tmp_path / "two", 8, 1)
    with pytest.raises(ValueError, match="the adapters are of different bases"):
        adapters.compare([str(one), str(two)], None)
    with pytest.raises(ValueError, match="name two folders or more"):
        adapters.compare([str(one)], None)
    with pytest.raises(FileNotFoundError, match=r"there is no .*three"):
        adapters.compare([str(one), str(tmp_path / "three")], None)


def test_a_random_subspace_is_one_vector_for_all_weights() -> None:
    params = {"a": jnp.ones((6, 5)), "b": jnp.zeros((40,))}
    method = random_subspace(lj.select("*"), dimension=7)
    delta = method.init(jax.random.key(0), params)
    assert lj.check(method, params).trained == 7

    def change(z: jax.Array) -> jax.Array:
        (key,) = (key for key in delta if "z" in delta[key])
        adapted = lj.merge(method.apply(params, lj.Delta({**delta, key: {"z": z}})))
        return jnp.concatenate([(adapted[name] - params[name]).ravel() for name in params])

    projection = np.asarray(jax.jacobian(change)(jnp.zeros(7)))  # (70, 7)
    assert (np.abs(projection).sum(1) == 1).all()  # one entry, 1 or -1, in each row
    gram = projection.T @ projection
    assert (gram == np.diag(np.diag(gram))).all() and np.diag(gram).min() > 0
    assert 0 < (projection == -1).sum() < 70
