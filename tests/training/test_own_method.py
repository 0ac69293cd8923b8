"""The method of docs/how_to/your_method.md, in a file outside the package: trained, reloaded, counted and timed."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax as lj
from configs import e2e
from lora_jax import checkpoints, runs, training
from lora_jax.core.transforms import registry
from lora_jax.distributed import sharding
from lora_jax.models import gpt2
from lora_jax.runs import bases, methods, reload
from lora_jax.training import sweep
from tests.helpers import sweeps
from tests.helpers.cli import ROOT, run, run_entry
from tests.helpers.runs import model_and_params, run_config

PAGE = (ROOT / "docs/how_to/your_method.md").read_text()
FILE = "\n".join(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "print(" not in block)


@pytest.fixture(scope="module")
def folder(inputs: Path) -> Path:
    (inputs / "mine.py").write_text(FILE)
    return inputs


def test_the_pages_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry._METHODS, "lora_xs", raising=False)  # the page's blocks may have run before
    method_flag = f"--config.method={folder}/mine.py:method"
    done = run(folder, folder / "run", method_flag, "--config.data.buckets=1", "--config.optimizer.learning_rate=0.05")
    assert done.returncode == 0, done.stderr
    losses = [e["validation_loss"] for e in training.read_metrics(folder / "run") if "validation_loss" in e]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="method 'lora_xs' is not known"):
        checkpoints.load(folder / "run")  # nobody told this process
    flags = [f"--workdir={folder}/run", "--context=name : Alba", "--max_new_tokens=2"]
    done = run_entry("generate", *flags)
    assert done.returncode == 1 and "'lora_xs' is not known" in done.stderr and "--code=FILE.py" in done.stderr
    done = run_entry("generate", *flags, f"--code={folder}/mine.py")
    assert done.returncode == 0 and "name : Alba" in done.stdout, done.stderr


@jax.numpy_rank_promotion("allow")  # a user's code
def test_the_pages_method_has_traits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its rank is swept, each member as alone; its factors have a place on a mesh; its matrices decay; it adds."""
    names: dict[str, Any] = {}
    exec(FILE, names)
    select = {"method": "lora_xs", "select": ["**/attn/{query,value}/kernel"]}
    members = sweeps.members([{"rank": 1}, {"rank": 3}], select | {"rank": 2}, buckets=1)
    alone = [sweeps.alone(tmp_path / "alone" / member.name, member, validation=None) for member in members]
    results = sweep.train(sweeps.ready(tmp_path / "sweep", members, validation=None))
    assert results is not None
    for result, expected in zip(results, alone, strict=True):
        assert result is not None
        sweeps.close(result.delta, expected.delta)
    (one, method), (other, _) = ((result.delta, member.method) for result, member in zip(results, members, strict=True))
    params = members[0].params
    summed, delta = lj.arithmetic.add([(method, one), (members[1].method, other)], [1, -2], params=params)
    of = (method, members[1].method, summed)
    merge = jax.jit(lambda deltas: [lj.merge(m.apply(params, d)) for m, d in zip(of, deltas, strict=True)])
    base, *merged = jax.device_get([params, *merge([one, other, delta])])
    expected = jax.tree.map(lambda base, a, b: base + (a - base) - 2 * (b - base), base, *merged[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged[2], expected)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = sharding.rules_for(model_and_params()[0], mesh)
    places = sharding.shardings(other, mesh, rules, jax.eval_shape(members[1].method.apply, params, other))
    assert not caplog.text and all(place.is_fully_replicated for place in jax.tree.leaves(places))
    options = run_config(**{"optimizer.decay": ("matrices",), "optimizer.warmup_steps": 0}).optimizer
    tx = training.optimizer(options, lambda step: 1.0, spec=method.spec)
    zeros = jax.tree.map(np.zeros_like, jax.device_get(one))
    updates, _ = jax.jit(lambda zeros, one: tx.update(zeros, tx.init(one), one))(zeros, one)
    decay = updates["h_0/attn/query/kernel"]
    assert decay["r"].any() and not decay["fixed_a"].any()


@pytest.mark.slow
def test_the_pages_method_is_counted_and_timed(folder: Path) -> None:
    method_flag = f"--config.method={folder}/mine.py:method"
    config = ["--config=configs/e2e.py:small", method_flag, f"--config.base={folder}/base"]
    done = run_entry("count", *config)
    assert done.returncode == 0, done.stderr
    assert "trained: 32 of" in done.stdout  # R of 4 x 4 in two matrices of one layer
    data = [f"--config.data.path={folder}/data", "--config.data.batch_size=4", "--config.data.buckets=1"]
    done = run_entry("speed", *config, *data, "--rounds=1", "--steps=1", f"--workdir={folder}/speed")
    assert done.returncode == 0, done.stderr
    assert "mine.py:method" in done.stdout


def test_what_is_no_method_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("one = 1\n")
    config, model = e2e.get_config("small"), gpt2.GPT2(gpt2.SIZES["small"])
    for name, error, message in [
        (f"{tmp_path}/nothing.py:method", FileNotFoundError, "nothing.py does not exist"),
        (f"{tmp_path}/mine.py:other", ValueError, "has no function 'other'"),
        (f"{tmp_path}/mine.py:one", ValueError, "has no function 'one'"),
        ("other", ValueError, "the config has no method 'other'"),
    ]:
        config.method = name
        with pytest.raises(error, match=message):
            methods.spec(config, model)


EVIL = """
from pathlib import Path

Path(__file__).with_name("marker").touch()
method = task = None
"""


@pytest.mark.parametrize("key", ["method", "data.name"])
def test_reading_a_run_never_runs_a_file_that_it_names(folder: Path, tmp_path: Path, key: str) -> None:
    """By every function that reads a workdir, directly or as another run's start; what the user names runs."""
    config = e2e.get_config("small")
    config.base, config.data.path, config.decode.max_new_tokens = str(folder / "base"), str(folder / "data"), 1
    base = bases.load(config)
    lora = lj.from_spec(methods.spec(config, base.model))
    delta = jax.jit(lora.init)(jax.random.key(0), base.params)
    workdir = runs.import_run(
        checkpoints.save_adapter(tmp_path / "adapter", lora, delta, base.identity), config, tmp_path / "run"
    ).adapter.parents[1]
    file = tmp_path / f"{key}.py"
    file.write_text(EVIL)
    stored = json.loads((workdir / "config.json").read_text())
    if key == "method":
        stored["method"] = f"lora+{file}:method"
    else:
        stored["data"]["name"] = f"{file}:task"
    (workdir / "config.json").write_text(json.dumps(stored))
    started = config.copy_and_resolve_references()
    started.warm_start = str(workdir)
    readers: list[Callable[[], Any]] = [
        *(functools.partial(runs.load, workdir, params=kind) for kind in ("base", "adapted", "merged")),
        *(functools.partial(runs.export_run, workdir, form, tmp_path / form) for form in ("merged", "peft", "native")),
        lambda: reload.adapter(workdir, base),
        lambda: checkpoints.load(workdir),
        lambda: runs.predict(workdir),
        lambda: runs.prepare(started, tmp_path / "started"),
        lambda: runs.import_run(workdir, config, tmp_path / "imported"),
    ]
    outcomes = []
    for read in readers:
        try:
            outcomes.append(read())
        except ValueError as error:
            outcomes.append(None)
            runs_none = "reading a run runs no file that it names"
            expected = "give it to experiments.evaluate" if key == "method" else runs_none
            assert expected in str(error)
        assert not (tmp_path / "marker").exists(), read
    assert outcomes[5] is not None and outcomes[6] is not None  # the spec is all that these need
    with pytest.raises(ValueError, match=r"has no function 'method'|that is no Task"):
        config.update_from_flattened_dict({key: stored["method"] if key == "method" else stored["data"]["name"]})
        runs.train(config, tmp_path / "trained")
    assert (tmp_path / "marker").exists()
