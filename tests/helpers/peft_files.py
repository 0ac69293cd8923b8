"""Adapters written by PEFT and read here, written here and read by PEFT."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.interop import peft
from tests.helpers.peft_models import adapter, assert_close, base, ours, read_by_peft, theirs, tolerance, written

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QV = "**/attn/{query,value}/kernel"

QKV = "**/attn/{query,key,value}/kernel"

LM = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7, "fan_in_fan_out": True}

CLS = {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 7}


def trained(method, params, seed=3):
    """A delta whose factors that train are away from their first values."""
    rng = np.random.default_rng(seed)
    delta = method.init(jax.random.key(0), params)
    return lj.Delta(
        {
            path: {
                name: leaf if name.startswith("fixed_") else leaf + jnp.asarray(rng.normal(size=leaf.shape) * 0.3, "f4")
                for name, leaf in factors.items()
            }
            for path, factors in delta.items()
        }
    )


def spoiled(folder, to, change=lambda tensors: tensors, **fields):
    """A copy of an adapter with other tensors and fields."""
    shutil.copytree(folder, to)
    config = json.loads((to / CONFIG).read_text())
    (to / CONFIG).write_text(json.dumps(config | fields))
    save_file(change(load_file(to / WEIGHTS)), to / WEIGHTS, metadata={"format": "pt"})
    return to


def filled(method, params, seed=3):
    rng = np.random.default_rng(seed)
    delta = jax.eval_shape(method.init, jax.random.key(0), params)
    return jax.tree.map(lambda leaf: jax.device_put((rng.normal(size=leaf.shape) * 0.3).astype(leaf.dtype)), delta)


def out(kind, method, tmp_path, delta=None):
    """Saves a method with random numbers, has PEFT read it and reads it here; all predict alike. Config and tensors."""
    params = base(kind).params
    delta = filled(method, params) if delta is None else delta
    peft.save(tmp_path / "ours", method, delta, params=params)
    want = ours(kind, method.apply(params, delta))
    assert np.abs(want - ours(kind, params)).max() > 1e-3
    assert_close(theirs(read_by_peft(kind, tmp_path / "ours")), want, tolerance(kind))
    again, read = peft.load(tmp_path / "ours", params)
    assert_close(ours(kind, again.apply(params, read)), want, tolerance(kind))
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    return config, {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def names(folder):
    return sorted(name.removeprefix("base_model.model.") for name in load_file(folder / "adapter_model.safetensors"))


def config_of(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    sets = ("target_modules", "feedforward_modules")  # there, so that their order says nothing
    return config | {name: sorted(config[name]) for name in sets if isinstance(config.get(name), list)}


def there_and_back(kind, tmp_path, params=None, **fields):
    """Reads what PEFT wrote, compares logits, writes it again, has PEFT read that; method and delta."""
    made = adapter(kind, **fields)
    folder = written(made, tmp_path / "theirs")
    want, plain = theirs(made), theirs(base(kind).torch)
    params = base(kind).params if params is None else params
    method, delta = peft.load(folder, params)
    assert float(np.abs(want - plain).max()) > 0.01
    assert_close(ours(kind, method.apply(params, delta)), want, tolerance(kind))
    assert_close(ours(kind, lj.merge(method.apply(params, delta))), want, tolerance(kind))
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {np.dtype("float32")}
    peft.save(tmp_path / "ours", lj.from_spec(json.loads(json.dumps(method.spec))), delta, params=params)
    again = tmp_path / "ours"
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (folder / weights).read_bytes()
    assert config_of(again) == config_of(folder)
    assert not (again / "adapter_config.json").read_text().endswith("\n")
    return method, delta, again, want


def without_peft(method):
    """The method as if it had been made here."""
    return lj.from_spec({name: value for name, value in method.spec.items() if name != "peft"})
