"""Members of a sweep of the tiny GPT-2, together and each as a run of its own."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lj
from lora_jax import checkpoints, training
from lora_jax.training import sweep
from tests.helpers.runs import QV, model_and_params, prepare, run_config, schedule

LORA = {"method": "lora", **QV, "dropout": 0.0}


Values = list[dict[str, Any]]


def members(values: Values, spec: dict[str, Any] = LORA, buckets: int = 2, **changes: Any) -> list[sweep.Member]:
    """One for each: names of the optimizer's options, "seed", or options of the spec."""
    params, sweep_members = model_and_params()[1], []
    for settings in values:
        config = run_config(**changes)
        for name in set(settings) & set(config.optimizer):
            config.optimizer[name] = settings[name]
        config.seed = settings.get("seed", 3)
        options = {name: value for name, value in settings.items() if name in spec.get("of", [spec])[0]}
        parts = [part | options if "rank" in part else part for part in spec.get("of", [spec])]
        method = lj.from_spec(spec | {"of": parts} if "of" in spec else parts[0])
        batches = dataclasses.replace(schedule(buckets=buckets), seed=config.seed)
        name = ",".join(f"{key}={value}" for key, value in settings.items())
        sweep_members.append(sweep.Member(name, config, method, params, batches))
    return sweep_members


def ready(workdir: Path, sweep_members: list[sweep.Member], **options: Any) -> training.Job:
    model, params = model_and_params()
    base = checkpoints.identity(params, "tiny")
    objective = training.language_model(model, 0.1)
    config = run_config(members=",".join(member.name for member in sweep_members))
    options = {"validation": schedule(8, seed=1)} | options
    return sweep.prepare(config, workdir, sweep_members, base=base, objective=objective, **options)


def alone(workdir: Path, member: sweep.Member, **options: Any) -> training.Result:
    changes = {"method": member.method, "batches": member.batches} | options
    return training.train(prepare(workdir, member.config, **changes))


def close(one: Any, other: Any) -> None:
    """2e-5 of each array's largest entry after ten steps of Adam: the same sums in another order."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
