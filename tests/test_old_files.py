"""Files that earlier versions wrote load to the same arrays, and their runs resume to the same losses.

`tests/fixtures/make.py` says what the files are and which commit wrote them.
"""

import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

import lora_jax as lj
from configs import glue
from lora_jax import checkpoints, training
from lora_jax.interop import hf, peft
from tests.helpers.cli import ROOT, run_entry

FIXTURES = ROOT / "tests" / "fixtures"
VOCABULARY, WIDTH, LAYERS = 11, 6, 2
TOKENS = np.array([[3, 0, 7, 10, 2], [5, 5, 1, 9, 4]], np.int32)
PREFIXED = np.array([[11, 3, 0, 12, 7], [11, 5, 12, 9, 4]], np.int32)  # ids beyond the vocabulary: placeholders
ADAPTERS = sorted(path.stem for path in (FIXTURES / "adapters").glob("*.safetensors"))
NOT_MERGED = ("adapter", "compacter", "prefix_embedding", "prefix_layer", "bank", "chain_of_sites")
METHODS = {
    *("lora", "tune", "dora", "pissa", "vera", "ia3", "lokr", "shift", "rows", "chain", "bank"),
    *("adapter", "compacter", "prefix_embedding", "prefix_layer"),
}
RUN = [
    "--config.data.path=data",
    "--config.base=base",
    "--config.data.batch_size=4",
    "--config.data.buckets=2",
    "--config.lora.rank=2",
    "--config.epochs=2",
    "--config.optimizer.learning_rate=1e-2",
    "--config.optimizer.warmup_steps=3",
    "--config.optimizer.final_share=0.1",
    "--config.optimizer.b_ratio=2.0",
    "--config.log_every=1",
    "--config.save_every=5",
    "--config.keep=10",
]
SWEEP = [*RUN, "--config.sweep.rank=1,2", "--config.steps=6"]


def network(params: Mapping[str, Any], tokens: jax.Array, *, full: bool) -> jax.Array:
    """Logits (batch, length, vocabulary) of a small network with every kind of weight that an adapter can stand on: an
    embedding, matrices, and, in the whole of it, a stack that is scanned and a convolution."""
    embedding = params["wte"]["embedding"]
    x = embedding[checkpoint_name(tokens, "tokens")]

    def dense(layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
        return x @ layer["kernel"] + layer["bias"][None, None]

    for n in range(LAYERS):
        layer = params[f"h_{n}"]
        x = x + jnp.tanh(dense(layer["query"], x)) * dense(layer["value"], x)
        x = x + checkpoint_name(dense(layer["down"], jnp.tanh(dense(layer["up"], x))), "mlp_out")
        x = checkpoint_name(x, "block_out")
    if not full:
        return x @ embedding.T
    x = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["stack"]["kernel"])[0]
    window = lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return (x + window) @ embedding.T


def merged(method: lj.ParamTransform, delta: lj.Delta, params: Any) -> dict[str, jax.Array]:
    """The merged leaves that differ from the base, by path."""
    base = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    leaves = jax.tree_util.tree_flatten_with_path(lj.merge(method.apply(params, delta)))[0]
    changed = {path: leaf for path, leaf in leaves if leaf is not base[path]}
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in changed.items()}


def applied(name: str, method: lj.ParamTransform, delta: lj.Delta, params: Any) -> dict[str, jax.Array]:
    """The network's output with an adapter, and the merged leaves that differ from the base."""
    tokens = PREFIXED if "prefix" in name or name == "chain_of_sites" else TOKENS
    rows = {"strength": jnp.array([1, 0])} if name == "bank" else {}
    full = any(path.startswith(("stack/", "conv/")) for path in delta)
    output = lj.lift(partial(network, full=full), on_dense="allow")(method.apply(params, delta, **rows), tokens)
    weights = {} if name.partition("__")[0] in NOT_MERGED else merged(method, delta, params)
    return {f"{name}/output": output} | {f"{name}/merged/{path}": leaf for path, leaf in weights.items()}


def flat(delta: lj.Delta) -> dict[str, np.ndarray]:
    return {f"{path}:{name}": np.asarray(x) for path, factors in delta.items() for name, x in factors.items()}


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`{"a/b/c": array}` as nested dicts."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(array)
    return tree


def fingerprint(delta: lj.Delta) -> str:
    """SHA-256 of the names, dtypes, shapes and bits of a delta's arrays; what PEFT's loader computes from the base,
    where the last bit depends on the CPU, is left out (`fixed_...`)."""
    digest = hashlib.sha256()
    for name, x in sorted(flat(delta).items()):
        if ":fixed_" not in name:
            digest.update(f"{name} {x.dtype} {x.shape} ".encode() + x.tobytes())
    return digest.hexdigest()


def expected(kind: str) -> dict[str, Any]:
    """What expected.json says of adapters, PEFT folders, runs or the optimizer."""
    return json.loads((FIXTURES / "expected.json").read_text())[kind]


def part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def assert_close(got: Mapping[str, Any], want: Mapping[str, np.ndarray]) -> None:
    """Within 1e-6 of the largest entry: the same float32 sums, which another CPU takes in another order."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-6 * np.abs(x).max(), err_msg=name)


def command_line(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """`experiments.train` in a folder that holds base and data; compiled without optimizations, as the tests are."""
    env = {"XLA_FLAGS": os.environ.get("XLA_FLAGS") or "--xla_backend_optimization_level=0"}
    return run_entry("train", f"--config={ROOT}/configs/e2e.py:small", *flags, env=env, cwd=folder)


def unpacked(name: str, folder: Path) -> Path:
    """A folder with the base, the data and the workdir of an archive."""
    for shared in ("base", "data"):
        shutil.copytree(FIXTURES / shared, folder / shared)
    with zipfile.ZipFile(FIXTURES / f"{name}.zip") as opened:
        opened.extractall(folder / name)
    return folder / name


def measured(workdir: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl without what the clock says."""
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in entry.items() if name not in training.TIMES} for entry in entries]


def assert_same_metrics(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """Within 1e-5: equal to the last digit on the CPU that made the files, others add float32 in another order."""
    assert [entry.keys() for entry in got] == [entry.keys() for entry in want]
    for entry, expected in zip(got, want, strict=True):
        assert entry == pytest.approx(expected, rel=1e-5, abs=1e-9), expected["step"]


@pytest.fixture(scope="module")
def base() -> Any:
    """The parameters of the GPT-2 in fixtures/base."""
    return hf.load(FIXTURES / "base")[1]


def test_adapters_of_every_method() -> None:
    arrays = safetensors.numpy.load_file(FIXTURES / "adapters_expected.safetensors")
    params = nested(part(arrays, "params/"))
    identity = checkpoints.identity(params, "fixture")
    methods, deltas, fingerprints = {}, {}, {}
    for name in ADAPTERS:
        methods[name], deltas[name], info = checkpoints.load_adapter(FIXTURES / "adapters" / f"{name}.safetensors")
        checkpoints.check_base(info["base"], identity, name)
        fingerprints[name] = [fingerprint(deltas[name]), sorted(flat(deltas[name]))]
    assert fingerprints == expected("adapters")
    assert set(ADAPTERS) >= METHODS

    @jax.jit
    def everything(deltas: dict[str, lj.Delta]) -> dict[str, jax.Array]:
        parts = [applied(name, methods[name], deltas[name], params) for name in ADAPTERS]
        return {key: array for arrays in parts for key, array in arrays.items()}

    assert_close(everything(deltas), {name: x for name, x in arrays.items() if not name.startswith("params/")})


def test_an_adapter_saved_again_has_the_same_arrays_and_base(tmp_path: Path) -> None:
    for name in ADAPTERS:
        method, delta, info = checkpoints.load_adapter(FIXTURES / "adapters" / f"{name}.safetensors")
        file = checkpoints.save_adapter(tmp_path / f"{name}.safetensors", method, delta, info["base"])
        _, again, info_again = checkpoints.load_adapter(file)
        assert fingerprint(again) == fingerprint(delta)
        assert info_again["base"] == info["base"]


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_peft_folders(writer: str, base: Any, tmp_path: Path) -> None:
    """Of our export and of PEFT itself: the same arrays, merged weights, and files when saved again."""
    arrays = part(safetensors.numpy.load_file(FIXTURES / "peft_expected.safetensors"), f"{writer}/")
    fingerprints = expected("peft")[writer]
    assert fingerprints.keys() == {path.name for path in (FIXTURES / "peft" / writer).iterdir()}
    loaded = {name: peft.load(FIXTURES / "peft" / writer / name, base) for name in fingerprints}
    for name, (method, delta) in loaded.items():
        assert [fingerprint(delta), sorted(flat(delta))] == fingerprints[name], name
        peft.save(tmp_path / name, method, delta, params=base)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (FIXTURES / "peft" / writer / name / file).read_bytes()

    @jax.jit
    def everything(deltas: dict[str, lj.Delta]) -> dict[str, dict[str, jax.Array]]:
        return {name: merged(loaded[name][0], delta, base) for name, delta in deltas.items()}

    for name, weights in everything({name: delta for name, (_, delta) in loaded.items()}).items():
        assert_close(weights, part(arrays, f"{name}/"))


def test_the_checkpoint_of_a_stopped_run_loads(base: Any, tmp_path: Path) -> None:
    workdir = unpacked("half", tmp_path)
    run = checkpoints.load(workdir)
    assert (run.step, run.method.spec["method"], run.config["lora"]["rank"]) == (5, "lora", 2)
    assert fingerprint(run.delta) == expected("runs")["half"]
    checkpoints.check_base(checkpoints.meta_of(workdir)["base"], checkpoints.identity(base, "base"), workdir)


def test_a_stopped_run_resumes_to_the_same_losses(tmp_path: Path) -> None:
    """With the config's keys under the names they had then."""
    workdir = unpacked("half", tmp_path)
    stopped, losses = measured(workdir), expected("metrics")["half"]
    assert stopped == losses[: len(stopped)] and len(stopped) < len(losses)
    done = command_line(tmp_path, "--workdir=half", *RUN)
    assert done.returncode == 0, done.stderr
    assert_same_metrics(measured(workdir), losses)
    got = flat(checkpoints.load_adapter(workdir / "adapter")[1])
    want = flat(checkpoints.load_adapter(FIXTURES / "half_adapter.safetensors")[1])
    assert got.keys() == want.keys()
    for name, x in want.items():  # Adam divides by small numbers: within 1e-4 of the largest entry
        np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-4 * np.abs(x).max(), err_msg=name)


def test_the_members_of_a_sweep_load(tmp_path: Path) -> None:
    workdir = unpacked("sweep", tmp_path)
    for name in ("rank=1", "rank=2"):
        run = checkpoints.load(workdir / name)
        assert (run.step, run.config["lora"]["rank"]) == (6, int(name[-1]))
        assert fingerprint(run.delta) == expected("runs")[name]
        assert fingerprint(checkpoints.load_adapter(workdir / name / "adapter")[1]) == fingerprint(run.delta)


@pytest.mark.slow
def test_a_stopped_sweep_resumes_to_the_same_losses(tmp_path: Path) -> None:
    workdir = unpacked("sweep", tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "6")  # as killed after step 5
    for name in ("rank=1", "rank=2"):
        for folder in ("checkpoints", "adapter"):
            shutil.rmtree(workdir / name / folder)
    done = command_line(tmp_path, "--workdir=sweep", *SWEEP)
    assert done.returncode == 0, done.stderr
    for name in ("rank=1", "rank=2"):
        assert_same_metrics(measured(workdir / name), expected("metrics")[name])


def old_config() -> ConfigDict:
    return ConfigDict(json.loads((FIXTURES / "old_config.json").read_text()))


def rates_and_updates(options: ConfigDict) -> dict[str, list]:
    """The learning rates of a run of 12 steps, and LoRA's third update, of an optimizer's options."""
    rate = training.schedule(options, 12)
    tx = training.optimizer(options, rate)
    numbers = jnp.arange(1.0, 9.0, dtype=jnp.float32) / 8
    delta = lj.Delta({"w/kernel": {"a": numbers.reshape(4, 2), "b": jnp.cos(7 * numbers).reshape(2, 4)}})
    gradients = jax.tree.map(lambda x: jnp.sin(3 * x), delta)
    state, update = tx.init(delta), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(gradients, state, delta)
    updates = {name: x.ravel().tolist() for name, x in updates["w/kernel"].items()}
    return updates | {"rates": jax.jit(jax.vmap(rate))(jnp.arange(13)).tolist()}


def test_an_old_config_has_the_same_schedule_and_optimizer() -> None:
    """`final_share`, `warmup_share` and `b_ratio`, as config.json of a workdir has them."""
    options = old_config().optimizer
    assert (options.final_share, options.warmup_share, options.b_ratio) == (0.1, 0.25, 4.0)
    want = {name: np.array(x) for name, x in expected("optimizer").items()}
    assert_close({name: np.array(x) for name, x in rates_and_updates(options).items()}, want)


def test_an_old_config_is_that_of_the_same_run_today(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "old_config.json", tmp_path / "config.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    config = glue.get_config("base,mrpc,lora")
    for name, value in {"final_share": 0.1, "warmup_share": 0.25, "b_ratio": 4.0}.items():
        config.optimizer[name] = value
    config.keep = 5
    training.claim(tmp_path, config)
    config.optimizer.warmup_share = 0.5
    with pytest.raises(ValueError, match=r"0\.25 there and 0\.5 here"):
        training.claim(tmp_path, config)
