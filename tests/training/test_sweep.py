"""A sweep is its members' separate runs, in one program."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import glue
from lora_jax import checkpoints, training
from lora_jax.data.batches import Stacked
from lora_jax.runs import is_sweep, sweeps
from lora_jax.training import sweep
from tests.helpers.cli import make_inputs, run, run_entry
from tests.helpers.runs import QV, prepare, schedule, with_programs_of, without_times
from tests.helpers.sweeps import LORA, Values, alone, close, members, ready

pytestmark = pytest.mark.usefixtures("logits_in_pieces")


PISSA = {"method": "pissa", "select": QV["select"], "rank": 2, "alpha": 2.0}
VERA = {"method": "vera", "select": QV["select"], "rank": 2}
ADAPTER = {"method": "adapter", "sites": {"mlp_out": (1, 8)}, "rank": 2}
CHAIN = {"method": "chain", "of": [LORA, {"method": "tune", "select": ["**/mlp/*/bias"]}]}
RULES = {
    "method": "chain",
    "of": [
        LORA | {"select": ["**/attn/query/kernel"], "alpha": 4.0},
        LORA | {"select": ["**/attn/value/kernel"], "alpha": None, "scale_rule": "alpha/sqrt(r)"},
    ],
}


@pytest.mark.parametrize(
    ("values", "spec"),
    [
        pytest.param(
            [{"learning_rate": 1e-2, "seed": 3}, {"learning_rate": 3e-3, "seed": 4}], LORA, marks=pytest.mark.slow
        ),
        pytest.param(
            [{"rank": 1, "alpha": 4.0, "weight_decay": 0.0}, {"rank": 3, "alpha": 8.0, "weight_decay": 0.1}],
            CHAIN,
            marks=pytest.mark.slow,
        ),
        pytest.param([{"rank": 3}, {"rank": 1}], LORA | {"dropout": 0.3}, marks=pytest.mark.slow),
        pytest.param([{"rank": 3}, {"rank": 1}], LORA | {"scale_rule": "alpha/sqrt(r)"}, marks=pytest.mark.slow),
        *(
            pytest.param([{"rank": 1}, {"rank": 3}], spec, marks=pytest.mark.slow)
            for spec in (LORA | {"method": "dora"}, PISSA, VERA, ADAPTER)
        ),
    ],
    ids=[
        "rank, rules, rate and seed",
        "rank, alpha and decay",
        "dropout",
        "rslora",
        "dora",
        "pissa",
        "vera",
        "adapter",
    ],
)
def test_members_are_runs_of_their_own(values: Values, spec: dict, tmp_path: Path) -> None:
    swept = members(values, spec)
    expected = [alone(tmp_path / "alone" / member.name, member) for member in swept]
    for together in (False, True):
        workdir = tmp_path / str(together)
        results = sweep.train(ready(workdir, swept, together=together))
        assert results is not None
        for member, result, reference in zip(swept, results, expected, strict=True):
            assert result is not None
            close(result.delta, reference.delta)
            folder = workdir / member.name
            method, delta, info = checkpoints.load_adapter(folder / "adapter")
            assert method.spec == member.method.spec and info["base"] == checkpoints.meta_of(folder)["base"]
            jax.tree.map(np.testing.assert_array_equal, delta, result.delta)
            jax.tree.map(np.testing.assert_array_equal, checkpoints.load(folder).delta, result.delta)
            compare(without_times(folder), without_times(tmp_path / "alone" / member.name))


def test_ranks_rules_rates_and_seeds(tmp_path: Path) -> None:
    """Two LoRAs with other scale rules in each member, of other ranks: what a member saves is not padded."""
    values: Values = [
        {"rank": 1, "learning_rate": 1e-2, "seed": 3},
        {"rank": 3, "learning_rate": 3e-3, "weight_decay": 0.1, "seed": 4},
    ]
    swept = members(values, RULES, steps=3, save_every=3)
    swept = [m._replace(batches=dataclasses.replace(schedule(buckets=1), seed=m.config.seed)) for m in swept]
    results = sweep.train(ready(tmp_path, swept, together=True, validation=None))
    assert results is not None
    for member, result in zip(swept, results, strict=True):
        assert result is not None
        reference = alone(tmp_path / "alone" / member.name, member, validation=None)
        close(result.delta, reference.delta)
        folder = tmp_path / member.name
        for saved in (checkpoints.load_adapter(folder / "adapter")[1], checkpoints.load(folder).delta):
            jax.tree.map(np.testing.assert_array_equal, saved, result.delta)
        compare(without_times(folder), without_times(tmp_path / "alone" / member.name))


def test_a_member_without_alpha_has_its_rank(tmp_path: Path) -> None:
    """Of equal deltas: alpha None, which is the rank, as alpha 2; 1e-6 for sums in another order."""
    job = ready(tmp_path, members([{"alpha": None}, {"alpha": 2.0}, {"alpha": 8.0}]), together=True)
    assert job.validate is not None

    def filled(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.sin(jnp.arange(x[0].size, dtype=x.dtype)).reshape(x.shape[1:]), x.shape)

    state = job.state._replace(delta=jax.tree.map(filled, job.state.delta))
    without, two, eight = (figures["validation_loss"] for figures in job.validate(state) if figures)
    assert without == pytest.approx(two, rel=1e-6) and without != pytest.approx(eight, rel=1e-4)


def test_batches_of_other_seeds_are_stacked_and_padded() -> None:
    """Each member has the tokens and labels of its own schedule, in its order."""
    swept = members([{"seed": 3}, {"seed": 4}])
    schedules = Stacked(tuple(member.batches for member in swept))
    stacked = [batch for epoch in (0, 1) for batch in schedules(epoch)]
    assert len(schedules) == 5 and len(stacked) == 10
    lengths = set()
    for number, member in enumerate(swept):
        member_batches = [batch for epoch in (0, 1) for batch in member.batches(epoch)]
        for ours, theirs in zip(stacked, member_batches, strict=True):
            length, count = theirs["tokens"].shape[1], theirs["labels"].shape[1]
            np.testing.assert_array_equal(ours["tokens"][number][:, :length], theirs["tokens"])
            np.testing.assert_array_equal(ours["labels"][number][:, :count], theirs["labels"])
            assert ours["mask"][number].sum() == theirs["mask"].sum()
            assert ours["weights"][number].sum() == theirs["weights"].sum()
            lengths.add((number, ours["tokens"].shape[2] - length))
    assert {0, 1} == {number for number, more in lengths if more}, "each is padded somewhere"


def compare(ours: list[dict], theirs: list[dict]) -> None:
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    for one, other in zip(ours, theirs, strict=True):
        one.pop("real_share", None)  # of other seeds' members, padded to the longest of the batches
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=2e-5, abs=1e-7), name


@pytest.mark.slow
def test_a_members_folder_is_a_workdir(tmp_path: Path) -> None:
    """It is done with, as a run of its own would be."""
    swept = members([{"learning_rate": 1e-2}, {"learning_rate": 3e-3}])
    sweep.train(ready(tmp_path, swept))
    job = prepare(tmp_path / swept[1].name, swept[1].config, method=swept[1].method)
    assert job.start == job.total
    jax.tree.map(
        np.testing.assert_array_equal, training.train(job).delta, checkpoints.load(tmp_path / swept[1].name).delta
    )


def test_a_stopped_sweep_goes_on_bit_for_bit(tmp_path: Path) -> None:
    swept = members([{"rank": 1, "seed": 3}, {"rank": 2, "seed": 4}])
    straight_job = ready(tmp_path / "straight", swept)
    straight = sweep.train(straight_job)
    first = with_programs_of(straight_job, ready(tmp_path / "stopped", swept))
    assert sweep.train(first._replace(total=5)) is not None
    for member in swept:  # what a killed sweep would not have yet
        for path in ("checkpoints", "adapter"):
            folder = tmp_path / "stopped" / member.name / path
            assert folder.is_dir()
            for file in sorted(folder.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
    again = ready(tmp_path / "stopped", swept)
    assert again.start == 5
    for one, other in zip(sweep.train(with_programs_of(straight_job, again)), straight, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.delta, other.delta)
    for member in swept:
        entries = [without_times(tmp_path / name / member.name) for name in ("stopped", "straight")]
        kept = [[entry for entry in each if entry["step"] != 5] for each in entries]
        assert [entry["step"] for entry in kept[0]] == [entry["step"] for entry in kept[1]]


def test_a_diverging_member_leaves_the_others_alone(tmp_path: Path) -> None:
    swept = members([{"learning_rate": 1e-2}, {"learning_rate": 1e38}], buckets=1)
    validation = schedule(8, seed=1, buckets=1)
    results = sweep.train(ready(tmp_path / "sweep", swept, validation=validation))
    assert results is not None and results[1] is None and results[0] is not None
    close(results[0].delta, alone(tmp_path / "alone", swept[0], validation=None).delta)
    assert not (tmp_path / "sweep" / swept[1].name / "adapter").exists()
    with pytest.raises(ValueError, match=r"every member of .* diverged: \{0: "):
        diverging = members([{"learning_rate": 1e37}, {"learning_rate": 1e38}], buckets=1)
        sweep.train(ready(tmp_path / "all", diverging, validation=None))


def test_a_member_whose_delta_is_not_finite_has_diverged(tmp_path: Path) -> None:
    """In the last step, whose loss and gradient are finite, as is the validation loss here."""
    options = {"steps": 1, "log_every": 1, "best": "validation_loss", "optimizer.warmup_steps": 0}
    values = [{"learning_rate": 1e-2}, {"learning_rate": 3e38}]
    swept = members(values, buckets=1, **options, **{"optimizer.loraplus_lr_ratio": 4.0})
    job = ready(tmp_path, swept, validation=None)
    results = sweep.train(job._replace(validate=lambda states: [{"validation_loss": 1.0}] * 2))
    assert results is not None and results[1] is None and results[0] is not None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results[0].delta))
    assert [(tmp_path / member.name / "adapter").exists() for member in swept] == [True, False]
    assert np.isfinite(training.read_metrics(tmp_path / swept[1].name)[-1]["loss"])


def test_what_cannot_be_swept_is_said(tmp_path: Path) -> None:
    lokr = {"method": "lokr", "select": QV["select"], "rank": 2}
    for values, spec, message in [
        ([{"rank": 1}, {"rank": 2}], lokr, "the rank of 'lokr' cannot be swept"),
        ([{"dropout": 0.0}, {"dropout": 0.1}], LORA, "members of a sweep differ in lora's 'dropout'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ready(tmp_path / spec["method"], members(values, spec))


def test_every_combination_is_a_member() -> None:
    config = glue.get_config("base,mrpc")
    config.sweep.rank, config.sweep.learning_rate, config.seeds = (1, 8), (1e-3,), (0, 5)
    configs = sweeps.members(config)
    assert list(configs) == [f"learning_rate=0.001,rank={rank},seed={seed}" for rank in (1, 8) for seed in (0, 5)]
    last = configs["learning_rate=0.001,rank=8,seed=5"]
    assert (last.lora.rank, last.seed, last.seeds, last.optimizer.learning_rate) == (8, 5, (), 1e-3)
    assert not is_sweep(last)  # a run of its own
    config.sweep.learning_rate = (1e-3, 1e-3)
    with pytest.raises(ValueError, match=r"learning_rate=0.001,rank=1,seed=0 is there twice"):
        sweeps.members(config)
    config.sweep.alpha, config.method = (1.0, 2.0), "adapter"
    with pytest.raises(ValueError, match=r"sweep.alpha: the method 'adapter' has no alpha"):
        sweeps.members(config)


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    flags = ("--config.sweep.learning_rate=1e-2,1e-3", "--config.sweep.seed=3,4", "--config.steps=6")
    done = run(tmp_path, tmp_path / "sweep", *flags)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    names = [f"learning_rate={rate},seed={seed}" for rate in ("0.01", "0.001") for seed in (3, 4)]
    assert [row["label"] for row in rows] == names and all(name in done.stdout for name in names)
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 1000
    member_flags = ("--config.optimizer.learning_rate=1e-3", "--config.seed=4", "--config.steps=6")
    done = run(tmp_path, tmp_path / "alone", *member_flags)
    assert done.returncode == 0, done.stderr
    alone, member = (checkpoints.load(tmp_path / folder) for folder in ("alone", f"sweep/{names[-1]}"))
    close(member.delta, alone.delta)
    failed = run_entry("evaluate", f"--workdir={tmp_path}/sweep")
    assert failed.returncode == 1 and "holds several runs: name one" in failed.stderr
