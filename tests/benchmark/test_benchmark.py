"""The comparison with peers: its processes, its arithmetic, its files. Speeds are not tested."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import lora_jax as lj
from experiments.benchmark import contests, ours, report, shapes
from experiments.benchmark.side import Missing, Side
from lora_jax import training
from lora_jax.planning.flops import equations
from lora_jax.runs import tables

WORK = {"model": "small_base", "targets": "qv", "batch": 2, "length": 8}
SIZES = {"vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "inner": "intermediate_size"}
SIZES |= {"heads": "num_attention_heads", "key_heads": "num_key_value_heads"}


@pytest.mark.parametrize(("model", "layers"), [("small_base", 2), ("roberta_base", 3), ("smollm2", 2)])
@pytest.mark.parametrize("targets", ["qv", "all"])
def test_the_floor_has_every_product_with_a_frozen_weight(
    model, layers, targets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Those of our step that contract or give a model's width or its keys', traced, without attention, thin products
    and a head of few labels; the factors' entries, too."""
    shape = shapes.MODELS[model] | {"layers": layers}
    monkeypatch.setitem(shapes.MODELS, model, shape)
    work = WORK | {"model": model, "targets": targets}
    if shape["kind"] == "llama":
        work["weights"] = str(tmp_path)
        sizes = {SIZES[name]: value for name, value in shape.items() if name in SIZES}
        (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "llama", "tie_word_embeddings": True}))
    narrowest = shape["width"] // shape["heads"] * shape.get("key_heads", shape["heads"])
    net = ours.model_of(work)
    params = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), "int32"))["params"]
    method = ours.lora_of(net, work)
    objective = training.classifier(net) if shape["kind"] == "roberta" else training.language_model(net)
    delta = jax.eval_shape(method.init, jax.random.key(0), params)
    factors = jax.tree.leaves({path: factors for path, factors in delta.items() if "a" in factors})
    assert sum(x.size for x in factors) == shapes.trained(work)

    def loss(half: Any, fixed: Any, params: Any, batch: Any) -> Any:
        adapted = method.apply(params, lj.rejoin(half, fixed))
        return objective.loss(adapted, batch)[0]

    traced = jax.make_jaxpr(jax.grad(loss))(*lj.partition(delta), params, ours.batch_of(work))
    counts: dict[int, int] = {}
    for eqn in equations(traced.jaxpr):
        if eqn.primitive.name != "dot_general":
            continue
        (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        inner, outer = math.prod(shape[axis] for axis in contracted), math.prod(eqn.outvars[0].aval.shape)
        tokens = work["batch"] * work["length"]
        if not batched and min(inner, outer // tokens) >= narrowest and outer % tokens == 0:
            counts[2 * inner * outer] = counts.get(2 * inner * outer, 0) + 1
    expected: dict[int, int] = {}
    for shape, count in shapes.products(work).items():
        flops = 2 * math.prod(shape)
        expected[flops] = expected.get(flops, 0) + count
    assert counts == expected


def test_a_side_does_its_parts_in_a_process_of_its_own():
    side = Side("ours:step", WORK)
    try:
        assert side.run("unit") > 0
        peak = side.peak
        assert side.run("floor") > 0 and side.peak == peak > 10**8
        with pytest.raises(Missing, match="KeyError"):
            side.run("nonsense")
    finally:
        side.close()


@pytest.mark.slow
def test_a_peer_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "qwix.py").write_text("raise ModuleNotFoundError(name='qwix')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Missing, match="no module qwix"):
        Side("flax_peers:qwix_step", WORK)


def test_a_side_of_another_loss_ends_the_comparison():
    for close in (2.0, 2.0001, 1.9999):
        report.check_loss("peer", close, 2.0)
    for far in (2.001, 1.99, math.nan):
        with pytest.raises(ValueError, match="peer has a loss of"):
            report.check_loss("peer", far, 2.0)


def test_ratios_are_of_the_same_round():
    seconds = {
        "ours": {"unit": [1.0, 2.0, 4.0], "floor": [0.5, 0.5, 0.5]},
        "peer": {"unit": [2.0, 6.0, 4.0], "floor": [1.0, 1.0, 1.0]},
    }
    sides = {"ours": {"peak": 10}, "peer": {"peak": 5}}
    contest = contests.Contest("step/x/qv", {}, ("unit", "floor"))
    ratios = report.ratios(contest, seconds, sides)
    assert ratios["peer"] == {
        "peak": 0.5,
        "ratio_median": 2.0,
        "ratio_low": 1.0,
        "ratio_high": 3.0,
        "normalised_median": 1.0,
        "normalised_low": 0.5,
        "normalised_high": 1.5,
    }
    assert ratios["ours"] == {"over_floor_median": 4.0, "over_floor_low": 2.0, "over_floor_high": 8.0}


def test_what_is_written(tmp_path: Path):
    ratios = {"peer": {"peak": 0.5, "ratio_median": 2.0, "ratio_low": 1.0, "ratio_high": 3.0}}
    how = {"command": "c", "device": "d", "seed": 0}
    report.write(tmp_path / "b.json", {"contests": {"step/x/qv": {"ratios": ratios, "how": how}}})
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["step"]["x"]["qv"]["peer"]["ratio_median"] == 2.0
    assert written["rows"][0]["times_ratio"] == {"score": 2.0, "low": 1.0, "high": 3.0}
    assert (tmp_path / "b.png").is_file()


def test_names_of_contests(tmp_path: Path):
    all_contests = contests.all_of(dict.fromkeys(("base", "data", "bert", "glue")), tmp_path)
    names = [each.name for each in all_contests]
    assert "step/gpt2_medium/all" in names and "sweep" not in names
    assert all(report.wanted(name, []) for name in names) and not report.wanted("sweep", [])
    assert [name for name in names if report.wanted(name, ["step/*/qv"])] == [n for n in names if n.endswith("/qv")]
    parts = {part for each in all_contests for part in each.parts} - {"unit", "floor"}
    assert {f"times_{part}" for part in parts} <= set(tables.COLUMNS)


def python(code: str, **env: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", code], env=kept | env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_an_entry_point_starts_with_huge_pages_and_an_import_does_not(monkeypatch: pytest.MonkeyPatch):
    shown = "import os, sys; print(os.environ.get('GLIBC_TUNABLES'), sys.argv)"
    start = "import sys; sys.argv[0] = '-m'; sys.orig_argv[1:] = ['-c', {!r}, 'experiments.x']; import experiments"
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert python(start.format(shown)) == "glibc.malloc.hugetlb=1 ['-c', 'experiments.x']"
    assert python(f"import experiments; {shown}") == "None ['-c']"
    assert python(start.format(shown) + f"; {shown}", GLIBC_TUNABLES="") == "['-m']"


@pytest.mark.slow
def test_what_is_compiled_is_kept_where_the_user_says(tmp_path: Path):
    code = "import jax; from experiments import cli; cli.keep_compiled(); print(jax.config.jax_compilation_cache_dir)"
    assert python(code, XDG_CACHE_HOME=str(tmp_path)) == f"{tmp_path}/lora_jax"
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    assert python(code, XDG_CACHE_HOME=str(tmp_path), **env) == env["JAX_COMPILATION_CACHE_DIR"]
