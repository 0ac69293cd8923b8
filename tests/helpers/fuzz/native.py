"""Our own files: adapters, and the workdir of a run with two checkpoints."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import checkpoints
from lora_jax.checkpoints.files import digest, table_of
from tests.helpers.fuzz.mutations import Files, header_of, packed, spoil, spoil_json
from tests.helpers.fuzz.runner import Part
from tests.helpers.fuzz.tensors import read_tensors

PARAMS = {f"h_{n}": {"attn": {"query": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}}} for n in range(2)}
METHOD = lj.chain(lj.lora(lj.select("**/kernel"), rank=2, alpha={"h_0/**": 4, "**": 2}), lj.tune(lj.select("**/bias")))
ADAPTER = "adapter.safetensors"


class State(NamedTuple):
    step: Any
    delta: Any


def adapters() -> Part:
    with tempfile.TemporaryDirectory() as folder:
        content = checkpoints.save_adapter(folder, METHOD, delta(0), checkpoints.identity(PARAMS, "ones")).read_bytes()
    return Part({ADAPTER: content}, checkpoints.load_adapter, check_adapter, spoil_or_forge)


def delta(seed: int) -> lj.Delta:
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(METHOD.init, jax.random.key(0), PARAMS)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def spoil_or_forge(rng: random.Random, files: Files) -> Files:
    """Of some, the metadata are changed, and the digest is made to fit again: it is no secret."""
    if rng.random() < 0.7:
        return spoil(rng, files)
    header, data = header_of(files[ADAPTER])
    fields = json.loads(header)
    info = json.loads(fields["__metadata__"]["lora_jax"])
    try:
        info = json.loads(spoil_json(rng, json.dumps(info).encode()))
        info.pop("digest", None)
        with tempfile.NamedTemporaryFile(suffix=ADAPTER) as file:
            file.write(files[ADAPTER])
            file.flush()
            info["digest"] = digest(json.dumps([info, table_of(read_tensors(Path(file.name)))]))
        fields["__metadata__"]["lora_jax"] = json.dumps(info)
    except (ValueError, AttributeError, TypeError, RecursionError):
        fields["__metadata__"]["lora_jax"] = spoil_json(rng, json.dumps(info).encode()).decode(errors="replace")
    return {ADAPTER: packed(json.dumps(fields).encode(), data)}


def check_adapter(folder: Path, loaded: Any) -> None:
    method, got, info = loaded
    header = json.loads(header_of((folder / ADAPTER).read_bytes())[0])
    assert info == json.loads(header["__metadata__"]["lora_jax"])
    assert info["base"] is not None and method.spec["method"] == info["spec"]["method"]
    want = read_tensors(folder / ADAPTER)
    assert {f"{path}:{factor}" for path, factors in got.items() for factor in factors} == set(want)
    for path, factors in got.items():
        for factor, array in factors.items():
            same_bits(np.asarray(array), want[f"{path}:{factor}"])


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def workdirs() -> Part:
    """Two checkpoints: a reader may take the older one, with a warning."""
    with tempfile.TemporaryDirectory() as made:
        workdir = Path(made)
        (workdir / "config.json").write_text(json.dumps({"base": "ones", "method": "lora", "seed": 1}))
        with checkpoints.opened(workdir) as manager:
            for step in (1, 2):
                state = State(np.int32(step), delta(step))
                checkpoints.save(manager, step, state, spec=METHOD.spec, base=checkpoints.identity(PARAMS, "ones"))
        files = {str(file.relative_to(workdir)): file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    return Part(files, checkpoints.load, check_workdir)


def check_workdir(folder: Path, run: Any) -> None:
    assert run.step in (1, 2) and run.method.spec == METHOD.spec
    jax.tree.map(lambda got, want: same_bits(np.asarray(got), np.asarray(want)), run.delta, delta(run.step))
    assert run.config == json.loads((folder / "config.json").read_bytes())
