"""Runs: what they leave, how they go on, what stops them."""

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import checkpoints, training
from lora_jax.data.batches import Batch, Schedule
from lora_jax.distributed.sharding import Placement, make_mesh
from lora_jax.training import Job, validation
from tests.helpers.runs import (
    equal_bits,
    model_and_params,
    prepare,
    run_config,
    schedule,
    with_programs_of,
    without_times,
)

# 2026-11-25: a read that fails leaves tensorstore's other reads to a loop that orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
CONFIG = {"epochs": 3, "save_every": 4}  # 15 steps; saved at 4, 5, 8, 10, 12, 15


def at_each_step(job: Job, act: Callable[[int], None]) -> Job:
    """The job, which calls `act(steps done)` before each step."""
    done = iter(range(job.start, job.total))

    def put(batch: Batch) -> dict[str, jax.Array]:
        act(next(done))
        return job.put(batch)

    return job._replace(put=put)


class Straight(NamedTuple):
    workdir: Path
    job: Job
    delta: lj.Delta
    conversions: list[int]  # so far, before each step
    compilations: list[int]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """A run from start to end, watched."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    job = prepare(workdir, run_config(**CONFIG))
    counts = {"conversions": 0, "compilations": 0}
    array = type(jnp.ones(()))

    def counting(function: Callable) -> Callable:
        def counted(x: Any, *args: Any, **options: Any) -> Any:
            counts["conversions"] += isinstance(x, jax.Array)
            return function(x, *args, **options)

        return counted

    def on_event(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts["compilations"] += 1

    seen: dict[str, list[int]] = {name: [] for name in counts}

    def note(_: int) -> None:
        for name, count in counts.items():
            seen[name].append(count)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    with pytest.MonkeyPatch.context() as patch:
        # float(), int(), bool(), item(), device_get all come by `_value`; numpy by the buffer
        patch.setattr(array, "_value", property(counting(array._value.fget)))
        patch.setattr(np, "asarray", counting(np.asarray))
        patch.setattr(np, "array", counting(np.array))
        result = training.train(at_each_step(job, note))
        note(0)
    jax.monitoring.clear_event_listeners()
    assert (result.step, result.finished) == (15, True)
    return Straight(workdir, job, result.delta, **seen)


def test_what_a_run_leaves(straight: Straight) -> None:
    entries = training.read_metrics(straight.workdir)
    assert [e["step"] for e in entries if "loss" in e] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert [e["step"] for e in entries if "validation_loss" in e] == [5, 10, 15]
    last = next(e for e in reversed(entries) if "loss" in e)
    batches = [batch for epoch in range(3) for batch in schedule()(epoch)]
    assert last["tokens"] == sum(int(batch["mask"].sum()) for batch in batches)
    real = batches[14]["mask"]
    assert last["real_share"] == pytest.approx(real.mean())
    assert last["epoch"] == 3 and last["tokens_per_second"] > 0
    names = {path.name.split(".")[0] for path in straight.workdir.iterdir()}
    assert names == {"", "checkpoints", "config", "events", "loss", "metrics"}  # "": .lock
    assert (straight.workdir / "loss.png").read_bytes()[1:4] == b"PNG"
    run = checkpoints.load(straight.workdir)
    assert run.step == 15 and equal_bits(run.delta, straight.delta)
    assert run.config["optimizer"]["learning_rate"] == 1e-2


def test_the_loop_waits_for_the_device_once_a_logging_interval(straight: Straight) -> None:
    new = np.diff(straight.conversions)  # during step i + 1, its log, validation and save
    only_logged = [step for step in range(1, 16) if step % 2 == 0 and step not in (4, 8, 10, 12)]
    silent = [1, 3, 7, 9, 11, 13]
    assert [new[step - 1] for step in only_logged] == [1] * len(only_logged)
    assert [new[step - 1] for step in silent] == [0] * len(silent)
    assert new[4] > 1  # the counter counts: a checkpoint of all arrays


def test_nothing_is_compiled_after_the_first_epoch(straight: Straight) -> None:
    assert straight.compilations[5] - straight.compilations[0] >= 2  # two lengths
    assert straight.compilations[-1] == straight.compilations[6]


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(straight: Straight, tmp_path: Path) -> None:
    """It arrives in the middle of an epoch and of a logging interval."""

    def kill(done: int) -> None:
        if done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    job = with_programs_of(straight.job, prepare(tmp_path, run_config(**CONFIG)))
    result = training.train(at_each_step(job, kill))
    assert (result.step, result.finished) == (7, False)
    assert signal.getsignal(signal.SIGTERM) is before
    # a kill left a line in its middle, and entries that no checkpoint has
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    job = prepare(tmp_path, run_config(**CONFIG))
    assert job.start == 7
    result = training.train(with_programs_of(straight.job, job))
    assert equal_bits(result.delta, straight.delta)
    assert without_times(tmp_path) == without_times(straight.workdir)


def test_after_flipped_bits_the_run_goes_on_from_the_checkpoint_before(
    straight: Straight, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(straight.workdir, folder := tmp_path / "run")
    newest = folder / "checkpoints/15/rest"
    for file in newest.rglob("d/*"):  # all that holds arrays; not every byte of it is read
        content = np.frombuffer(file.read_bytes(), np.uint8).copy()
        content[::8] ^= 16
        file.write_bytes(content.tobytes())
    job = prepare(folder, run_config(**CONFIG))
    assert job.start == 12 and "checkpoints/15 is damaged" in caplog.text
    assert equal_bits(training.train(with_programs_of(straight.job, job)).delta, straight.delta)
    assert checkpoints.load(folder).step == 15
    assert without_times(folder) == without_times(straight.workdir)


def test_a_finished_run_is_left_as_it_is(straight: Straight, tmp_path: Path) -> None:
    shutil.copytree(straight.workdir, folder := tmp_path / "run")
    metrics = (folder / "metrics.jsonl").read_bytes()
    events = sorted(path.name for path in folder.iterdir())
    job = prepare(folder, run_config(**CONFIG, log_every=7, keep=1))
    assert job.start == job.total
    result = training.train(job)
    assert result.finished and equal_bits(result.delta, straight.delta)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert sorted(path.name for path in folder.iterdir()) == events


def test_another_config_or_base_is_refused(straight: Straight) -> None:
    before = sorted(straight.workdir.rglob("*"))
    changed = run_config(**CONFIG, **{"optimizer.learning_rate": 1e-3, "seed": 4})
    message = r"another config: optimizer.learning_rate is 0.01 there and 0.001 here; seed is 3"
    with pytest.raises(ValueError, match=message):
        prepare(straight.workdir, changed)
    model, params = model_and_params()
    other = jax.tree.map(lambda x: 2 * np.asarray(x), params)
    with pytest.raises(ValueError, match=r"belongs to the base 'tiny'.*has other weights"):
        prepare(straight.workdir, run_config(**CONFIG), model=model, params=other)
    assert sorted(straight.workdir.rglob("*")) == before


def with_weights(step: int, value: float) -> Schedule:
    """The schedule, whose batch of that step (counted from 1) has all weights of that value."""
    original = schedule(buckets=1)
    made = iter(range(1, 1000))

    def collate(*args: Any) -> Batch:
        batch = original.collate(*args)
        return batch | ({"weights": batch["weights"] * 0 + value} if next(made) == step else {})

    return dataclasses.replace(original, collate=collate)


@pytest.mark.parametrize("log_every", [2, 100])
def test_a_loss_that_is_not_finite_stops_the_run(straight: Straight, tmp_path: Path, log_every: int) -> None:
    """Also where a checkpoint would be written, at step 8, before anything is logged."""
    job = prepare(tmp_path, run_config(**CONFIG, log_every=log_every), batches=with_weights(7, np.nan), validation=None)
    with pytest.raises(ValueError, match=r"step 7: the loss .* not finite"):
        training.train(job._replace(step=straight.job.step))
    good = checkpoints.load(tmp_path)
    assert good.step == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good.delta))
    assert [e["step"] for e in training.read_metrics(tmp_path)] == ([2, 4, 6] if log_every == 2 else [])


OVERFLOW = {"optimizer.learning_rate": 3e38, "optimizer.loraplus_lr_ratio": 4.0, "optimizer.warmup_steps": 0}


def test_a_delta_that_is_not_finite_is_neither_saved_nor_returned(tmp_path: Path) -> None:
    """Where it happens in the last step, whose loss and gradient are finite."""
    job = prepare(tmp_path, run_config(steps=1, log_every=1, best="validation_loss", **OVERFLOW))
    match = r"step 1: the delta is not finite \(h_0/attn/query/kernel:b\); the checkpoints from before stay"
    with pytest.raises(ValueError, match=match):
        training.train(job)
    assert np.isfinite(training.read_metrics(tmp_path)[-1]["loss"])
    assert checkpoints.latest_step(tmp_path) is None and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("step", "kept"), [(4, None), (5, 4), (7, 5), (15, 12)])
def test_the_last_checkpoint_before_is_finite(straight: Straight, tmp_path: Path, step: int, kept: int | None) -> None:
    job = with_programs_of(straight.job, prepare(tmp_path, run_config(**CONFIG), validation=None))

    def spoiled(state: Any, params: Any, batch: Any) -> Any:
        new = straight.job.step(state, params, batch)
        if int(new.step) != step:
            return new
        factors = new.delta["h_0/attn/value/kernel"]
        bad = factors | {"a": factors["a"].at[3, 1].set(-jnp.inf)}
        return new._replace(delta=lj.Delta({**new.delta, "h_0/attn/value/kernel": bad}))

    with pytest.raises(ValueError, match=rf"step ({step}|{step + 1}): the (delta|loss) .* not finite"):
        training.train(job._replace(step=spoiled, validate=None))
    assert checkpoints.latest_step(tmp_path) == kept
    if kept:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoints.load(tmp_path).delta))


def test_a_batch_without_labels_stops_the_run(straight: Straight, tmp_path: Path) -> None:
    job = with_programs_of(straight.job, prepare(tmp_path, run_config(), batches=with_weights(1, 0)))
    with pytest.raises(ValueError, match="step 1: batch 0 of epoch 0 has no labels"):
        training.train(job)


def test_full_fine_tuning_keeps_one_copy(tmp_path: Path) -> None:
    model, _ = model_and_params()
    params = jax.tree.map(lambda x: x + 0, model_and_params()[1])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def in_memory() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    method = lj.from_spec({"method": "tune", "select": ["**"]})
    before = in_memory() - size
    options = {"method": method, "batches": schedule(buckets=1), "validation": None}
    job = prepare(tmp_path, run_config(epochs=1), model=model, params=params, **options)
    del params
    most: list[int] = []
    result = training.train(at_each_step(job, lambda _: most.append(in_memory() - before)))
    # the leaves and two moments of each; not the base besides
    assert 3 * size <= max(most) < 3.5 * size
    assert not jax.tree.leaves(job.params)
    start = lj.select("**").leaves(model_and_params()[1])
    assert set(result.delta) == set(start)
    moved = {path: np.abs(result.delta[path]["value"] - start[path]).max() for path in start}
    assert min(moved.values()) > 0


def test_a_run_goes_on_on_a_mesh(straight: Straight, tmp_path: Path) -> None:
    shutil.copytree(straight.workdir, folder := tmp_path / "run")
    for step in (12, 15):
        shutil.rmtree(folder / f"checkpoints/{step}")
    mesh = make_mesh({"data": 2, "fsdp": 2})
    job = prepare(folder, run_config(**CONFIG), placement=Placement.of(model_and_params()[0], mesh))
    assert job.start == 10
    places = jax.tree.map(lambda x: x.sharding, job.state)
    moved: list[bool] = []

    def step(*args: Any) -> training.State:
        state = job.step(*args)
        moved.append(jax.tree.map(lambda x: x.sharding, state) != places)
        return state

    delta = training.train(job._replace(step=step)).delta
    assert moved and not any(moved)  # else a step is compiled for each way that its state may lie
    for path, factors in delta.items():
        assert factors["a"].sharding.spec[0] == "fsdp"
        for name, factor in factors.items():
            np.testing.assert_allclose(factor, straight.delta[path][name], rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(without_times(folder), without_times(straight.workdir), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_batches_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 4 does not divide into accumulate=3"):
        prepare(tmp_path, run_config(accumulate=3))
    mesh = make_mesh({"data": 2, "fsdp": 2})
    with pytest.raises(ValueError, match=r"accumulate=2 micro-batches over 4 devices \(data x fsdp\)"):
        prepare(tmp_path, run_config(accumulate=2), placement=Placement.of(model_and_params()[0], mesh))


def test_the_best_delta_is_kept(straight: Straight, tmp_path: Path) -> None:
    """Of all so far, not of the newest measurement."""
    scores = iter([0.5, 0.2, 0.3, 0.9, 0.9])
    kept, now = [], []

    def validate(state: training.State) -> list[dict[str, float]]:
        now.append(jax.device_get(state.delta))
        return [{"validation_loss": 1.0, "score": next(scores)}]

    config = run_config(steps=5, eval_every=1)
    config.best = "score"
    job = prepare(tmp_path, config)._replace(step=straight.job.step, validate=validate)

    def put(batch: Batch) -> dict[str, jax.Array]:
        if now:
            kept.append(checkpoints.load_adapter(tmp_path / "adapter")[1])
        return job.put(batch)

    training.train(job._replace(put=put))
    kept.append(checkpoints.load_adapter(tmp_path / "adapter")[1])
    assert [[equal_bits(delta, of_step) for of_step in now].index(True) for delta in kept] == [0, 0, 0, 3, 3]
    logged = [entry["score"] for entry in training.read_metrics(tmp_path) if "score" in entry]
    assert logged == [0.5, 0.2, 0.3, 0.9, 0.9]
    config = run_config(steps=1)
    config.best = "accuracy"
    other = with_programs_of(straight.job, prepare(tmp_path / "other", config))
    with pytest.raises(ValueError, match="best='accuracy' is no metric of validation: it has validation_loss"):
        training.train(other)


def test_the_figures_of_validation_leave_empty_rows_out() -> None:
    def measured(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"outputs": outputs.tolist(), "labels": labels.tolist()}

    objective = training.language_model(model_and_params()[0])._replace(metrics=measured)
    rows = [
        (np.array([7, 8]), {"weights": np.array([1.0, 1.0]), "labels": np.array([1, 2])}),
        (np.array([9, 0]), {"weights": np.array([1.0, 0.0]), "labels": np.array([3, 0])}),
    ]
    figures = validation.figures(objective, np.array([6.0, 4.0]), rows)
    assert figures == {"validation_loss": 1.5, "outputs": [7, 8, 9], "labels": [1, 2, 3]}
    assert validation.figures(objective, np.array([np.nan, 4.0]), rows) is None
    with pytest.raises(ValueError, match="no labels"):
        validation.figures(objective, np.zeros(2), rows)
