"""GPT-2 with adapters and with prefixes: what the tests of each against loops, and against transformers, share."""

from typing import Any

import jax
import numpy as np

import lora_jax as lj
from lora_jax.models import gpt2

V, D = 20, 8
SIZES = {"vocab_size": V, "n_positions": 16, "n_embd": D, "n_layer": 2, "n_head": 2}
CONFIG = gpt2.GPT2Config(**SIZES, eos_token_id=0)
SITES = gpt2.sites(CONFIG)
BOTH = {name: SITES[name] for name in ("attention_out", "mlp_out")}
LAST = {"mlp_out": SITES["mlp_out"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "H": {"sites": BOTH, "rank": 3},
    "L": {"sites": LAST, "rank": 3, "norm": True, "activation": "relu"},
    "P": {"sites": LAST, "rank": 5, "activation": "relu"},
    "D": {"sites": BOTH, "rank": 2, "activation": "tanh", "layers": [1]},
}
EMBED = lj.prefix_embedding(lj.select("wte/embedding"), prefix=2, infix=1)
LAYER = lj.prefix_layer({"block_out": SITES["block_out"]}, vocabulary=V, prefix=2, infix=1)
LORA = lj.lora(lj.select("**/attn/{query,value}/kernel", axes=gpt2.AXES), rank=2)
PREFIXES = {"PE": EMBED, "PL": LAYER, "LoRA + PE": lj.chain(LORA, EMBED), "LoRA + PL": lj.chain(LORA, LAYER)}
# two texts, the first padded on the left; and two of prefix, context, infix and completion
IDS = np.array([[7, 7, 3, 4, 5, 6, 2], [8, 9, 10, 11, 12, 13, 14]], np.int32)
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7], bool)
PREFIXED = np.array([[7, 7, V, V + 1, 3, 4, V + 2, 5, 6], [V, V + 1, 8, 9, 2, 11, 12, V + 2, 14]], np.int32)
PREFIXED_MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9], bool)


def continued_without_a_cache(model: Any, adapted: Any, ids: np.ndarray, mask: np.ndarray, new: np.ndarray) -> None:
    """The new tokens (batch, n), of end token 0, are the likeliest after each prompt by whole forwards."""
    forward, count = jax.jit(lj.lift(model.apply)), new.shape[1]
    for row, (tokens, real) in enumerate(zip(ids, mask, strict=True)):
        text = list(tokens[real])
        prompt = len(text)
        while len(text) < prompt + count and 0 not in text[prompt:]:
            padded = np.zeros((1, 16), np.int32)  # one shape for all; padding on the right does not reach back
            padded[0, : len(text)] = text
            text.append(int(forward({"params": adapted}, padded)[0, len(text) - 1].argmax()))
        assert new[row, : len(text) - prompt].tolist() == text[prompt:]
