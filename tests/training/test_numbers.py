"""Numbers of a config out of their range are refused by name, before anything is written."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import lora_jax as lj
from configs import pretrain
from lora_jax import checkpoints, runs, training
from lora_jax.methods.ranges import Range
from lora_jax.runs.config import check
from lora_jax.training.config import OLD_MATRICES, OptimizerConfig, TrainConfig
from tests.helpers.runs import prepare, run_config
from tests.helpers.sweeps import members, ready

POSITIVE = ("epochs", "accumulate", "log_every", "max_to_keep")
# Each number of a config with what it is not: of training, and then of runs.
BAD: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(POSITIVE, (0, -1, 1.5, True, "2")),
    "steps": (0, -5, 2.5, True),
    "seed": (-1, 2**63, 0.5, True),
    "label_smoothing": (1.0, 1.5, -0.5, math.nan),
    **dict.fromkeys(("eval_every", "save_every", "optimizer.warmup_steps"), (-1, 0.5, True)),
    **{
        f"optimizer.{name}": (0.0, -1.0, math.inf, math.nan)
        for name in ("clip_norm", "eps", "loraplus_lr_ratio", "damping")
    },
    **{f"optimizer.{name}": (-1e-9, math.inf, math.nan, True) for name in ("learning_rate", "weight_decay")},
    **{f"optimizer.{name}": (-0.1, 1.0, 1.5, math.nan) for name in ("b1", "b2")},
    **{f"optimizer.{name}": (-0.1, 1.5, math.nan) for name in ("warmup_ratio", "end_lr_ratio")},
}
OF_RUNS: dict[str, tuple[Any, ...]] = {
    **{f"data.{name}": (0, -1) for name in ("length", "batch_size", "buckets")},
    **{f"mesh.{name}": (0, -1) for name in ("data", "fsdp", "tensor")},
    **{"decode.num_beams": (0,), "decode.max_new_tokens": (0,), "decode.no_repeat_ngram_size": (-1,)},
    **{"decode.length_penalty": (math.nan,), "model.query_block": (-1,), "accumulate": (3,)},
    **{"lora.rank": (0, -2), "lora.dropout": (1.0, -0.1), "lora.alpha": (math.nan, math.inf)},
}


def nested(name: str, value: Any) -> dict[str, Any]:
    group, _, key = name.rpartition(".")
    return {group: {key: value}} if group else {key: value}


@pytest.mark.parametrize("name", BAD)
def test_each_number_of_training_is_refused_by_name_and_range(name: str) -> None:
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{name}={value!r} must be a .*number.*(from|above)"):
            TrainConfig.of(nested(name, value))


def test_every_number_of_training_has_a_range() -> None:
    numbers = (int, float, type(None))
    for config, prefix in ((TrainConfig(), ""), (OptimizerConfig(), "optimizer.")):
        for field in dataclasses.fields(config):
            if isinstance(getattr(config, field.name), numbers) and field.name != "best":
                assert prefix + field.name in BAD


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"^optimizer.b2=1.5 .* from 0 to below 1; optimizer.clip_norm=-1.0 .* None$"):
        OptimizerConfig(b2=1.5, clip_norm=-1.0)


def test_numbers_of_numpy_and_the_ends_of_ranges_are_taken() -> None:
    given = OptimizerConfig(learning_rate=0, b1=0, warmup_ratio=1, end_lr_ratio=1.0, eps=np.float32(0.5))
    config = TrainConfig(steps=np.int64(4), save_every=0, seed=2**32, optimizer=given)
    assert type(config.steps) is int and type(given.eps) is float
    json.dumps(dataclasses.asdict(config))


def test_ranges() -> None:
    share = Range(least=0, most=1)
    assert str(share) == "a number from 0 to 1" and str(Range(above=0, optional=True)) == "a number above 0, or None"
    assert share("x", np.float64(0.5)) == 0.5 and Range(whole=True)("x", np.uint8(7)) == 7
    assert Range(whole=True)("x", 10**400) == 10**400
    assert share("x", {"a": 1, "**": 0.0}) == {"a": 1, "**": 0.0}
    with pytest.raises(ValueError, match=r"x\['a'\]=2 must be"):
        share("x", {"a": 2})
    for value in (np.bool_(True), "1", None, 1j, [1], np.nan, np.array([1.0, 1.0])):
        with pytest.raises(ValueError, match="must be a number from 0 to 1"):
            share("x", value)


def config_of(**changes: Any) -> ConfigDict:
    config = runs.default_config("generation")
    config.base, config.data.path = "nowhere", "nowhere"
    config.unlock()
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("name", [*BAD, *OF_RUNS])
def test_runs_seeds_and_sweeps_refuse_before_they_write(name: str, tmp_path: Path) -> None:
    value = {**BAD, **OF_RUNS}[name][0]
    shown = name.replace("lora.", "lora: ").replace("accumulate", "(accumulate|data.batch_size)")
    for changes in ({}, {"seeds": (0, 1)}):
        with pytest.raises(ValueError, match=f"{shown}={value!r} must"):
            runs.train(config_of(**{name: value}, **changes), tmp_path / "run")
    swept = {"sweep.alpha": (1.0, 2.0)} if name == "seed" else {"sweep.seed": (1, 2)}
    with pytest.raises(ValueError, match=f"{shown}={value!r} must"):
        runs.sweep(config_of(**{name: value}, **swept), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "values"),
    [("learning_rate", (1e-3, -1.0)), ("weight_decay", (0.1, math.nan)), ("rank", (1, 0)), ("seed", (0, -1))],
)
def test_a_value_of_a_sweep_is_refused_before_anything_is_written(name: str, values: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}={values[1]!r} must be"):
        runs.sweep(config_of(**{f"sweep.{name}": values}), tmp_path / "run")
    with pytest.raises(ValueError, match=r"seeds\[1\]=-1 must be"):
        runs.train(config_of(seeds=(0, -1)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prepared_run_or_sweep_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.b2=2.0 must be"):
        prepare(tmp_path / "run", run_config(**{"optimizer.b2": 2.0}))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate=-1.0 must be"):
        ready(tmp_path / "run", members([{"learning_rate": 1e-3}, {"learning_rate": -1.0}]))
    with pytest.raises(ValueError, match="vocab_size=0 must be"):
        runs.pretrain(ConfigDict({**pretrain.get_config("tiny").to_dict(), "vocab_size": 0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_configs_of_this_library_are_in_range() -> None:
    for kind in ("generation", "classification"):
        config = runs.default_config(kind)
        for name in ("lora", "dora", "pissa", "vera", "ia3", "lokr", "tune", "adapter", "compacter", "prefix_layer"):
            config.method = name
            check(config)
    check(pretrain.get_config("small"))


METHODS: dict[str, tuple[Any, dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    **{
        name: (lj.select("**"), {"rank": 2}, {"rank": (0, True, 1.0, "2"), "alpha": (True, math.nan)})
        for name in ("lora", "dora", "pissa", "lokr")
    },
    "vera": (lj.select("**"), {"rank": 2}, {"rank": (0, True), "d_initial": (math.inf, True)}),
    "adapter": ({"mlp_out": (2, 8)}, {"rank": 2}, {"rank": (0, True, 2.0)}),
    "compacter": ({"mlp_out": (2, 8)}, {"rank": 4, "n": 2}, {"rank": (0, True), "n": (0, True, 2.0)}),
    "prefix_embedding": (lj.select("**"), {"prefix": 2}, {"prefix": (-1, True), "infix": (-1, 0.5)}),
    "prefix_layer": ({"block_out": (2, 8)}, {"prefix": 2, "vocabulary": 9}, {"prefix": (-1, True), "infix": (-1,)}),
    "bias_delta": (lj.select("**"), {}, {"scale": (math.nan, True)}),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_of_a_method(name: str) -> None:
    first, options, bad = METHODS[name]
    make = getattr(lj, name)
    for option, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"{option}={value!r} must be"):
                make(first, **options | {option: value})
    ours = {option: np.int64(x) if isinstance(x, int) else x for option, x in options.items()}
    assert json.dumps(make(first, **ours).spec) == json.dumps(make(first, **options).spec)


@pytest.mark.parametrize("glob", ["**/kernal", "h_0/attn/query/kernel/c", "**/{key,out}/kernel"])
def test_a_glob_of_decay_matches_something_that_trains(glob: str, tmp_path: Path) -> None:
    match = r"optimizer.decay=.* matches nothing that trains; the nearest paths are h_0/attn/"
    with pytest.raises(ValueError, match=match):
        prepare(tmp_path, run_config(**{"optimizer.decay": ("**/kernel", glob)}))
    with pytest.raises(ValueError, match=match):
        ready(tmp_path / "sweep", members([{"seed": 1}, {"seed": 2}], **{"optimizer.decay": ("**/kernel", glob)}))


def test_decay_of_a_chain_and_of_old_configs(tmp_path: Path) -> None:
    chained = lj.chain(
        lj.from_spec({"method": "lora", "select": ["**/query/kernel"], "rank": 1}), lj.tune(lj.select("ln_f/*"))
    )
    prepare(tmp_path / "chain", run_config(**{"optimizer.decay": ("**/b", "ln_f/scale")}), method=chained)
    config = run_config(**{"optimizer.decay": tuple(OLD_MATRICES)})
    job = prepare(tmp_path / "old", config)
    with checkpoints.manager(tmp_path / "old") as manager:
        checkpoints.save(manager, 1, job.state, spec=job.method.spec, base=job.base, data=job.data)
    prepare(tmp_path / "old", run_config(**{"optimizer.decay": ("matrices",)}))
    training.claim(tmp_path / "old", config)
