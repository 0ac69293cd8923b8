"""A run from a script, with `pip install "lora_jax[train,hf,data]"` and the files in base and data."""

import shutil

import jax
import numpy as np

from lora_jax import runs

config = runs.default_config("generation")
config.base, config.data.path, config.steps, config.save_every = "base", "data", 4, 2
config.data.batch_size, config.data.buckets, config.optimizer.warmup_steps = 4, 1, 1
straight = runs.train(config, "run")
shutil.rmtree("run/checkpoints/4")  # as if it had been stopped after step 2
resumed = runs.train(config, "run")
jax.tree.map(np.testing.assert_array_equal, resumed.delta, straight.delta)
loaded = runs.load("run")
print(loaded.step, runs.complete(loaded, ["name : Alba | area : riverside"], decoding={"max_new_tokens": 4}))
