"""Forward passes of experiments.latency."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.models import gpt2
from lora_jax.runs.methods import filled

PREFIX = 14


def forwards_of(
    config: gpt2.GPT2Config, batch: int, length: int, ranks: dict[str, int]
) -> dict[str, Callable[[], jax.Array]]:
    """A forward pass of each kind of adaptation."""
    model, sites = gpt2.GPT2(config), gpt2.sites(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    after = {name: sites[name] for name in ("attention_out", "mlp_out")}
    methods = {
        "lora": lj.lora(lj.select("**/attn/{query,value}/kernel", axes=gpt2.AXES), rank=4),
        "adapter_l": lj.adapter({"mlp_out": sites["mlp_out"]}, rank=ranks["adapter_l"], norm=True, activation="relu"),
        "adapter_h": lj.adapter(after, rank=ranks["adapter_h"]),
        "prefix": lj.prefix_layer({"block_out": sites["block_out"]}, vocabulary=config.vocab_size, prefix=PREFIX),
    }
    adapted = {name: method.apply(params, filled(method, params)) for name, method in methods.items()}
    kinds = {"base": params, "lora_merged": lj.merge(adapted["lora"]), **adapted}
    apply = jax.jit(lj.lift(model.apply))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)
    placeholders = np.arange(config.vocab_size, config.vocab_size + PREFIX, dtype=np.int32)
    prefixed = np.concatenate([np.broadcast_to(placeholders, (batch, PREFIX)), tokens], 1)

    def forward(name: str) -> Callable[[], jax.Array]:
        inputs = jnp.asarray(prefixed if name == "prefix" else tokens)
        last = jnp.full((batch, 1), inputs.shape[1] - 1, jnp.int32)
        return lambda: apply({"params": kinds[name]}, inputs, labelled=last)

    return {name: forward(name) for name in kinds}
