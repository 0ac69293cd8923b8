"""A run whose base is kept in 4 or 8 bits: its config, its adapter on another base, its merged model."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from configs import e2e
from lora_jax import checkpoints, runs
from lora_jax.core.selection import flatten
from lora_jax.runs import bases
from tests.helpers.cli import make_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bits")
    make_inputs(made)
    return made


def config_of(folder: Any, bits: str | None, **changes: Any) -> Any:
    config = e2e.get_config("small,lora")
    config.base, config.data.path, config.model.base_bits = str(folder / "base"), str(folder / "data"), bits
    config.update_from_flattened_dict({"lora.rank": 2, "steps": 2, "data.buckets": 1, "data.length": 64} | changes)
    return config


@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("scan", [False, True])
def test_the_matrices_of_the_layers_are_quantized(folder, bits, scan):
    """Not the embeddings, which are the head too; and the base is the same one."""
    config = config_of(folder, bits, **{"model.scan_layers": scan})
    base, plain = bases.load(config), bases.load(config_of(folder, None, **{"model.scan_layers": scan}))
    quantized = {path for path, leaf in flatten(base.params)[0] if isinstance(leaf, lj.Quantized)}
    assert quantized == {path for path, _ in flatten(base.params)[0] if path.endswith("kernel")}
    assert base.identity == plain.identity | {"bits": bits}
    assert lj.check(lj.lora(lj.select("wte/*"), rank=1), base.params).total == sum(
        leaf.size for leaf in jax.tree.leaves(plain.params)
    )
    merged = lj.merge(base.params)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, plain.params)


def test_other_values_of_base_bits_are_refused(folder):
    with pytest.raises(ValueError, match=r"model\.base_bits='5': choose '4', '8', 'file'"):
        runs.train(config_of(folder, "5"), folder / "none")
    with pytest.raises(ValueError, match="is no GGUF file: only such a file has blocks of its own"):
        bases.load(config_of(folder, "file"))


def test_an_adapter_of_a_quantized_base_loads_on_the_plain_one_with_a_note(caplog):
    params = {"w": np.ones((2, 2), np.float32)}
    plain = checkpoints.identity(params, "here")
    with caplog.at_level(logging.WARNING):
        checkpoints.check_base(plain | {"bits": "4"}, plain, "adapter")
    assert "adapter was trained on its base in 4 bits, which is as it is here" in caplog.text
    caplog.clear()
    checkpoints.check_base(plain, plain, "adapter")
    assert not caplog.text


@pytest.mark.slow
def test_a_run_trains_resumes_and_merges(folder, tmp_path):
    config = config_of(folder, "4")
    result = runs.train(config, tmp_path / "run")
    assert result.finished and result.summary is not None
    loaded = runs.load(tmp_path / "run", params="merged")
    assert not any(isinstance(leaf, lj.Quantized) for _, leaf in flatten(loaded.params)[0])
    with pytest.raises(ValueError, match=r"model\.base_bits is '4' there and '8' here"):
        runs.train(config_of(folder, "8"), tmp_path / "run")
