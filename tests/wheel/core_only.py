"""An install without extras: a LoRA step on plain JAX, and errors that name the extra. `.ci/wheel` runs it."""

import importlib
import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from lora_jax import sharding

assert "site-packages" in lj.__file__ and (Path(lj.__file__).parent / "py.typed").is_file()
assert lj.__version__ == importlib.metadata.version("lora_jax")


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


keys = jax.random.split(jax.random.key(0), 4)
params = {name: {"kernel": jax.random.normal(key, (8, 8)) / 3} for name, key in zip(("up", "down"), keys, strict=False)}
x, y = (jax.random.normal(key, (32, 8)) for key in keys[2:])
method = lj.lora(lj.select("*/kernel"), rank=2, alpha=4)
delta = method.init(jax.random.key(1), params)
tx = lj.freeze_base(optax.adam(1e-2))
state, forward = tx.init(delta), lj.lift(model)


@jax.jit
def step(delta, state):
    loss = lambda delta: jnp.mean((forward(method.apply(params, delta), x) - y) ** 2)  # noqa: E731
    value, grads = jax.value_and_grad(loss)(delta)
    updates, state = tx.update(grads, state, delta)
    return optax.apply_updates(delta, updates), state, value


losses = []
for _ in range(20):
    delta, state, value = step(delta, state)
    losses.append(float(value))
assert sharding.make_mesh({}).size == 1
assert losses[-1] < 0.9 * losses[0], losses
merged = lj.merge(method.apply(params, delta))
difference = jnp.abs(model(merged, x) - forward(method.apply(params, delta), x)).max()
assert difference < 1e-5, difference

EXTRAS = {"models.gpt2": "train", "training": "train", "checkpoints": "train", "runs": "train,hf,data"}
EXTRAS |= {"interop.hf": "hf", "interop.peft": "hf", "generation": "hf", "data.pairs": "data"}
for module, name in EXTRAS.items():
    try:
        importlib.import_module(f"lora_jax.{module}")
    except ImportError as error:
        assert f'pip install "lora_jax[{name}]"' in str(error), (module, error)
    else:
        raise AssertionError(f"lora_jax.{module} was imported without the extra {name}")
try:
    importlib.import_module("lora_jax.metrics").bleu(["a"], [["a"]])
except ImportError as error:
    assert 'pip install "lora_jax[scores]"' in str(error), error
else:
    raise AssertionError("BLEU without sacrebleu")
print("the wheel alone: a step, and errors that name the extra")
